"""Locate a data set: a local folder, or a Hugging Face hub snapshot pinned by revision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.storage.hub import snapshot

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.sources.adapters import SourceAdapter

HUB = "hub:"
_IMAGES = ("*.png", "*.jpg", "*.jpeg", "*.webp", "*.zip")


def locate(folder: str, root: Path, adapter: SourceAdapter | None = None) -> Path:
    """The folder below `root`, or the downloaded snapshot of `hub:OWNER/NAME@REVISION`.

    Raises `DataError`, which says how to get the data set, also if REVISION is missing: without it rows could change.
    """
    if not folder.startswith(HUB):
        return root / folder
    name, _, revision = folder.removeprefix(HUB).partition("@")
    if not revision:
        raise DataError(f"{folder}: no revision; give {folder}@REVISION, so that others get the same rows")
    wanted = {"allow_patterns": [*adapter.files, *_IMAGES]} if adapter else {}
    try:
        return snapshot(name, revision, DataError, repo_type="dataset", **wanted)
    except DataError as error:
        raise DataError(f"{error}; {adapter.access}" if adapter else str(error)) from error


def revision_of(folder: str) -> str | None:
    """The pinned revision of a hub folder; None for a local one."""
    return folder.rpartition("@")[2] if folder.startswith(HUB) and "@" in folder else None
