"""Publishes a model folder or a corpus on the model hub: exactly the files that belong to it, with its card.

A model's card is its README.md, which states a licence; a corpus's is the `card.md` that `corpus stats` writes, which
becomes the README.md of the data set. Any other file is refused, because checkpoints, logs and leftovers may hold what
nobody means to publish.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import yaml

from guardreasoner_vl.corpus.store import ROWS, is_corpus, read_info
from guardreasoner_vl.engines.model_files import check_folder
from guardreasoner_vl.errors import DataError, InputError, ModelError
from guardreasoner_vl.sources.parquet import outside_images
from guardreasoner_vl.storage.hub import check_repo_id, upload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from guardreasoner_vl.errors import GuardError

README, CARD = "README.md", "card.md"

_MODEL_FILES = (
    README, "LICENSE", "NOTICE", "config.json", "generation_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json",
    "chat_template.jinja", "calibration.json", "model.safetensors", "model.int8.safetensors",
    "model-*-of-*.safetensors", "model.safetensors.index.json",
)  # fmt: skip
_CORPUS_FILES = (
    ROWS, "corpus.json", "reasoning.jsonl", "skipped.jsonl", "stats.json", CARD, "card.html", "*.svg",
    *(f"images/*.{ending}" for ending in ("png", "jpg", "jpeg", "webp", "gif", "bmp")),
)  # fmt: skip
_LICENCES = frozenset(
    ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "odc-by")
)
"""Licences that the hub knows by these names; any other is `other` there."""

_HEADER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_SHOWN = 3


@dataclass(frozen=True)
class Publication:
    """What is published: the kind of repository, its files by name, and its README.md."""

    kind: Literal["model", "dataset"]
    files: Mapping[str, Path]
    readme: str

    @property
    def bytes(self) -> int:
        """The size of all files in bytes."""
        return sum(path.stat().st_size for path in self.files.values()) + len(self.readme.encode())

    def write(self, folder: Path, place: Callable[[Path, Path], object] = shutil.copyfile) -> None:
        """Write the repository's files to `folder`; `place` puts a file (source, target) there."""
        for name, path in self.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            place(path, target)
        (folder / README).write_text(self.readme, "utf-8")


def publication(folder: Path) -> Publication:
    """What would be published of the folder.

    Raises `ModelError` or `DataError` for a card that is missing or states no licence, for a file that does not belong,
    and for a corpus whose images are elsewhere; `InputError` if the folder is neither a model nor a corpus.
    """
    if is_corpus(folder):
        return _corpus(folder)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: neither a model (config.json) nor a corpus (corpus.json); give one of these folders"
        )
    return _model(folder)


def dry_run(folder: Path, repo_id: str, target: Path) -> Publication:
    """Write what `push` would upload to the new folder `target`. Raises what `publication` raises, and `InputError`."""
    check_repo_id(repo_id)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target}: exists already; give the name of a new folder")
    published = publication(folder)
    target.mkdir(parents=True, exist_ok=True)
    published.write(target)
    return published


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Upload the folder to the hub in one commit, and return the repository's address.

    Raises what `publication` raises, `InputError` for an invalid name, and `DataError` if the hub refuses.
    """
    check_repo_id(repo_id)
    published = publication(folder)
    with TemporaryDirectory() as staged:
        published.write(Path(staged), lambda source, target: target.symlink_to(source.resolve()))
        return upload(Path(staged), repo_id, published.kind, private)


def _model(folder: Path) -> Publication:
    check_folder(folder)
    files = _belonging(folder, _MODEL_FILES, ModelError)
    card = folder / README
    if not card.is_file():
        raise ModelError(
            f"{folder}: no {README}; write a model card: licence, what it was trained on, its figures and limits"
        )
    readme = card.read_text("utf-8")
    if not _licence(readme):
        raise ModelError(f"{card}: states no licence; start it with the lines '---', 'license: NAME', '---'")
    return Publication("model", {name: path for name, path in files.items() if name != README}, readme)


def _corpus(folder: Path) -> Publication:
    files = _belonging(folder, _CORPUS_FILES, DataError)
    if CARD not in files:
        raise DataError(f"{folder}: no {CARD}; write it with `corpus stats`")
    if image := next(outside_images(folder / ROWS), None):
        raise DataError(
            f"{folder}: rows refer to images outside of the folder ({image:.80}); curate it again with --embed"
        )
    info = read_info(folder)
    licences = {source.licence.lower() for source in info.sources}
    header = {
        "license": licences.pop() if len(licences) == 1 and licences <= _LICENCES else "other",
        "pretty_name": info.name,
        "tags": ["moderation", "guardreasoner-vl"],
        "configs": [{"config_name": "default", "data_files": ROWS}],
    }
    card = (folder / CARD).read_text("utf-8")
    readme = f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n{card}"
    return Publication("dataset", {name: path for name, path in files.items() if name != CARD}, readme)


def _belonging(folder: Path, patterns: Iterable[str], error: type[GuardError]) -> dict[str, Path]:
    """All files of the folder by their name in it. Raises `error` if one fits none of the patterns."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    if other := [name for name in names if not any(_fits_pattern(name, pattern) for pattern in patterns)]:
        more = "" if len(other) <= _SHOWN else f" and {len(other) - _SHOWN} more"
        raise error(
            f"{folder}: {', '.join(other[:_SHOWN])}{more} do not belong in what is published; move them elsewhere"
        )
    return names


def _fits_pattern(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _licence(readme: str) -> object:
    """The licence that a card's header states; None if it has no header or no licence."""
    header = _HEADER.match(readme.replace("\r\n", "\n"))
    try:
        content = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        return None
    return content.get("license") if isinstance(content, dict) else None
