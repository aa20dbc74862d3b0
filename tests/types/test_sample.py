"""What a row holds: a request, a response, both or neither."""

from __future__ import annotations

import pytest

from guardreasoner_vl.types import Sample


@pytest.mark.parametrize(
    ("prompt", "images", "response", "expected"),
    [
        ("Hi", (), None, (True, False)),
        ("", ("a.png",), None, (True, False)),
        (" \n", ("a.png",), " ", (True, False)),
        ("", (), "Hello", (False, True)),
        (" \t\n", (), "Hello", (False, True)),
        ("Hi", (), "", (True, False)),
        ("Hi", (), " \n", (True, False)),
        ("Hi", (), "Hello", (True, True)),
    ],
)
def test_whitespace_alone_is_neither_a_request_nor_a_response(
    prompt: str, images: tuple[str, ...], response: str | None, expected: tuple[bool, bool]
) -> None:
    sample = Sample(id="a", source="toy", modality="text", prompt=prompt, images=images, response=response)
    assert (sample.has_request, sample.has_response) == expected
    exchange = sample.exchange()
    assert (exchange.has_prompt, exchange.has_response) == expected


def test_an_empty_row_has_neither() -> None:
    sample = Sample(id="a", source="toy", modality="text", prompt=" ", response=" ")
    assert not sample.has_request
    assert not sample.has_response
