"""Compacts a model folder to half its size, matrices as int8 with a scale per row (`engines.int8`), or expands it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from guardreasoner_vl.engines.int8 import INT8_WEIGHTS, METADATA, SCALE, dequantised, is_int8, quantised, read_int8
from guardreasoner_vl.engines.model_files import WEIGHTS, check_folder, weight_files
from guardreasoner_vl.errors import ModelError, reason_of
from guardreasoner_vl.training.model_folder import check_new, copy_texts, emptied, move, written

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


@dataclass(frozen=True)
class CompactReport:
    """Bytes of the weights before and after, and the RMS error that int8 adds, relative to the matrices' RMS."""

    before: int
    after: int
    error: float = 0.0


def compact(source: Path, target: Path) -> CompactReport:
    """Write `target`, a copy of the folder `source` with int8 matrices; the output is deterministic.

    The original may have several weight files; the copy has one, which is held in memory. Raises `ModelError` for a
    folder that is no Qwen2.5-VL, is broken, or is quantised already, `InputError` if `target` exists and is not empty,
    `DataError` if the disk is full.
    """
    tied = _check_model_folders(source, target)
    if is_int8(source):
        raise ModelError(f"{source}: its weights are stored as int8 already; --expand gives bf16")
    files = weight_files(source)
    with _model_errors(source):
        weights, error = _quantised_tensors(files)
    if tied:
        _drop_second_embedding(weights)
    _write_weights(weights, METADATA, INT8_WEIGHTS, source, target)
    return CompactReport(sum(map(_file_size, files)), _file_size(target / INT8_WEIGHTS), error)


def expand(source: Path, target: Path) -> CompactReport:
    """The inverse: write `target` with bf16 weights in the standard format. Raises the same errors as `compact`."""
    _check_model_folders(source, target)
    if not is_int8(source):
        raise ModelError(f"{source}: its weights are not stored as int8; use the folder as it is")
    with _model_errors(source):
        weights = read_int8(source, torch.bfloat16)
    _write_weights(weights, {"format": "pt"}, WEIGHTS, source, target)
    return CompactReport(_file_size(source / INT8_WEIGHTS), _file_size(target / WEIGHTS))


def _check_model_folders(source: Path, target: Path) -> bool:
    """Raises unless both folders are usable; returns whether the language head is tied to the embedding."""
    config = check_folder(source)
    if "quantization_config" in config:
        raise ModelError(f"{source}: quantised by another scheme; give the model that it was made from")
    check_new(target)
    text = config.get("text_config")
    return bool(config.get("tie_word_embeddings") or (isinstance(text, dict) and text.get("tie_word_embeddings")))


def _quantised_tensors(files: Sequence[Path]) -> tuple[dict[str, torch.Tensor], float]:
    """The tensors to store, and the relative error of the matrices."""
    weights: dict[str, torch.Tensor] = {}
    wrong = whole = 0.0
    for path in files:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                weight = file.get_tensor(name).float()
                if not weight.isfinite().all():
                    raise ModelError(f"{path}: {name:.80} holds NaN or infinity; train or download it again")
                if weight.dim() != 2:
                    weights[name] = weight.to(torch.bfloat16)
                    continue
                numbers, scale = quantised(weight)
                weights[name], weights[name + SCALE] = numbers, scale
                wrong += float((dequantised(numbers, scale, torch.float32) - weight).square().sum(dtype=torch.float64))
                whole += float(weight.square().sum(dtype=torch.float64))
    return weights, (wrong / whole) ** 0.5 if whole else 0.0


def _drop_second_embedding(weights: dict[str, torch.Tensor]) -> None:
    """Remove a tied head that equals the stored embedding; one that differs stays, as in transformers."""
    embedding = next((name for name in weights if name.endswith(_EMBEDDING)), None)
    if embedding and _HEAD in weights:
        pairs = [(_HEAD + ending, embedding + ending) for ending in ("", SCALE)]
        if all(torch.equal(weights[head], weights[kept]) for head, kept in pairs):
            for head, _ in pairs:
                del weights[head]


def _write_weights(
    weights: dict[str, torch.Tensor], metadata: dict[str, str], name: str, source: Path, target: Path
) -> None:
    with written(target, resumes="from the start"):
        partial = emptied(target)
        save_file(weights, partial / name, metadata)
        copy_texts(source, partial)
        move(partial, target)


@contextmanager
def _model_errors(source: Path) -> Iterator[None]:
    """Convert any error of reading a broken file to `ModelError`."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{source}: its weights cannot be read ({reason_of(error)}); download it again") from error


def _file_size(path: Path) -> int:
    return path.stat().st_size
