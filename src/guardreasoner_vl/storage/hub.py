"""Downloads folders from the model hub: models and data sets."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guardreasoner_vl.errors import GuardError


def snapshot(name: str, revision: str | None, error: type[GuardError], **options: Any) -> Path:
    """The folder of a hub snapshot, downloaded if needed; from the cache if the hub cannot be reached.

    `options` are passed to the hub's client. Raises `error` if neither has it.
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
