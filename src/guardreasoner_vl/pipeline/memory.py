"""An estimate of the memory that training takes on one GPU, and the change of a recipe that makes it fit.

Computed from the shapes of the model and the recipe, never measured. Sizes of P parameters on n GPUs in bytes:

                             weights   gradients   AdamW       also
    bf16 (autocast), fp32    4 P       4 P         8 P         copies cast by autocast 2 P; SFT: buckets of DDP 4 P
    bf16-weights             2 P       2 P         12 P        AdamW includes the fp32 copies
    DeepSpeed, bf16          2 P       2 P         12 P        /n from ZeRO stage 3, 2 and 1 on; its buckets

RL spreads AdamW over the GPUs. Checkpointing keeps the residual stream of every layer, and one layer at a time whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from guardreasoner_vl.engines.jobs import MAX_TOKENS
from guardreasoner_vl.recipe.base import Section
from guardreasoner_vl.recipe.model import TOKEN_PIXELS
from guardreasoner_vl.rl.shared_prefix import MOST_LOGITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from guardreasoner_vl.recipe import GrpoSection, Precision, SftSection

ANSWER = 250
"""Tokens of an answer with reasoning, as assumed for logits and for the number of groups in a pass."""

_S = TypeVar("_S", bound=Section)
_PATCHES_OF_TOKEN = 4
_OF_LOGIT = 2 + 4 + 4 + 4  # bf16, fp32, softmax, gradient
_BUCKETS = 4e9  # DeepSpeed's for reducing and gathering, by its defaults


@dataclass(frozen=True)
class Stack:
    """A stack of transformer layers: their number, the hidden width, and the width of the MLP."""

    layers: int
    hidden: int
    intermediate: int

    def activations(self, tokens: float, checkpointing: bool, element: int, residual: int) -> float:
        """Bytes for `tokens`; `element` and `residual` are the bytes of a number in a layer and between layers."""
        kept = tokens * self.layers * self.hidden * residual
        whole = tokens * (element * (6 * self.hidden + 4 * self.intermediate) + 8 * self.hidden)
        return kept + whole * (1 if checkpointing else self.layers)


@dataclass(frozen=True)
class ModelSize:
    """The shapes that decide memory: parameters, decoder, vision tower, vocabulary, and width of keys or of values."""

    parameters: int
    decoder: Stack
    tower: Stack
    vocabulary: int
    kv_width: int


Memory = dict[str, float]
"""Bytes of one GPU by what holds them."""


def of_sft(section: SftSection, size: ModelSize, gpus: int, max_pixels: int | None) -> Memory:
    """The memory of one optimizer step of SFT."""
    tokens = section.batch_size * section.max_length
    zero = _zero_stage(section)
    weight, element, residual = _bytes(section.precision, section.deepspeed is not None)
    parameters = size.parameters
    memory = {
        "weights": weight * parameters / (gpus if zero >= 3 else 1),
        "gradients": weight * parameters / (gpus if zero >= 2 else 1),
        "AdamW": _adamw(weight) * parameters / (gpus if zero >= 1 else 1),
    }
    if section.deepspeed:
        memory["DeepSpeed's buckets"] = min(_BUCKETS, 4 * parameters)
    elif gpus > 1:
        memory["DDP's buckets"] = weight * parameters
    if section.precision == "bf16" and not section.deepspeed:
        memory["autocast copies"] = 2 * parameters
    return {
        **memory,
        "activations": size.decoder.activations(tokens, section.gradient_checkpointing, element, residual)
        + _tower(size, section.batch_size, tokens, max_pixels, section.gradient_checkpointing, element, residual),
        "logits": section.batch_size * ANSWER * size.vocabulary * _OF_LOGIT,
    }


def of_update(section: GrpoSection, size: ModelSize, gpus: int, max_pixels: int | None) -> Memory:
    """The memory of an update of RL."""
    weight, element, residual = _bytes(section.precision)
    tokens = section.pass_tokens
    images = max(1, tokens // (section.group_size * ANSWER))
    return {
        **_resident(section.precision, size, gpus),
        "gradients": weight * size.parameters,
        "activations": size.decoder.activations(tokens, section.gradient_checkpointing, element, residual)
        + _tower(size, images, tokens, max_pixels, section.gradient_checkpointing, element, residual),
        "logits": min(tokens * size.vocabulary, MOST_LOGITS) * _OF_LOGIT,
    }


def of_rollouts(section: GrpoSection, size: ModelSize, gpus: int, rows: int) -> Memory:
    """The memory of `rows` answers at once, all of them as long as the limit; keys are fp32 under autocast."""
    _, element, residual = _bytes(section.precision)
    tokens = MAX_TOKENS + rows * section.max_completion_length
    cache = tokens * size.decoder.layers * size.kv_width * (residual + element)
    return {**_resident(section.precision, size, gpus), "keys and values": cache}


def sft_remedy(section: SftSection, fits: Callable[[SftSection], bool], gpus: int) -> str | None:
    """The first change of `sft` that makes it fit, in words; None if none does."""
    changes: list[tuple[str, dict[str, Any]]] = [("gradient_checkpointing: true", {"gradient_checkpointing": True})]
    if gpus == 1:
        changes.append(("precision: bf16-weights", {"precision": "bf16-weights", "deepspeed": None}))
    else:
        for stage in range(_zero_stage(section) + 1, 4):
            settings = (section.deepspeed or {}) | {"zero_optimization": {"stage": stage}}
            changes.append((f"deepspeed.zero_optimization.stage: {stage}", {"deepspeed": settings}))
    changes += [(f"batch_size: {rows}", {"batch_size": rows}) for rows in _halves(section.batch_size)]
    return _first(section, changes, fits, "sft")


def grpo_remedy(section: GrpoSection, fits: Callable[[GrpoSection], bool]) -> str | None:
    """The first change of `grpo` that makes it fit, in words; None if none does."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("gradient_checkpointing: true", {"gradient_checkpointing": True}),
        *((f"pass_tokens: {tokens}", {"pass_tokens": tokens}) for tokens in _halves(section.pass_tokens, 4096)),
        ("precision: bf16-weights", {"precision": "bf16-weights"}),
    ]
    return _first(section, changes, fits, "grpo")


def _first(
    section: _S, changes: Sequence[tuple[str, Mapping[str, Any]]], fits: Callable[[_S], bool], name: str
) -> str | None:
    """The first change that makes the section fit alone, else the first changes that do so together."""
    for words, change in changes:
        if fits(section.model_copy(update=change)):
            return f"{name}.{words}"
    changed, all_words = section, []
    for words, change in changes:
        changed = changed.model_copy(update=change)
        all_words.append(f"{name}.{words}")
        if fits(changed):
            return " and ".join(all_words)
    return None


def _halves(count: int, least: int = 1) -> Iterator[int]:
    while count // 2 >= least:
        count //= 2
        yield count


def _zero_stage(section: SftSection) -> int:
    return int((section.deepspeed or {}).get("zero_optimization", {}).get("stage", 0))


def _bytes(precision: Precision, deepspeed: bool = False) -> tuple[int, int, int]:
    """Bytes of a weight, of a number in a layer, and of one in the residual stream."""
    if precision == "fp32":
        return 4, 4, 4
    return (2, 2, 2) if deepspeed or precision == "bf16-weights" else (4, 2, 4)


def _adamw(weight: int) -> int:
    """Bytes of AdamW's state: two fp32 moments, and an fp32 copy of weights that are not fp32."""
    return 8 if weight == 4 else 12


def _resident(precision: Precision, size: ModelSize, gpus: int) -> Memory:
    """What RL holds all the time."""
    weight, _, _ = _bytes(precision)
    memory = {"weights": weight * size.parameters, "AdamW": _adamw(weight) * size.parameters / gpus}
    return {**memory, "autocast copies": 2.0 * size.parameters} if precision == "bf16" else memory


def _tower(
    size: ModelSize, images: int, tokens: int, max_pixels: int | None, checkpointing: bool, element: int, residual: int
) -> float:
    """Activations of the vision tower for the largest images, whose tokens are among `tokens`."""
    largest = tokens if max_pixels is None else min(tokens, images * max_pixels // TOKEN_PIXELS)
    return size.tower.activations(_PATCHES_OF_TOKEN * largest, checkpointing, element, residual)
