"""HOD, Harmful Object Dataset (arXiv 2310.05192): photographs of harmful objects, in a folder for each class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from guardreasoner_vl.sources.adapters import IMAGE_ENDINGS, Adapter, Place, sample_of, text_of
from guardreasoner_vl.sources.records import NotASampleError, Row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import Sample

_ABOVE_CLASSES = ("dataset", "class")
# One pattern for all endings of images, in any case, since of several only the first that matches is read.
_IMAGE = "*.[jJpPwW]*[gGpP]"


def read_image(path: Path) -> Iterator[Row]:
    """The image's path; nothing for other files and for the hidden ones that unpacking may leave."""
    if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith("."):
        yield Row(path.name, {"path": str(path)})


def to_sample(record: Record, place: Place) -> Sample:
    """Every image of a class is harmful; its id is its path, so that it stays when others come and go."""
    path = Path(text_of(record, "path"))
    inside = path.relative_to(place.root or place.folder)
    classes = [folder for folder in inside.parts[:-1] if folder.lower() not in _ABOVE_CLASSES]
    if not classes:
        raise NotASampleError("not below a class's folder")
    own_id = f"{place.name}/{inside.as_posix()}"
    return sample_of(place, images=(str(path),), request="harmful", own_id=own_id, category=classes[0])


ADAPTER = Adapter(
    name="hod",
    # The repository has every image twice: by class, and all together.
    files=tuple(f"{above}*/**/{_IMAGE}" for above in ("dataset/class/", "class/", "")),
    to_sample=to_sample,
    licence="no licence stated; research",
    origin="github poori-nuna/HOD-Benchmark-Dataset",
    read=read_image,
)
