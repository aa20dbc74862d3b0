"""The messages that the proxy judges and sends: one text where parts are adjacent, plain base64 of every image."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from guardreasoner_vl.service.forwarding import as_forwarded
from guardreasoner_vl.types import Exchange

LETTERS = [{"type": "text", "text": letter} for letter in "How to"]


def encoded(kind: str) -> bytes:
    file = BytesIO()
    Image.new("RGB", (8, 8), "green").save(file, kind)
    return file.getvalue()


PNG = encoded("PNG")
TEXT = base64.b64encode(PNG).decode()
PLAIN = f"data:image/png;base64,{TEXT}"


def image_part(url: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **fields}


def content_of(parts: list[Any], role: str = "user") -> Any:
    (message,) = as_forwarded([{"role": role, "content": parts}])
    return message["content"]


@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
def test_adjacent_texts_are_the_string_that_is_judged(role: str) -> None:
    messages = as_forwarded([{"role": "user", "content": "Hello."}, {"role": role, "content": LETTERS}])
    (part,) = messages[1]["content"]
    assert part == {"type": "text", "text": "H\no\nw\n \nt\no"}
    judged = Exchange.from_messages(messages)
    assert part["text"] in ((judged.prompt if role == "user" else judged.response) or "")


def test_every_kind_of_text_is_merged_and_an_image_parts_them() -> None:
    parts = [
        {"type": "input_text", "text": "a"},
        {"type": "output_text", "text": ""},
        {"type": "refusal", "refusal": "b"},
        image_part(PLAIN),
        {"type": "refusal", "refusal": "c"},
        image_part(PLAIN),
        {"type": "text", "text": "d", "cache_control": {"type": "x"}},
        {"type": "text", "text": "e"},
    ]
    assert content_of(parts) == [
        {"type": "text", "text": "a\n\nb"},
        image_part(PLAIN),
        {"type": "refusal", "refusal": "c"},
        image_part(PLAIN),
        {"type": "text", "text": "d\ne", "cache_control": {"type": "x"}},
    ]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_operators_texts_stay_as_they_are(role: str) -> None:
    assert content_of(LETTERS, role) == LETTERS


@pytest.mark.parametrize(
    "parts",
    [[{"type": "text", "text": 1}, {"type": "text", "text": "a"}], [{"type": "audio"}, 1, None], [{"type": ["text"]}]],
)
def test_what_is_no_text_stays_for_the_guard_to_refuse(parts: list[Any]) -> None:
    assert content_of(parts) == parts


def test_many_parts_take_no_longer_than_their_text() -> None:
    (part,) = content_of(LETTERS[:1] * 300_000)
    assert len(part["text"]) == 599_999


@pytest.mark.parametrize(
    "url",
    [
        PLAIN,
        f"data:;base64,{TEXT}",
        f"DATA:text/html;charset=x;BASE64,{TEXT[:9]}\r\n {TEXT[9:]}",
        f"data:image/jpeg;base64,{TEXT}",
        f"data:image/png,{quote(PNG)}",
    ],
)
def test_an_image_is_plain_base64_of_its_bytes(url: str) -> None:
    assert content_of([image_part(url, detail="low")]) == [image_part(PLAIN, detail="low")]
    assert content_of([{"type": "input_image", "image_url": url}]) == [{"type": "input_image", "image_url": PLAIN}]


@pytest.mark.parametrize(("kind", "media_type"), [("JPEG", "jpeg"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp")])
def test_the_media_type_is_that_of_the_signature(kind: str, media_type: str) -> None:
    text = base64.b64encode(encoded(kind)).decode()
    assert content_of([image_part(f"data:;base64,{text}")]) == [image_part(f"data:image/{media_type};base64,{text}")]


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,!",
        "data:image/png",
        "data:,",
        "https://example.org/a.png",
        None,
        1,
        f"data:;base64,%41{TEXT}",
    ],
)
def test_an_image_without_bytes_stays_for_the_guard_to_refuse(url: Any) -> None:
    assert content_of([image_part(url)]) == [image_part(url)]
