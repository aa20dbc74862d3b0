"""Export a corpus to the layouts of other programs: the authors' release, and ShareGPT as LLaMA-Factory reads it.

Both are lists of conversations. Other fields (ids, sources, unknown labels, texts that the neutraliser changed) go into
the extra key `sample`, which those programs ignore. The adapters `guardreasoner-vltrain` and `sharegpt` read everything
back without loss.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.corpus.store import read_corpus
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.protocol import INSTRUCTION, TargetLabel, build_messages, neutralise, training_target
from guardreasoner_vl.sources.adapters import RecordContext
from guardreasoner_vl.sources.catalogue import adapter_named
from guardreasoner_vl.sources.records import NotASampleError
from guardreasoner_vl.storage.atomic import replacing, write_json
from guardreasoner_vl.types import Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guardreasoner_vl.choices import ExportLayout
    from guardreasoner_vl.types import GoldLabel

ADAPTERS: dict[ExportLayout, str] = {"guardreasoner": "guardreasoner-vltrain", "sharegpt": "sharegpt"}
"""The adapter that reads each layout back."""

IMAGES = "images"
_FILES = {"text": "Text.json", "image": "Image.json", "text-image": "TextImage.json"}
_FIELDS = tuple(name for name in Sample.model_fields if name != "images")
_DATASET_INFO = {
    "guardreasoner": {
        "file_name": "train.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "images": "images", "system": "system"},
    }
}


def export(folder: Path, layout: ExportLayout, out: Path, progress: Callable[[int], None] | None = None) -> int:
    """Write the corpus in `folder` with its images to the new folder `out`, and return the number of rows.

    Rows without reasoning get an empty `<think>`. Raises `DataError` if `out` is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: not empty; name a new folder")
    count = 0
    with ExitStack() as files:
        lists: dict[str, Callable[[dict[str, Any]], None]] = {}
        for sample in read_corpus(folder):
            name = _FILES[sample.modality] if layout == "guardreasoner" else "train.json"
            if name not in lists:
                lists[name] = files.enter_context(_list_file(out / name))
            lists[name](_record(sample, layout, out))
            count += 1
            if progress:
                progress(count)
    if layout == "sharegpt":
        write_json(out / "dataset_info.json", _DATASET_INFO)
    return count


def _record(sample: Sample, layout: ExportLayout, out: Path) -> dict[str, Any]:
    user, answer = build_messages(sample.exchange())[1].text, _answer_text(sample)
    record: dict[str, Any]
    turns: tuple[tuple[str, str], ...]
    if layout == "guardreasoner":
        turns = (("system", INSTRUCTION), ("user", user), ("assistant", answer))
        record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    else:
        turns = (("human", user), ("gpt", answer))
        record = {"system": INSTRUCTION, "conversations": [{"from": sender, "value": text} for sender, text in turns]}
    record["images"] = [_copy_image(Path(path), out) for path in sample.images]
    return {**record, "sample": _not_carried(sample, record, layout, out)}


def _not_carried(sample: Sample, record: dict[str, Any], layout: ExportLayout, out: Path) -> dict[str, Any]:
    """The fields that reading the conversation would not restore; all fields, if restoring only these fails."""
    content = sample.model_dump(mode="json")
    whole = {name: content[name] for name in _FIELDS}
    read = _fields_read_back(record, layout, out)
    missing = {name: value for name, value in whole.items() if read.get(name) != value}
    again = _fields_read_back({**record, "sample": missing}, layout, out)
    return missing if all(again.get(name) == value for name, value in whole.items()) else whole


def _fields_read_back(record: dict[str, Any], layout: ExportLayout, out: Path) -> dict[str, Any]:
    """The fields read back from a record; empty if it is not a sample."""
    try:
        sample = adapter_named(ADAPTERS[layout]).to_sample(record, RecordContext("", 0, out, out))
    except NotASampleError:
        return {}
    return sample.model_dump(mode="json") if isinstance(sample, Sample) else {}


def _answer_text(sample: Sample) -> str:
    """The assistant's text, without the line of an unknown label."""
    targets = ((sample.request_label, sample.has_request), (sample.response_label, sample.has_response))
    words = [_word(label) if present else TargetLabel("None") for label, present in targets]
    spans = training_target(neutralise(sample.reasoning or ""), *words)
    text = "".join(span.text for span in spans)
    for name, (label, present) in zip(("Request", "Response"), targets, strict=True):
        if present and label is None:
            text = text.replace(f"\n{name}: None", "")
    return text


def _word(label: GoldLabel | None) -> TargetLabel:
    return TargetLabel(label or "None")


def _copy_image(path: Path, out: Path) -> str:
    """Copy an image and return its path below `out`; a hash of its folder separates equal names."""
    folder = hashlib.sha256(str(path.parent.absolute()).encode()).hexdigest()[:8]
    target = out / IMAGES / folder / path.name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(path, target)
        except OSError as error:
            raise DataError(f"{path}: cannot be copied ({error.strerror}); run `corpus check`") from error
    return str(target.relative_to(out))


@contextmanager
def _list_file(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Write a JSON list one record at a time; yields the function that adds a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as stream:
        separator = "[\n"

        def add(record: dict[str, Any]) -> None:
            nonlocal separator
            stream.write(separator + json.dumps(record, ensure_ascii=False))
            separator = ",\n"

        yield add
        stream.write("\n]\n")
