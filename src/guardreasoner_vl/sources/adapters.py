"""The interface of a public data set's adapter: which files it reads, and how a record becomes a `Sample`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import ValidationError

from guardreasoner_vl.errors import DataError, GuardError
from guardreasoner_vl.sources.checked import checked_sample, field_fault, marks_fault
from guardreasoner_vl.sources.records import NotASampleError, Record, SourceRow, read_records
from guardreasoner_vl.types import GoldLabel, Modality, Sample
from guardreasoner_vl.types.media import unread_medium

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.sources.skipped import SkippedRows

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class RecordContext:
    """Where a record comes from: data set, record number over all files, and the folder image paths start from.

    Images embedded in the record are written to `unpacked`. `root` is the data set's own folder, for sets whose
    folder names carry information.
    """

    name: str
    number: int
    folder: Path
    unpacked: Path
    root: Path | None = None

    @property
    def id(self) -> str:
        """`NAME/NUMBER`, used because most sets have no ids or repeat them."""
        return f"{self.name}/{self.number}"


ToSample: TypeAlias = Callable[[Record, RecordContext], "Sample | Sequence[Sample] | None"]
"""Raises `NotASampleError` for a record that breaks its layout; gives None for one that is not part of the set."""


@dataclass(frozen=True)
class SourceAdapter:
    """One public data set as it is published.

    `files` are glob patterns below its folder: all files of the first pattern that matches are read, each by `read`.
    `hub` is its data set id on the Hugging Face hub; for a `gated` one, terms must be accepted first.
    """

    name: str
    files: tuple[str, ...]
    to_sample: ToSample
    licence: str
    origin: str
    hub: str | None = None
    gated: bool = False
    read: Callable[[Path], Iterable[SourceRow]] = read_records

    @property
    def access(self) -> str:
        """How to get the data set, in one line."""
        terms = ", after accepting its terms there (huggingface-cli login)" if self.gated else ""
        return f"get it from {self.origin}{terms}"


def read_source(adapter: SourceAdapter, folder: Path, unpacked: Path, skipped: SkippedRows) -> Iterator[Sample]:
    """Stream the samples of the data set in `folder`; unusable rows are added to `skipped` with the reason.

    Raises `DataError` if no file matches the adapter's patterns, or if a file cannot be read to its end.
    """
    number = 0
    for path in files_of(adapter, folder):
        for row in adapter.read(path):
            context = RecordContext(adapter.name, number, path.parent, unpacked, folder)
            number += 1
            try:
                samples = samples_of(row, context, adapter.to_sample)
            except GuardError as error:
                skipped.add(str(error), row.place)
                continue
            yield from samples


def samples_of(row: SourceRow, context: RecordContext, to_sample: ToSample) -> Sequence[Sample]:
    """The checked samples of one row. Raises `GuardError` with the reason why it cannot be used."""
    record = row.record
    try:
        result = to_sample(record, context)
    except ValidationError as error:
        raise NotASampleError(field_fault(error)) from error
    samples = [result] if isinstance(result, Sample) else result or ()
    for sample in samples:
        checked_sample(sample).exchange()
    if samples and not any(sample.images for sample in samples) and (key := unread_medium(record)):
        raise NotASampleError(f"{key!a:.40}: a medium that this layout does not read")
    return samples


def files_of(adapter: SourceAdapter, folder: Path) -> list[Path]:
    """The files of the first pattern that matches. Raises `DataError`, which says where to get the data set."""
    for pattern in adapter.files:
        paths = sorted(path for path in folder.glob(pattern) if path.is_file())
        if paths:
            return paths
    raise DataError(f"{folder}: no {' or '.join(adapter.files)} for {adapter.name}; {adapter.access}")


def sample_of(
    context: RecordContext,
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
    """Build a sample; entries of `meta` that are None or empty are dropped. Raises `NotASampleError`."""
    if fault := marks_fault(prompt, len(images)):
        raise NotASampleError(fault)
    return Sample(
        id=own_id or context.id,
        source=context.name,
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
    """The modality of a row with these texts and images."""
    if not images:
        return "text"
    return "text-image" if (prompt or "").strip() or (response or "").strip() else "image"


def text_field(record: Record, name: str) -> str:
    """A required text field. Raises `NotASampleError` if it is missing or blank."""
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise NotASampleError(f"no text in {name!r}")
    return value


def text_or_none(record: Record, name: str) -> str | None:
    """An optional text field; None if it is missing, blank or no text."""
    value = record.get(name)
    return value if isinstance(value, str) and value.strip() else None


def label_of(record: Mapping[str, Any], name: str, words: Mapping[object, GoldLabel]) -> GoldLabel:
    """The label of a published field. Raises `NotASampleError` for a value that `words` does not hold."""
    value = record.get(name)
    label = words.get(value) if isinstance(value, (str, int, float)) else None
    if label is None:
        raise NotASampleError(f"{name!r} is none of {', '.join(map(repr, words))}")
    return label


def image_of(context: RecordContext, *names: str) -> str:
    """The first of these images that exists, also with other file endings. Raises `NotASampleError` if none does."""
    for name in names:
        path = context.folder / name
        # A name from a record may be anything, for instance too long for the file system.
        with suppress(OSError, ValueError):
            for candidate in (path, *(path.with_suffix(ending) for ending in IMAGE_ENDINGS)):
                if candidate.is_file():
                    return str(candidate)
    raise NotASampleError("its image is missing")
