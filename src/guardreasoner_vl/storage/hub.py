"""Folders from the model hub: models and data sets."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guardreasoner_vl.errors import GuardError


def snapshot(name: str, revision: str | None, error: type[GuardError], **options: Any) -> Path:
    """The snapshot's folder; from the cache alone where the hub cannot be asked (also for a pinned commit).

    `options` go to the hub's client. Raises `error`.
    """
    from httpx import HTTPError
    from huggingface_hub import snapshot_download

    faults = (OSError, ValueError, HTTPError)
    try:
        return Path(snapshot_download(name, revision=revision, **options))
    except faults as fault:
        with suppress(*faults):
            return Path(snapshot_download(name, revision=revision, local_files_only=True, **options))
        raise error(f"{name}: not found on the hub ({type(fault).__name__}); give a local folder") from fault
