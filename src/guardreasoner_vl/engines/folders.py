"""Where a model's files are: the embedded guard, a local folder, or a hub id."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path

from guardreasoner_vl.errors import ModelError
from guardreasoner_vl.types import ModelInfo

EMBEDDED = "embedded"
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.jinja")
_DIGEST_HEAD = 1 << 20


def resolve_folder(model: str, revision: str | None = None) -> Path:
    """A local folder with a complete model; downloads a hub id. Raises `ModelError` with the remedy."""
    if model == EMBEDDED:
        return Path(str(files("guardreasoner_vl") / "embedded"))
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ModelError(f"{model}: no such folder; give 'embedded', a model folder, or a hub id such as owner/name")
    return _download(model, revision)


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(_WANTED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{model}: not found on the hub ({type(error).__name__}); give a local folder") from error


def check_folder(folder: Path) -> dict[str, object]:
    """The model's configuration; raises `ModelError` unless it is a Qwen2.5-VL with safetensors weights."""
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder}: no config.json; give the folder of a complete Qwen2.5-VL model")
    try:
        content: dict[str, object] = json.loads(config.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{config}: not JSON; download the model again") from error
    if content.get("model_type") != "qwen2_5_vl":
        raise ModelError(
            f"{folder}: a model of type {content.get('model_type')!r}; this engine runs the Qwen2.5-VL family, "
            "others go through --engine openai"
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: no .safetensors weights; convert or download them (pickled weights are not read)")
    return content


def model_info(model: str, folder: Path, revision: str | None = None) -> ModelInfo:
    """Name and revision; a local folder's revision is a digest of its weights' heads and sizes."""
    if revision is None and not Path(model).expanduser().is_dir() and model != EMBEDDED:
        revision = folder.name
    return ModelInfo(name=model, revision=revision or _digest(folder))


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as weights:
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            digest.update(weights.read(_DIGEST_HEAD))
            weights.seek(-min(_DIGEST_HEAD, path.stat().st_size), 2)
            digest.update(weights.read(_DIGEST_HEAD))
    return digest.hexdigest()[:12]
