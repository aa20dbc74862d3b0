"""A value that is not a path, such as a whole image in base64, is refused as an image path and never quoted."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from guardreasoner_vl.batch.moderate import run_batch
from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.guard import as_exchange
from guardreasoner_vl.images.decode import checked_images
from guardreasoner_vl.images.exchange import checked_exchange
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.sources.skipped import SkippedRows
from tests.cli.test_app import invoke
from tests.scripted_guard import scripted_guard

INLINE = "not a path: write data:image/...;base64,"


def encoded(format_name: str, side: int = 40) -> str:
    stream = BytesIO()
    Image.effect_noise((side, side), 90).convert("RGB").save(stream, format_name)
    return base64.b64encode(stream.getvalue()).decode()


BARE = {
    **{name: encoded(name) for name in ("PNG", "JPEG", "GIF", "WEBP", "BMP")},
    "one pixel": encoded("PNG", 1),
    "lines": "\n".join(encoded("PNG")[start : start + 76] for start in range(0, 800, 76)),
    "url alphabet": base64.urlsafe_b64encode(b"\xfb\xff" * 300).decode(),
    "without padding": encoded("JPEG").rstrip("="),
    "short": base64.b64encode(b"some text that is no image").decode(),
    "unknown start": base64.b64encode(b"II*\0" + bytes(range(256))).decode(),
}


@pytest.mark.parametrize("name", BARE)
def test_the_error_of_bare_base64_says_how_to_write_it(name: str, tmp_path: Path) -> None:
    text = BARE[name]
    tail = text[-12:]
    for source in (text, Path(text), tmp_path / text):
        with pytest.raises(ImageError) as refused:
            checked_images(source)
        assert str(refused.value).startswith(INLINE)
        assert tail not in str(refused.value)
        assert text[:12] not in str(refused.value)
    with pytest.raises(ImageError, match="not a path: write data:image"):
        checked_exchange(as_exchange({"prompt": "x", "images": [text]}))


@pytest.mark.parametrize("name", BARE)
def test_bare_base64_in_files(name: str, tmp_path: Path) -> None:
    text = BARE[name]
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": 1, "prompt": "x", "images": [text]}) + "\n")
    run_batch(scripted_guard(), tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    verdict = json.loads((tmp_path / "out.jsonl").read_text())
    assert verdict["error"]["code"] == "invalid_image"
    assert verdict["error"]["message"].startswith(INLINE)
    row = {"id": "a", "source": "s", "modality": "text-image", "prompt": "x", "images": [text]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    skipped = SkippedRows()
    assert not list(read_samples(tmp_path / "train.jsonl", skipped))
    ((place, reason),) = skipped.rows
    assert place == "train.jsonl, line 1"
    assert reason.startswith(f"images: {INLINE}")


def test_bare_base64_on_the_command_line() -> None:
    result = invoke("moderate", "--image", BARE["PNG"])
    assert result.exit_code == 2
    assert INLINE in result.stderr
    assert BARE["PNG"][:12] not in result.stderr


@pytest.mark.parametrize(
    "name", ["x" * 256 + ".png", "é" * 200 + ".png", "a/" * 3000 + "b.png", "a\0b.png", "secret\0", "x, y. " * 1000]
)
def test_what_no_file_can_be_called_is_not_quoted(name: str) -> None:
    with pytest.raises(ImageError, match=r"^not a path: give the path of an image$"):
        checked_images(name)


@pytest.mark.parametrize(
    "name",
    [
        "a.png",
        "images/2024/holiday-of-the-family/photo_001.jpeg",
        "3f786850e387550fdab836ed7e6dc881de23001b",
        "data/images/" + "ab12/" * 20 + "c.webp",
        "/9j",
        "Qk",
    ],
)
def test_names_of_files_stay_names(name: str) -> None:
    with pytest.raises(ImageError, match=r"cannot be read \(No such file or directory\)"):
        checked_images(f"/nowhere/{name}")


def test_a_file_whose_name_looks_encoded_is_read(tmp_path: Path) -> None:
    path = tmp_path / "iVBORw0KGgoAAAANSUhEUg"
    Image.new("RGB", (8, 8)).save(path, "PNG")
    assert len(checked_images(path)) == len(checked_images(str(path))) == 1
