"""Downloads folders from the model hub, models and data sets, and uploads them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from guardreasoner_vl.errors import DataError, InputError

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
        raise error(f"{name}: {_download_failure(fault)}, or give a local folder") from fault


def _download_failure(fault: Exception) -> str:
    """Why the hub did not give a snapshot, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(fault, GatedRepoError):
        return "its owner restricts access: accept the terms on the hub and log in with `hf auth login`"
    if isinstance(fault, RepositoryNotFoundError | RevisionNotFoundError | HFValidationError):
        return "no such repository or revision on the hub, or a private one: check it, log in with `hf auth login`"
    if constants.HF_HUB_OFFLINE:
        return "not in the cache, and HF_HUB_OFFLINE is set: unset it"
    return f"the hub cannot be reached ({type(fault).__name__}): check the network"


def check_repo_id(name: str) -> None:
    """Raise `InputError` if the hub can have no repository of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as fault:
        raise InputError(f"{name!r:.100}: no name of a repository; give owner/name") from fault


def upload(folder: Path, name: str, kind: Literal["model", "dataset"], private: bool) -> str:
    """Upload all files of the folder in one commit to the repository, made if needed; returns its address.

    A public repository is not made private: with `private`, nothing is uploaded to it. Raises
    `DataError`.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = str(api.create_repo(name, repo_type=kind, private=private or None, exist_ok=True))
        if private and not api.repo_info(name, repo_type=kind).private:
            raise DataError(f"{name}: exists and is public; make it private on the hub, or give another name")
        api.upload_folder(repo_id=name, folder_path=folder, repo_type=kind, commit_message="Upload by guardreasoner-vl")
    except (OSError, ValueError, HTTPError) as fault:
        raise DataError(
            f"{name}: the hub refused ({type(fault).__name__}); log in with `hf auth login`, check the name, try again"
        ) from fault
    return address
