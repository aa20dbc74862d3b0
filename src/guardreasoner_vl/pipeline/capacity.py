"""How many GPUs a guard needs: a roofline, computed from shapes and published figures; nothing is measured.

A GPU computes at most F FLOP/s and reads at most W bytes/s from its memory; of both only a share u is reached
(`utilisation`). A request reads a prompt of P tokens, C of them cached, and generates T tokens. With M weights in the
decoder's matrices, H in the language head, L layers of width h, and k bytes of keys and values for each token:

    prefill  = (2 M (P - C) + 4 L h (sum of C+1 ... P) + 2 H + images) / (u F)
    step(B)  = max(B (2 (M + H) + 4 L h c) / (u F), (2 (M + H) + B c k) / (u W)),   c = P + T / 2
    requests per second = 1 / (prefill + (T - 1) step(B) / B)

B is the number of requests at once: as many as the memory holds beside the weights (the cached prefix once), and at
most the server's limit. Weights, keys and values have two bytes. Of the vision tower only the matrices are counted.
The roofline is that of Williams, Waterman and Patterson, doi 10.1145/1498765.1498785.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.pipeline.shapes import BASE_3B, BASE_7B, BASES

if TYPE_CHECKING:
    from collections.abc import Mapping

USABLE = 0.9
"""The share of a GPU's memory for weights, keys and values; vLLM's default (`gpu_memory_utilization`)."""

_BYTES = 2
_PATCHES = 4  # of one image token
_PATCH_VALUES = 3 * 2 * 14 * 14
_DAY = 86_400

Saturates = Literal["arithmetic", "bandwidth", "memory", "concurrency"]
"""What limits a GPU's requests per second: FLOP/s, bytes/s, its memory for requests at once, or the limit on them."""


@dataclass(frozen=True)
class Device:
    """A GPU: dense bf16 FLOP/s, memory bandwidth in bytes/s, memory in bytes, and who published these figures."""

    flops: float
    bandwidth: float
    memory: float
    source: str


DEVICES: dict[str, Device] = {
    "l4": Device(121e12, 300e9, 24e9, "NVIDIA L4 datasheet"),
    "a10": Device(125e12, 600e9, 24e9, "NVIDIA A10 datasheet"),
    "rtx-4090": Device(165.2e12, 1008e9, 24e9, "NVIDIA Ada GPU architecture whitepaper"),
    "l40s": Device(362.05e12, 864e9, 48e9, "NVIDIA L40S datasheet"),
    "a100": Device(312e12, 2039e9, 80e9, "NVIDIA A100 80GB SXM datasheet"),
    "h100": Device(989.5e12, 3350e9, 80e9, "NVIDIA H100 SXM datasheet"),
    "h200": Device(989.5e12, 4800e9, 141e9, "NVIDIA H200 SXM datasheet"),
    "b200": Device(2250e12, 8000e9, 180e9, "NVIDIA DGX B200 datasheet, one GPU of eight"),
    "mi300x": Device(1307.4e12, 5300e9, 192e9, "AMD Instinct MI300X data sheet"),
}
"""Published peaks without sparsity; a datasheet that gives bf16 with sparsity is halved."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Qwen2.5-VL that decide its costs."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int

    @property
    def keys(self) -> int:
        """The width of a token's keys, and of its values, in one layer."""
        return self.kv_heads * self.hidden // self.heads

    @property
    def matrices(self) -> int:
        """Weights of the decoder's layers, which every token passes."""
        attention = self.hidden * (2 * self.hidden + 2 * self.keys)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        """Weights of the language head."""
        return self.vocabulary * self.hidden

    @property
    def patch_weights(self) -> int:
        """Weights of the vision tower that every patch passes."""
        block = self.vision_hidden * (4 * self.vision_hidden + 3 * self.vision_intermediate)
        return self.vision_layers * block + _PATCH_VALUES * self.vision_hidden

    @property
    def merger(self) -> int:
        """Weights that turn four patches into one image token."""
        wide = _PATCHES * self.vision_hidden
        return wide * (wide + self.hidden)

    @property
    def weights(self) -> int:
        """All weights of matrices."""
        return self.matrices + self.head * (1 if self.tied else 2) + self.patch_weights + self.merger

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values for one token."""
        return 2 * self.layers * self.keys * _BYTES


@dataclass(frozen=True)
class Work:
    """One request in tokens: text of the prompt (the cached part included), image, generated."""

    prompt: int = 350
    completion: int = 220
    image: int = 0
    cached: int = 118

    def __post_init__(self) -> None:
        if not 0 <= self.cached < self.prompt:
            raise InputError(f"{self.cached} of {self.prompt} prompt tokens are cached: give fewer cached tokens")

    @property
    def context(self) -> int:
        """Tokens that are read before the first one is generated."""
        return self.prompt + self.image


@dataclass(frozen=True)
class Capacity:
    """What one GPU can do with `batch` requests at once. `prefill` and `decode` are the seconds that it spends on one
    request; `alone` is the time in seconds of a request that has the GPU for itself."""

    batch: int
    prefill: float
    decode: float
    alone: float
    saturates: Saturates

    @property
    def per_second(self) -> float:
        """Requests per second when the GPU is never idle."""
        return 1 / (self.prefill + self.decode)

    @property
    def bound(self) -> Literal["prefill", "decode"]:
        """Which of the two takes longer."""
        return "prefill" if self.prefill >= self.decode else "decode"


def capacity(shape: ModelShape, device: Device, work: Work, utilisation: float, concurrency: int) -> Capacity | None:
    """What the device can do with at most `concurrency` requests at once; None if model and request do not fit."""
    kv_of_request = (work.context - work.cached + work.completion) * shape.kv_bytes
    free = USABLE * device.memory - shape.weights * _BYTES - work.cached * shape.kv_bytes
    fitting = math.floor(free / kv_of_request)
    if fitting < 1:
        return None
    batch = min(concurrency, fitting)
    flops, bandwidth = utilisation * device.flops, utilisation * device.bandwidth
    steps, context = work.completion - 1, work.context + work.completion / 2
    attention = 4 * shape.layers * shape.hidden
    token_flops = 2 * (shape.matrices + shape.head) + attention * context
    weight_bytes = (shape.matrices + shape.head) * _BYTES

    def step(requests: int) -> float:
        traffic = weight_bytes + requests * context * shape.kv_bytes
        return max(requests * token_flops / flops, traffic / bandwidth)

    prefill = prefill_flops(shape, work) / flops
    decode = steps * step(batch) / batch
    saturates: Saturates = "bandwidth"
    if prefill >= decode or batch * token_flops / flops >= step(batch):
        saturates = "arithmetic"
    elif weight_bytes > batch * context * shape.kv_bytes:  # more requests would share the reading of the weights
        saturates = "memory" if fitting <= concurrency else "concurrency"
    return Capacity(batch, prefill, decode, prefill + steps * step(1), saturates)


def prefill_flops(shape: ModelShape, work: Work) -> int:
    """FLOPs until a request's first generated token, its image included."""
    new = work.context - work.cached
    pairs = (work.context * (work.context + 1) - work.cached * (work.cached + 1)) // 2
    image = work.image * 2 * (_PATCHES * shape.patch_weights + shape.merger)
    return 2 * shape.matrices * new + 4 * shape.layers * shape.hidden * pairs + 2 * shape.head + image


def gpus_for(per_second: float, per_day: float, peak: float) -> int:
    """GPUs for `per_day` requests, if the busiest second has `peak` times the average."""
    return math.ceil(per_day * peak / _DAY / per_second)


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a model's `config.json` states. Raises `InputError` if a size is missing."""
    text, vision = config.get("text_config") or config, config.get("vision_config") or {}
    try:
        return ModelShape(
            text["num_hidden_layers"],
            text["hidden_size"],
            text["intermediate_size"],
            text["num_attention_heads"],
            text["num_key_value_heads"],
            text["vocab_size"],
            bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            vision["depth"],
            vision["hidden_size"],
            vision["intermediate_size"],
        )
    except KeyError as error:
        raise InputError(f"config.json has no {error.args[0]}: give a complete Qwen2.5-VL folder, 3b or 7b") from error


SHAPES = {"3b": shape_of(BASES[BASE_3B]), "7b": shape_of(BASES[BASE_7B])}
"""The shapes of the paper's two models, by name."""


def device_of(name: str) -> Device:
    """A GPU by its name in `DEVICES`, or 'TFLOPS,GB/S,GB' for another one. Raises `InputError`."""
    if name in DEVICES:
        return DEVICES[name]
    try:
        flops, bandwidth, memory = map(float, name.split(","))
    except ValueError:
        flops = bandwidth = memory = 0.0
    if not all(math.isfinite(value) and value > 0 for value in (flops, bandwidth, memory)):
        raise InputError(
            f"{name!r:.60} is no known GPU: use {', '.join(DEVICES)}, or bf16 TFLOP/s, GB/s and GB such as 121,300,24"
        )
    return Device(flops * 1e12, bandwidth * 1e9, memory * 1e9, "the command line")
