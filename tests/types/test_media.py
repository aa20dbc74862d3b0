"""Keys that name a medium, and marks in a text, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from guardreasoner_vl.types.media import leading_marks, marks, unread_medium


def test_marks_are_counted() -> None:
    assert marks("<image><image> < Video > <audio>x</audio>") == {"image": 2, "video": 1, "audio": 1}
    assert leading_marks("<image>\n <video>\nsee <image>") == {"image": 1, "video": 1}
    assert leading_marks("see <image>") == {}


@pytest.mark.parametrize(
    "key", ["image", "Images", "image_path", "imageUrl", "input_image", "videos", "audio_file", "img"]
)
def test_keys_that_name_a_medium(key: str) -> None:
    assert unread_medium({"id": 1, key: "a"}) == key
    assert unread_medium({key: "a"}, read=(key,)) is None


@pytest.mark.parametrize("key", ["image_description", "num_images", "video_title", "imagery", "prompt", "audience"])
def test_keys_that_name_none(key: str) -> None:
    assert unread_medium({key: "a"}) is None


@pytest.mark.parametrize("value", [None, "", [], {}, [None], {"url": None}, 0, False, float("nan")])
def test_an_empty_value_is_no_medium(value: Any) -> None:
    assert unread_medium({"image": value}) is None
