"""What a row holds: a request, a response, both or neither; and what is known of its origin."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from guardreasoner_vl.types import Parent, Provenance, Sample


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


def row(**meta: Any) -> Sample:
    return Sample(id="a", source="toy", modality="text", prompt="Hi", meta=meta)


def test_meta_stays_as_it_is_and_is_read_by_type() -> None:
    meta = {"subset": [1, None], "weak": 1, "kind": 3, "repeat": "2", "category": None, "of": ["b", "c"]}
    sample = row(**meta)
    assert sample.model_dump()["meta"] == meta
    assert sample.provenance == Provenance(weak=True, kind="3", repeat=2, of=("b", "c"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("weak", "maybe"), ("kind", ["x"]), ("repeat", 0.5), ("of", "b"), ("plain", {"image": "x"}), ("parents", [{}])],
)
def test_a_known_key_of_a_wrong_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        row(**{name: value})
    assert caught.value.errors()[0]["loc"][:2] == ("meta", name)


def test_provenance_is_added_to_meta() -> None:
    sample = row(plain={"request": "Hi"}, subset="x")
    known = Provenance(plain={"request": "Hello"}, variation="capitals", image_text="", repeat=1)
    added = sample.with_provenance(known)
    expected = '{"plain": {"request": "Hello"}, "subset": "x", "image_text": "", "variation": "capitals"}'
    assert json.dumps(added.meta) == expected
    assert added.provenance == known
    assert sample.provenance.variation is None


def test_the_stored_form_of_provenance() -> None:
    parents = tuple(
        Parent(id=name, modality="text", request_label="harmful", response_label=None) for name in ("b", "c")
    )
    stored = {"id": "b", "modality": "text", "request_label": "harmful", "response_label": None}
    assert json.dumps(Provenance(parents=parents, layout="vertical").as_meta()) == json.dumps(
        {"parents": [stored, {**stored, "id": "c"}], "layout": "vertical"}
    )
    joined = Provenance(plain={"request": "x"}, of=("b", "c"), joined="pair")
    assert json.dumps(joined.as_meta()) == '{"joined": "pair", "of": ["b", "c"], "plain": {"request": "x"}}'
    taught = Provenance(teacher="t", judged={"response": "harmful"}, votes={"request": 2})
    assert json.dumps(taught.as_meta()) == (
        '{"teacher": "t", "votes": {"request": 2}, "judged": {"response": "harmful"}}'
    )
