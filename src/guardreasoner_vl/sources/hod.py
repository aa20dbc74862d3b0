"""HOD, Harmful Object Dataset (arXiv 2310.05192): photographs of harmful objects, in a folder for each class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from guardreasoner_vl.sources.adapters import IMAGE_ENDINGS, RecordContext, SourceAdapter, sample_of, text_field
from guardreasoner_vl.sources.records import NotASampleError, SourceRow

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import Sample

_ABOVE_CLASSES = ("dataset", "class")
# One pattern for all image endings in any case: of several patterns only the first that matches would be read.
_IMAGE = "*.[jJpPwW]*[gGpP]"


def read_image(path: Path) -> Iterator[SourceRow]:
    """One row with the image's path; none for other files and for hidden files that unpacking may leave."""
    if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith("."):
        yield SourceRow(path.name, {"path": str(path)})


def to_sample(record: Record, context: RecordContext) -> Sample:
    """Every image is harmful. Its id is its path, which does not change when other images are added or removed."""
    path = Path(text_field(record, "path"))
    inside = path.relative_to(context.root or context.folder)
    classes = [folder for folder in inside.parts[:-1] if folder.lower() not in _ABOVE_CLASSES]
    if not classes:
        raise NotASampleError("not inside a class folder")
    own_id = f"{context.name}/{inside.as_posix()}"
    return sample_of(context, images=(str(path),), request="harmful", own_id=own_id, category=classes[0])


ADAPTER = SourceAdapter(
    name="hod",
    # The repository holds every image twice: in its class folder and in a common folder.
    files=tuple(f"{above}*/**/{_IMAGE}" for above in ("dataset/class/", "class/", "")),
    to_sample=to_sample,
    licence="no licence stated; research",
    origin="github poori-nuna/HOD-Benchmark-Dataset",
    read=read_image,
)
