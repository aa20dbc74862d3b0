"""An estimate of the memory that training takes on one GPU, and the change of a recipe that makes it fit.

Computed from the shapes of the model and the recipe. Sizes of P parameters on n GPUs in bytes:

                             weights   gradients   AdamW       also
    bf16 (autocast), fp32    4 P       4 P         8 P         copies cast by autocast 2 P; SFT: buckets of DDP 4 P
    bf16-weights             2 P       2 P         12 P        AdamW includes the fp32 copies
    DeepSpeed, bf16          2 P       2 P         12 P        /n from ZeRO stage 3, 2 and 1 on; its buckets
    shard_weights            4 P / n   4 P / n     8 P / n     what a pass gathers, in the precision of computing

With `lora` the P frozen weights take 2 P (fp32: 4 P), and each weight of an adapter what `_OF_ADAPTER` says.
RL spreads AdamW over the GPUs. In DeepSpeed's step a GPU's share of the gradients is copied twice, flat and in fp32, in
stage 3 that of 10^9 weights at once. Answers to prompts of unequal length have a mask, for which transformers repeats
one layer's keys and values for each head (`use_gqa_in_sdpa`). Checkpointing keeps the residual stream of every layer,
and one layer at a time whole, when the logits are freed. The estimate is within 15% of the tensors' memory in small
runs on a CPU (`benchmarks/training_memory.py`); allocators, libraries and kernels take more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from guardreasoner_vl.engines.decoding import buffer_length
from guardreasoner_vl.errors import RecipeError
from guardreasoner_vl.recipe.base import Section
from guardreasoner_vl.recipe.model import TOKEN_PIXELS
from guardreasoner_vl.rl.shared_prefix import MOST_LOGITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from guardreasoner_vl.recipe import GrpoSection, MineSection, Precision, SftSection

ANSWER = 250
"""Tokens of an answer with reasoning, as assumed for logits and for the number of groups in a pass."""

_S = TypeVar("_S", bound=Section)
_Stage = TypeVar("_Stage", "SftSection", "GrpoSection")
_PATCHES_OF_TOKEN = 4
_OF_TRAINED = ("weights", "gradients", "AdamW", "DDP's buckets", "autocast copies")
_OF_ADAPTER = 4 + 4 + 8 + 2 + 4.0  # weight, gradient, AdamW, autocast's copy and DDP's buckets; less in `bf16-weights`
_OF_LOGIT = 2 + 4 + 4 + 4  # bf16, fp32, softmax, gradient
_VLLM_SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
_BUCKETS = 4e9  # DeepSpeed's for reducing and gathering, by its defaults
_SUB_GROUP = 1e9  # weights of a share that stage 3 updates at once, by its default


@dataclass(frozen=True)
class Stack:
    """A stack of transformer layers: their number, the hidden width, the widths of the MLP and of keys or of values.

    Numbers kept for a layer's backward pass were counted (`benchmarks/training_memory.py`).
    """

    layers: int
    hidden: int
    intermediate: int
    kv_width: int

    def between_layers(self, tokens: float, residual: int) -> float:
        """Bytes of what passes between the layers for `tokens`, at `residual` bytes a number."""
        return tokens * self.layers * self.hidden * residual

    def in_layer(self, tokens: float, element: int, residual: int) -> float:
        """Bytes that one layer keeps of `tokens`, at `element` bytes a number; norms keep more in bf16."""
        norms = 0 if element == 4 else 3 * residual * self.hidden
        return tokens * (element * (10 * self.hidden + 4 * self.intermediate + 5 * self.kv_width) + norms)

    def in_backward(self, tokens: float, element: int) -> float:
        """Bytes that one layer takes in its backward pass beside what it has kept."""
        return tokens * element * (self.hidden + 2 * self.intermediate)


@dataclass(frozen=True)
class ModelSize:
    """The shapes that decide memory: parameters, decoder, vision tower, and vocabulary.

    `layer` are the parameters of one decoder layer, `outside` those outside of layers, the tower's blocks and an untied
    input embedding, which FSDP gathers for a whole pass. `adapters` are the weights of LoRA's adapters, 0 without them.
    """

    parameters: int
    layer: int
    outside: int
    decoder: Stack
    tower: Stack
    vocabulary: int
    adapters: int = 0


Memory = dict[str, float]
"""Bytes of one GPU by what holds them."""


def of_sft(section: SftSection, size: ModelSize, gpus: int, max_pixels: int | None) -> Memory:
    """The memory of one optimizer step of SFT."""
    tokens = section.batch_size * section.max_length
    zero = _zero_stage(section)
    sharded = section.shard_weights and gpus > 1
    weight, element, residual = _bytes(section.precision, section.deepspeed is not None, sharded)
    parameters = size.parameters
    memory = {
        "weights": weight * parameters / (gpus if zero >= 3 or sharded else 1),
        "gradients": weight * parameters / (gpus if zero >= 2 or sharded else 1),
        "AdamW": _adamw(weight) * parameters / (gpus if zero >= 1 or sharded else 1),
    }
    if section.deepspeed:
        memory["DeepSpeed's buckets"] = min(_BUCKETS, 4 * parameters)
    elif gpus > 1 and not sharded:
        memory["DDP's buckets"] = weight * parameters
    if section.precision == "bf16" and not section.deepspeed and not sharded:
        memory["autocast copies"] = 2 * parameters
    a_pass = _Pass(
        tokens,
        patches=_patches(section.batch_size, tokens, max_pixels),
        logits=section.batch_size * ANSWER * size.vocabulary,
        checkpointing=section.gradient_checkpointing,
        sharded=sharded,
    )
    step = _of_zero_step(parameters, weight, zero, gpus) if section.deepspeed else _of_step(section.precision, size, 1)
    return {**memory, **a_pass.memory(size, element, residual, step)}


def of_update(section: GrpoSection, size: ModelSize, gpus: int, max_pixels: int | None) -> Memory:
    """The memory of an update of RL."""
    sharded = section.shard_weights and gpus > 1
    weight, element, residual = _bytes(section.precision, sharded=sharded)
    tokens = section.pass_tokens
    images = max(1, tokens // (section.group_size * ANSWER))
    a_pass = _Pass(
        tokens,
        patches=_patches(images, tokens, max_pixels),
        logits=min(tokens * size.vocabulary, MOST_LOGITS),
        checkpointing=section.gradient_checkpointing,
        sharded=sharded,
    )
    return {
        **_resident(section.precision, size, gpus, sharded),
        "gradients": weight * size.parameters / (gpus if sharded else 1),
        **a_pass.memory(size, element, residual, _of_step(section.precision, size, gpus)),
    }


def of_mining(section: MineSection, size: ModelSize) -> Memory:
    """The memory of the answers that one process generates at once, all of them as long as the limit, in bf16."""
    prompt = section.max_tokens // section.max_rows
    return {"weights": 2.0 * size.parameters, **_cache(section.max_rows, prompt, section.max_new_tokens, size, 2, 2)}


def of_rollouts(section: GrpoSection, size: ModelSize, gpus: int, rows: int, prompt: int) -> Memory:
    """The memory of `rows` answers at once, all of them as long as the limit; keys are fp32 under autocast.

    `prompt` are the tokens of each prompt. With rollouts by vLLM it is what the training holds meanwhile; add `of_vllm`
    for vLLM's share.
    """
    sharded = section.shard_weights and gpus > 1
    if section.rollouts.engine != "transformers":
        return _resident(section.precision, size, gpus, sharded)
    _, element, residual = _bytes(section.precision, sharded=sharded)
    cache = _cache(rows, prompt, section.max_completion_length, size, residual, element)
    memory = {**_resident(section.precision, size, gpus, sharded), **cache}
    return {**memory, "whole copy": float(element * size.parameters)} if sharded else memory


def _cache(rows: int, prompt: int, answer: int, size: ModelSize, key: int, value: int) -> Memory:
    """The buffers for `rows` answers; `key` and `value` are bytes of a number, `prompt` and `answer` tokens.

    One layer's keys and values are repeated for the heads; keys that have more bytes than values are then cast too.
    """
    tokens, decoder = buffer_length(prompt), size.decoder
    while tokens < prompt + answer:
        tokens = buffer_length(tokens + 1)
    memory = {"keys and values": float(rows * tokens * decoder.layers * decoder.kv_width * (key + value))}
    if decoder.kv_width < decoder.hidden:
        repeated = key + value + (value if key > value else 0)
        memory["repeated for the heads"] = float(rows * (prompt + answer) * decoder.hidden * repeated)
    return memory


def training_memory(work: Callable[[_Stage], Memory], section: _Stage, size: ModelSize) -> Memory:
    """The memory of `work`, which trains all weights, or adapters alone if the model has any.

    With adapters the other weights are frozen, in bf16 unless the precision is fp32, and activations have their dtype.
    """
    if not size.adapters:
        return work(section)
    exact = section.precision == "fp32"
    memory = work(section.model_copy(update={"precision": "fp32" if exact else "bf16-weights"}))
    others = {name: amount for name, amount in memory.items() if name not in _OF_TRAINED}
    weights = {"frozen weights": (4.0 if exact else 2.0) * size.parameters, "adapters": _OF_ADAPTER * size.adapters}
    return {**weights, **others}


def of_vllm(section: GrpoSection, gpu_memory: float) -> Memory:
    """What vLLM keeps of a GPU of `gpu_memory` bytes that it shares with the training."""
    rollouts = section.rollouts
    return {"vLLM": rollouts.gpu_memory_utilization * gpu_memory} if rollouts.engine == "vllm-colocate" else {}


def vllm_needs(section: GrpoSection, size: ModelSize) -> float:
    """The least that vLLM needs: bf16 weights, and keys and values of one prompt and answer of the greatest length."""
    tokens = section.max_prompt_length + section.max_completion_length
    return 2.0 * (size.parameters + 2 * tokens * size.decoder.layers * size.decoder.kv_width)


def sft_remedy(section: SftSection, fits: Callable[[SftSection], bool], size: ModelSize, gpus: int) -> str | None:
    """The first change of `sft` that makes it fit, in words; None if none does."""
    changes: list[tuple[str, dict[str, Any]]] = [("gradient_checkpointing: true", {"gradient_checkpointing": True})]
    if section.deepspeed and gpus == 1:
        alone = {"deepspeed": None, "precision": "bf16-weights"}
        changes.append(("deepspeed: null and sft.precision: bf16-weights", alone))
    elif section.deepspeed:
        for stage in range(_zero_stage(section) + 1, 4):
            settings = section.deepspeed | {"zero_optimization": {"stage": stage}}
            changes.append((f"deepspeed.zero_optimization.stage: {stage}", {"deepspeed": settings}))
    elif not size.adapters:
        changes.append(_lighter_weights(section, "sft", gpus))
    changes += [(f"batch_size: {rows}", {"batch_size": rows}) for rows in _halves(section.batch_size)]
    return _first(section, changes, fits, "sft")


def mining_remedy(section: MineSection, fits: Callable[[MineSection], bool]) -> str | None:
    """The first change of `mine` that makes it fit, in words; None if none does."""
    changes: list[tuple[str, dict[str, Any]]] = [
        # As many tokens for each prompt as before.
        (f"max_rows: {rows} and mine.max_tokens: {tokens}", {"max_rows": rows, "max_tokens": tokens})
        for rows, tokens in zip(_halves(section.max_rows), _halves(section.max_tokens), strict=False)
    ]
    return _first(section, changes, fits, "mine")


def grpo_remedy(section: GrpoSection, fits: Callable[[GrpoSection], bool], size: ModelSize, gpus: int) -> str | None:
    """The first change of `grpo` that makes it fit, in words; None if none does."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("gradient_checkpointing: true", {"gradient_checkpointing": True}),
        *((f"pass_tokens: {tokens}", {"pass_tokens": tokens}) for tokens in _halves(section.pass_tokens, 4096)),
    ]
    if not size.adapters:
        changes.append(_lighter_weights(section, "grpo", gpus))
    rollouts = section.rollouts
    if rollouts.engine == "vllm-colocate":
        for share in _VLLM_SHARES:
            changed = rollouts.model_copy(update={"gpu_memory_utilization": share})
            changes.append((f"rollouts.gpu_memory_utilization: {share}", {"rollouts": changed}))
    elif rollouts.engine == "transformers":
        for rows, tokens in zip(_halves(rollouts.max_rows), _halves(rollouts.max_tokens), strict=False):
            changed = rollouts.model_copy(update={"max_rows": rows, "max_tokens": tokens})
            words = f"rollouts.max_rows: {rows} and grpo.rollouts.max_tokens: {tokens}"
            changes.append((words, {"rollouts": changed}))
        lengths = _halves(section.max_completion_length, 256)
        changes += [(f"max_completion_length: {tokens}", {"max_completion_length": tokens}) for tokens in lengths]
    return _first(section, changes, fits, "grpo")


def _first(
    section: _S, changes: Sequence[tuple[str, Mapping[str, Any]]], fits: Callable[[_S], bool], name: str
) -> str | None:
    """The first change that makes the section fit alone, else the first changes that do so together."""
    for words, change in changes:
        if fits(section.model_copy(update=change)):
            return f"{name}.{words}"
    changed, all_words = section, dict[str, str]()
    for words, change in changes:
        if any(getattr(changed, key) != value for key, value in change.items()):
            changed = changed.model_copy(update=change)
            all_words[words.partition(":")[0]] = f"{name}.{words}"
        if fits(changed):
            return " and ".join(all_words.values())
    return None


def _lighter_weights(section: SftSection | GrpoSection, name: str, gpus: int) -> tuple[str, dict[str, Any]]:
    """Weights in shards on several GPUs, in bf16 on one; a recipe cannot have both."""
    if gpus > 1:
        words, change = "shard_weights: true", {"shard_weights": True}
        if section.precision == "bf16-weights":
            return f"{words} and {name}.precision: bf16", {**change, "precision": "bf16"}
        return words, change
    words, precision = "precision: bf16-weights", {"precision": "bf16-weights"}
    if section.shard_weights:
        return f"{words} and {name}.shard_weights: false", {**precision, "shard_weights": False}
    return words, precision


def _halves(count: int, least: int = 1) -> Iterator[int]:
    while count // 2 >= least:
        count //= 2
        yield count


def _zero_stage(section: SftSection) -> int:
    settings = (section.deepspeed or {}).get("zero_optimization", {})
    stage = settings.get("stage", 0) if isinstance(settings, dict) else None
    if stage not in (0, 1, 2, 3):
        raise RecipeError("sft.deepspeed.zero_optimization.stage is not a stage of ZeRO: write 0, 1, 2 or 3")
    return int(stage)


def _bytes(precision: Precision, deepspeed: bool = False, sharded: bool = False) -> tuple[int, int, int]:
    """Bytes of a weight, of a number in a layer, and of one in the residual stream."""
    if precision == "fp32":
        return 4, 4, 4
    if sharded:
        return 4, 2, 2
    return (2, 2, 2) if deepspeed or precision == "bf16-weights" else (4, 2, 4)


def _of_step(precision: Precision, size: ModelSize, gpus: int) -> float:
    """What the optimizer's step takes for itself: fp32 copies of the gradients of weights that are not fp32."""
    return 4 * (size.adapters or size.parameters) / gpus if precision == "bf16-weights" else 0


def _of_zero_step(parameters: int, weight: int, zero: int, gpus: int) -> float:
    """What DeepSpeed's step takes for itself: the share's gradients, flat, and in fp32 if they are not."""
    share = parameters / (gpus if zero else 1)
    return (4 if weight == 4 else weight + 4) * (min(share, _SUB_GROUP) if zero == 3 else share)


def _adamw(weight: int) -> int:
    """Bytes of AdamW's state: two fp32 moments, and an fp32 copy of weights that are not fp32."""
    return 8 if weight == 4 else 12


def _resident(precision: Precision, size: ModelSize, gpus: int, sharded: bool) -> Memory:
    """What RL holds all the time."""
    weight, _, _ = _bytes(precision)
    weights = weight * size.parameters / (gpus if sharded else 1)
    memory = {"weights": weights, "AdamW": _adamw(weight) * size.parameters / gpus}
    return {**memory, "autocast copies": 2.0 * size.parameters} if precision == "bf16" and not sharded else memory


@dataclass(frozen=True)
class _Pass:
    """A forward and backward pass: its tokens, patches of images, and logits."""

    tokens: int
    patches: int
    logits: int
    checkpointing: bool
    sharded: bool

    def memory(self, size: ModelSize, element: int, residual: int, step: float) -> Memory:
        """The bytes at the peak: in one layer's backward pass, at the logits, or in the step, which takes `step`."""
        stacks = ((size.decoder, self.tokens), (size.tower, self.patches))
        layers = [stack.in_backward(count, element) for stack, count in stacks]
        if self.checkpointing:
            kept = sum(stack.between_layers(count, residual) for stack, count in stacks)
            again = [stack.in_layer(count, element, residual) for stack, count in stacks]
            layer = max(map(sum, zip(layers, again, strict=True)))
        else:
            kept = sum(stack.layers * stack.in_layer(count, element, residual) for stack, count in stacks)
            layer = max(layers)
        gathered: Memory = {}
        if self.sharded:  # weights of two layers and `outside`; gradients of one layer, in fp32 too, and `outside`
            gathered["gathered weights"] = element * (2 * size.layer + size.outside)
            layer += element * (size.layer + size.outside) + 4 * size.layer
        largest = max(layer, self.logits * _OF_LOGIT, step - kept)
        return {**gathered, "activations": kept, "one layer, the logits or the step": largest}


def _patches(images: int, tokens: int, max_pixels: int | None) -> int:
    """Patches of the largest images, whose tokens are among `tokens`."""
    largest = tokens if max_pixels is None else min(tokens, images * max_pixels // TOKEN_PIXELS)
    return _PATCHES_OF_TOKEN * largest
