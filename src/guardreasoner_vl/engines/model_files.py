"""Finds and checks a model's files: the embedded guard, a local folder, or a hub id."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import ModelError
from guardreasoner_vl.storage.hub import snapshot
from guardreasoner_vl.types import ModelInfo

if TYPE_CHECKING:
    from collections.abc import Mapping

EMBEDDED = "embedded"
WEIGHTS = "model.safetensors"
CALIBRATION = "calibration.json"
"""The file in a model's folder that holds the calibration which `calibrate` measured."""

PROCESSOR = "preprocessor_config.json"
"""The file in a model's folder that holds the image processor's settings, the limits on images among them."""

_DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.jinja")
_ACCEPTED = "give 'embedded', a model folder, or a hub id such as owner/name"
_DIGEST_HEAD = 1 << 20


def resolve_folder(model: str, revision: str | None = None) -> Path:
    """The local folder of a model; a hub id is downloaded. Raises `ModelError` with the remedy."""
    if model == EMBEDDED:
        return Path(str(files("guardreasoner_vl") / "embedded"))
    try:
        folder = Path(model).expanduser()
        is_folder = folder.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # no such user, a NUL, a name too long
        raise ModelError(f"{model[:80]!r}: not a path; {_ACCEPTED}") from error
    if is_folder:
        return folder
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ModelError(f"{model}: no such folder; {_ACCEPTED}")
    return snapshot(model, revision, ModelError, allow_patterns=list(_DOWNLOADED))


def check_folder(folder: Path) -> dict[str, Any]:
    """The model's configuration; raises `ModelError` unless it is a Qwen2.5-VL with safetensors weights."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; give the folder of a complete Qwen2.5-VL model")
    content = json_object(folder / "config.json")
    if content.get("model_type") != "qwen2_5_vl":
        raise ModelError(
            f"{folder}: a model of type {content.get('model_type')!r}; this engine runs only the Qwen2.5-VL family, "
            "use --engine openai for others"
        )
    parts = _weight_map(folder)
    pickled = not isinstance(parts, dict) or not all(str(part).endswith(".safetensors") for part in parts.values())
    if pickled or not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: no .safetensors weights; convert or download them (pickled weights are not read)")
    return content


def context_length(config: Mapping[str, object]) -> int:
    """The longest context in tokens that a model's configuration states. Raises `ModelError`."""
    text = config.get("text_config")
    for section in (text if isinstance(text, dict) else {}, config):
        if isinstance(positions := section.get("max_position_embeddings"), int):
            return positions
    raise ModelError("config.json names no max_position_embeddings; download the model again")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, for a folder that `check_folder` accepts."""
    parts, whole = _weight_map(folder), folder / WEIGHTS
    named = {folder / str(part) for part in parts.values()} if isinstance(parts, dict) else set()
    return [whole] if whole.is_file() or not named else sorted(named)


def _weight_map(folder: Path) -> object:
    """Maps each weight to the file that holds it; empty if the folder has no index."""
    index = folder / f"{WEIGHTS}.index.json"
    return json_object(index).get("weight_map") if index.is_file() else {}


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a model's file. Raises `ModelError`."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON; download the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not a JSON object; download the model again")
    return content


def model_info(model: str, folder: Path, revision: str | None = None, adapter: Path | None = None) -> ModelInfo:
    """The model's name and revision, `weights_digest` for a local folder; an adapter adds its digest to it.

    A model that cannot read the words of images has `"transcribes_images": false` in its config.json.
    """
    if revision is None and not Path(model).expanduser().is_dir() and model != EMBEDDED:
        revision = folder.name
    revision = revision or weights_digest(folder)
    return ModelInfo(
        name=model,
        revision=f"{revision}+{folder_digest(adapter)}" if adapter else revision,
        transcribes=json_object(folder / "config.json").get("transcribes_images") is not False,
    )


def folder_digest(folder: Path) -> str:
    """A digest of the model's weights, tokenizer, processor and settings: 16 hexadecimal digits."""
    digest = hashlib.sha256(weights_digest(folder).encode())
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".txt", ".jinja")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def weights_digest(folder: Path) -> str:
    """A digest of the weight files' sizes, first bytes and last bytes: 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as weights:
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            digest.update(weights.read(_DIGEST_HEAD))
            weights.seek(-min(_DIGEST_HEAD, path.stat().st_size), 2)
            digest.update(weights.read(_DIGEST_HEAD))
    return digest.hexdigest()[:12]
