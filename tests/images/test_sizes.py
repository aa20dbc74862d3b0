"""Tests of the remembered sizes of image files."""

import os
from pathlib import Path

import pytest
from PIL import Image

from guardreasoner_vl.errors import DataError, ImageError
from guardreasoner_vl.images.decode import decoded_images
from guardreasoner_vl.images.exchange import checked_exchange, measured_exchange
from guardreasoner_vl.images.sizes import ImageSize, ImageSizes
from guardreasoner_vl.types import Exchange, Turn


def drawn(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> str:
    Image.new(mode, size, 0).save(path)
    return str(path)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are decoded, in order."""
    read: list[str] = []

    def recorded(source: Path) -> tuple[Image.Image, ...]:
        read.append(source.name)
        return decoded_images(source)

    monkeypatch.setattr("guardreasoner_vl.images.sizes.decoded_images", recorded)
    return read


def test_sizes_are_those_of_the_decoded_images(tmp_path: Path) -> None:
    upright = drawn(tmp_path / "a.png")
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees
    Image.new("RGB", (40, 30)).save(turned, exif=exif)
    clear = drawn(tmp_path / "clear.png", mode="RGBA")
    exchange = Exchange("Which is wider?", (upright, str(turned)), history=(Turn("This?", (clear,), "Yes."),))

    shown, images = checked_exchange(exchange)
    measured, sizes = measured_exchange(exchange, ImageSizes())

    assert sizes == tuple(ImageSize(image.width, image.height) for image in images)
    assert len(measured.images) == len(shown.images)
    assert [len(turn.images) for turn in measured.history] == [len(turn.images) for turn in shown.history]


def test_a_file_is_decoded_once(tmp_path: Path, decoded: list[str]) -> None:
    paths = [drawn(tmp_path / f"{number}.png", (10 + number, 20)) for number in range(5)]
    store = tmp_path / "sizes.jsonl"

    ImageSizes(store).measure([*paths, paths[0]])
    sizes = ImageSizes(store)
    sizes.measure(paths)

    assert [sizes.of(path) for path in paths] == [(ImageSize(10 + number, 20),) for number in range(5)]
    assert sorted(decoded) == [f"{number}.png" for number in range(5)]


def test_a_file_that_changed_is_measured_again(tmp_path: Path) -> None:
    path, store = drawn(tmp_path / "a.png"), tmp_path / "sizes.jsonl"
    ImageSizes(store).measure([path])

    drawn(tmp_path / "a.png", (8, 9))
    os.utime(path, ns=(1, 1))

    assert ImageSizes(store).of(path) == (ImageSize(8, 9),)


def test_a_broken_file_is_left_to_its_reader(tmp_path: Path) -> None:
    broken, store = tmp_path / "broken.png", tmp_path / "sizes.jsonl"
    broken.write_bytes(b"not an image")
    sizes = ImageSizes(store)

    sizes.measure([str(broken), str(tmp_path / "missing.png")])

    assert not store.exists()
    for path in (broken, tmp_path / "missing.png"):
        with pytest.raises(ImageError):
            sizes.of(path)


def test_images_without_a_file_are_decoded(tmp_path: Path) -> None:
    data = Path(drawn(tmp_path / "a.png")).read_bytes()

    assert ImageSizes().of(data) == (ImageSize(40, 30),)


def test_a_torn_line_is_measured_again(tmp_path: Path) -> None:
    paths = [drawn(tmp_path / "a.png"), drawn(tmp_path / "b.png")]
    store = tmp_path / "sizes.jsonl"
    ImageSizes(store).measure(paths)
    store.write_bytes(store.read_bytes()[:-9])

    ImageSizes(store).measure(paths)

    assert len(store.read_bytes().splitlines()) == 2
    assert ImageSizes(store).of(paths[1]) == (ImageSize(40, 30),)


@pytest.mark.parametrize(
    "line",
    [
        '{"id": 1}',
        "[1]",
        '{"path": "a.png", "length": 1, "changed": 1, "sizes": [[Infinity, 1]]}',
        '{"path": "a.png", "length": 1, "changed": 1, "sizes": [[1]]}',
    ],
)
def test_another_file_is_refused_with_the_remedy(line: str, tmp_path: Path) -> None:
    store = tmp_path / "sizes.jsonl"
    store.write_text(f"{line}\n")

    with pytest.raises(DataError, match=r"line 1: not the sizes of an image file; remove the file"):
        ImageSizes(store)
