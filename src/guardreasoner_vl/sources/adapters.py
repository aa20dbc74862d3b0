"""What an adapter for a public data set is: which files it reads, and how a record becomes a `Sample`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import ValidationError

from guardreasoner_vl.errors import DataError, GuardError
from guardreasoner_vl.sources.checked import checked, field_fault, marks_fault
from guardreasoner_vl.sources.records import NotASampleError, Record, Row, read_records
from guardreasoner_vl.types import GoldLabel, Modality, Sample
from guardreasoner_vl.types.media import unread_medium

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.sources.skipped import SetAside

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Place:
    """Where a record stands: its data set, its number in the files, and the folder that image paths start from.

    Images that stand in the record itself are written to `unpacked`; `root` is the data set's own folder, for
    sets whose folders tell something.
    """

    name: str
    number: int
    folder: Path
    unpacked: Path
    root: Path | None = None

    @property
    def id(self) -> str:
        """An id of our own, since most sets have none or repeat it."""
        return f"{self.name}/{self.number}"


ToSample: TypeAlias = Callable[[Record, Place], "Sample | Sequence[Sample] | None"]
"""Raises `NotASampleError` for a record that breaks its layout; None for one that the data set leaves out."""


@dataclass(frozen=True)
class Adapter:
    """One public data set as it is published.

    `files` are patterns below its folder, alternatives of which the first that matches is read; `read` gives a
    file's records. `hub` is its data set's id there; a `gated` one has terms to be accepted first.
    """

    name: str
    files: tuple[str, ...]
    to_sample: ToSample
    licence: str
    origin: str
    hub: str | None = None
    gated: bool = False
    read: Callable[[Path], Iterable[Row]] = read_records

    @property
    def access(self) -> str:
        """How to get it, in one line."""
        terms = ", after accepting its terms there (huggingface-cli login)" if self.gated else ""
        return f"get it from {self.origin}{terms}"


def read_source(adapter: Adapter, folder: Path, unpacked: Path, set_aside: SetAside) -> Iterator[Sample]:
    """Stream the samples of a data set that lies in `folder`; what cannot be used is set aside with its reason.

    Raises `DataError` if none of its files is there, or one cannot be read to its end.
    """
    number = 0
    for path in files_of(adapter, folder):
        for row in adapter.read(path):
            place = Place(adapter.name, number, path.parent, unpacked, folder)
            number += 1
            try:
                samples = samples_of(row, place, adapter.to_sample)
            except GuardError as error:
                set_aside.add(str(error), row.place)
                continue
            yield from samples


def samples_of(row: Row, place: Place, to_sample: ToSample) -> Sequence[Sample]:
    """The samples of one row, checked. Raises `GuardError` with the reason why it cannot be used."""
    record = row.record
    try:
        result = to_sample(record, place)
    except ValidationError as error:
        raise NotASampleError(field_fault(error)) from error
    samples = [result] if isinstance(result, Sample) else result or ()
    for sample in samples:
        checked(sample).exchange()
    if samples and not any(sample.images for sample in samples) and (key := unread_medium(record)):
        raise NotASampleError(f"{key!a:.40}: a medium that this layout does not read")
    return samples


def files_of(adapter: Adapter, folder: Path) -> list[Path]:
    """The files of the first layout found; raises `DataError` that says where to get it."""
    for pattern in adapter.files:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if found:
            return found
    raise DataError(f"{folder}: no {' or '.join(adapter.files)} for {adapter.name}; {adapter.access}")


def sample_of(
    place: Place,
    prompt: str = "",
    response: str | None = None,
    *,
    images: Sequence[str] = (),
    request: GoldLabel | None = None,
    answered: GoldLabel | None = None,
    reasoning: str | None = None,
    own_id: str | None = None,
    split: str = "train",
    **meta: object,
) -> Sample:
    """A sample with the labels of request and response; of `meta` stays what is known. Raises `NotASampleError`."""
    if fault := marks_fault(prompt, len(images)):
        raise NotASampleError(fault)
    return Sample(
        id=own_id or place.id,
        source=place.name,
        split=split,
        modality=modality_of(prompt, response, images),
        prompt=prompt,
        images=tuple(images),
        response=response,
        request_label=request,
        response_label=answered,
        reasoning=reasoning,
        meta={name: value for name, value in meta.items() if value is not None and value != ""},
    )


def modality_of(prompt: str | None, response: str | None, images: Sequence[str]) -> Modality:
    """What a row is made of."""
    if not images:
        return "text"
    return "text-image" if (prompt or "").strip() or (response or "").strip() else "image"


def text_of(record: Record, name: str) -> str:
    """A field that must be a text with something in it."""
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise NotASampleError(f"no text in {name!r}")
    return value


def text_or_none(record: Record, name: str) -> str | None:
    """A field that may be absent; whitespace alone is absent."""
    value = record.get(name)
    return value if isinstance(value, str) and value.strip() else None


def label_of(record: Mapping[str, Any], name: str, words: Mapping[object, GoldLabel]) -> GoldLabel:
    """The label that a published field means; an unknown word is never taken for unharmful."""
    value = record.get(name)
    label = words.get(value) if isinstance(value, (str, int, float)) else None
    if label is None:
        raise NotASampleError(f"{name!r} is none of {', '.join(map(repr, words))}")
    return label


def image_of(place: Place, *names: str) -> str:
    """The path of an image that exists; names with other endings are tried too."""
    for name in names:
        path = place.folder / name
        # A name may be anything: too long for the file system, or no name at all.
        with suppress(OSError, ValueError):
            for candidate in (path, *(path.with_suffix(ending) for ending in IMAGE_ENDINGS)):
                if candidate.is_file():
                    return str(candidate)
    raise NotASampleError("its image is missing")
