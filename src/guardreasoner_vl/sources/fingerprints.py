"""Fingerprints of samples' contents, for comparing them.

Texts: sets of hashed word 5-shingles, compared by their Jaccard index `|A and B| / |A or B|` (Broder 1997).
Images: 64-bit pHash, compared by Hamming distance. pHash alone confuses one page of text with another, and memes that
have the same photo and other words, so a small grey copy must agree too.
"""

from __future__ import annotations

import os
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from guardreasoner_vl.errors import ImageError, MissingExtraError
from guardreasoner_vl.images.decode import decoded_images

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from guardreasoner_vl.types import Sample

Shingles: TypeAlias = NDArray[np.uint64]
"""The sorted unique hashes of a text's shingles."""

SHINGLE = 5
_SHORT = 20  # words; in a shorter text one changed word can change the request, so only equal words are near
_EDGES = ".,;:!?…\"'()[]“”‘’«»"
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

HASH_BITS = 64
_GREY_SIDE = 64
_FLAT = 4.0  # standard deviation of 256 grey levels; below it pHash's bits are noise
_SHADES = 24  # of 256 grey levels: re-encoding changes a pixel of the grey copy by less, other words by more

_CHUNK = 256
_THREADS = 8


def normalised(text: str | None) -> str:
    """The text in NFKC, casefolded, with whitespace collapsed; None becomes an empty text."""
    if not text:
        return ""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    folded = text.casefold()
    return " ".join((folded if folded.isascii() else unicodedata.normalize("NFKC", folded)).split())


def shingles(text: str) -> Shingles:
    """The shingles of a normalised text, ignoring punctuation around words; a short text is one shingle."""
    words = [word.strip(_EDGES) or word for word in text.split()]
    hashes = np.fromiter(map(_word_hash, words), np.uint64, len(words))
    size = SHINGLE if len(words) >= _SHORT else len(words)
    runs = np.zeros(len(words) - size + 1 if words else 0, np.uint64)
    for offset in range(size):
        runs = runs * _MULTIPLIER + hashes[offset : offset + len(runs)]
    return np.unique(runs)


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(_digest_of_parts(word.encode("utf-8", "surrogatepass"))[:8], "big")


def _digest_of_parts(*parts: bytes) -> bytes:
    """One digest of several parts; each part's length is hashed too, so that the boundaries count."""
    whole = blake2b(digest_size=16)
    for part in parts:
        whole.update(len(part).to_bytes(8, "big"))
        whole.update(part)
    return whole.digest()


def jaccard(first: Shingles, second: Shingles) -> float:
    """`|A and B| / |A or B|`; 1 for two empty sets."""
    shared = np.intersect1d(first, second, assume_unique=True).size
    union = first.size + second.size - shared
    return shared / union if union else 1.0


@dataclass(frozen=True, eq=False)
class ImageMark:
    """One image: a digest of its RGB pixels, its pHash (None if it is too flat to have one), and its grey copy."""

    digest: bytes
    phash: int | None
    grey: NDArray[np.uint8]

    def is_near(self, other: ImageMark, distance: int) -> bool:
        """Whether pixels are equal or hash and grey copy agree; a flat image is near only to equal pixels."""
        if self.digest == other.digest:
            return True
        if self.phash is None or other.phash is None or (self.phash ^ other.phash).bit_count() > distance:
            return False
        return int((np.maximum(self.grey, other.grey) - np.minimum(self.grey, other.grey)).max()) <= _SHADES

    def keys(self, distance: int) -> Iterator[object]:
        """Lookup keys: the parts of a hash cut in `distance + 1`; hashes within `distance` bits agree on a part."""
        if self.phash is None:
            yield self.digest
            return
        edges = [HASH_BITS * part // (distance + 1) for part in range(distance + 2)]
        for low, high in pairwise(edges):
            yield low, (self.phash >> low) & ((1 << (high - low)) - 1)


def image_marks(path: str) -> tuple[ImageMark, ...] | None:
    """One mark for each image in a file (`images.decode.decoded_images`); None if it cannot be decoded."""
    try:
        return tuple(map(_mark, decoded_images(Path(path))))
    except ImageError:
        return None


def _mark(image: Image.Image) -> ImageMark:
    try:
        from imagehash import phash
    except ImportError as error:
        raise MissingExtraError("imagehash", "data") from error
    grey = image.convert("L")
    small = np.asarray(grey.resize((_GREY_SIDE, _GREY_SIDE), Image.Resampling.LANCZOS))
    bits = None if small.std() < _FLAT else int.from_bytes(np.packbits(phash(grey).hash).tobytes(), "big")
    return ImageMark(_digest_of_parts(b"%dx%d" % image.size, image.tobytes()), bits, small)


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """A sample's content; equal keys mean equal content, and `request_key` covers the request alone.

    `images` holds, for each file, the marks of its images.
    """

    key: bytes
    request_key: bytes
    prompt: Shingles
    response: Shingles
    images: tuple[tuple[ImageMark, ...], ...]

    @property
    def shape(self) -> tuple[bool, bool, tuple[int, ...]]:
        """Which parts exist, and the images in each file; samples of different shapes are never near."""
        return bool(self.prompt.size), bool(self.response.size), tuple(map(len, self.images))

    def request(self) -> Fingerprint:
        """The fingerprint without the response; itself if there is nothing but a response."""
        if not (self.prompt.size or self.images):
            return self
        return replace(self, key=self.request_key, response=self.response[:0])

    def is_near(self, other: Fingerprint, text: float, image: int) -> bool:
        """Whether every image is within `image` bits, and prompt and response each reach the Jaccard index `text`.

        The two texts are compared separately: together, a long prompt with two different answers would count as near.
        """
        return (
            self.shape == other.shape
            and all(
                mark.is_near(other_mark, image)
                for marks, other_marks in zip(self.images, other.images, strict=True)
                for mark, other_mark in zip(marks, other_marks, strict=True)
            )
            and jaccard(self.prompt, other.prompt) >= text
            and jaccard(self.response, other.response) >= text
        )


Fingerprinted: TypeAlias = "tuple[Sample, Fingerprint | None]"


def fingerprints(samples: Iterable[Sample]) -> Iterator[Fingerprinted]:
    """Each sample with its fingerprint, None if an image cannot be decoded; each file is decoded once."""
    stream = iter(samples)
    files: dict[str, tuple[ImageMark, ...] | None] = {}
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        while chunk := list(islice(stream, _CHUNK)):
            new = [path for path in dict.fromkeys(path for row in chunk for path in row.images) if path not in files]
            files.update(zip(new, pool.map(image_marks, new), strict=True))
            for sample in chunk:
                marks = [files[path] for path in sample.images]
                known = tuple(mark for mark in marks if mark is not None)
                yield sample, _fingerprint(sample, known) if len(known) == len(marks) else None


def _fingerprint(sample: Sample, images: tuple[tuple[ImageMark, ...], ...]) -> Fingerprint:
    prompt, response = normalised(sample.prompt), normalised(sample.response)
    request = _digest_of_parts(
        prompt.encode("utf-8", "surrogatepass"),
        *(_digest_of_parts(*(mark.digest for mark in marks)) for marks in images),
    )
    key = _digest_of_parts(request, response.encode("utf-8", "surrogatepass"))
    return Fingerprint(key, _digest_of_parts(request, b""), shingles(prompt), shingles(response), images)
