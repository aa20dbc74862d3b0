"""A stand-in for the module `vllm`: the part of its interface that the engine uses, computed by transformers.

It is as strict as vLLM: unknown parameters, prompts without room for an answer and more images than allowed raise, and
one bad prompt fails the whole call. It expands placeholders and keeps a prefix cache of whole blocks. After new weights
it answers only once both caches were reset, where vLLM would answer by the old ones.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from guardreasoner_vl.engines.adapter import merge_folder
from guardreasoner_vl.engines.decoding import Decoder
from guardreasoner_vl.engines.qwen import IMAGE_PAD, QwenInputs
from guardreasoner_vl.engines.weights import load_network
from guardreasoner_vl.images.geometry import PixelBudget

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pytest


@dataclass
class SamplingParams:
    """vLLM's parameters of one request; the others of the real class are not needed."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    stop_token_ids: list[int] = field(default_factory=list)
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError("max_tokens must be at least 1")
        if self.logprob_token_ids is not None and self.logprobs != len(self.logprob_token_ids):
            raise ValueError("logprobs must equal the number of logprob_token_ids")


@dataclass(frozen=True)
class LoRARequest:
    """The adapter of a call."""

    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass(frozen=True)
class Logprob:
    """The log-probability of one token."""

    logprob: float


@dataclass
class CompletionOutput:
    """One answer; the token that stopped it is among its tokens."""

    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[dict[int, Logprob]] | None


@dataclass
class RequestOutput:
    """The answer to one prompt, whose placeholders are expanded in `prompt_token_ids`."""

    prompt_token_ids: list[int]
    num_cached_tokens: int
    outputs: list[CompletionOutput]


class LLM:
    """Generates row by row. `calls` holds the prompts of each call, `failing` texts whose prompts break the model."""

    def __init__(
        self,
        model: str,
        *,
        max_model_len: int,
        generation_config: str,
        enable_prefix_caching: bool,
        block_size: int,
        limit_mm_per_prompt: Mapping[str, int],
        mm_processor_kwargs: Mapping[str, int] | None = None,
        logprobs_mode: str = "raw_logprobs",
        gpu_memory_utilization: float = 0.9,
        enable_lora: bool = False,
        max_lora_rank: int = 16,
    ) -> None:
        if not (Path(model) / "model.safetensors").is_file():
            raise OSError(f"no weights in {model}")
        self.inputs = QwenInputs.from_folder(Path(model))
        self.generation_config = generation_config
        self._decoder = Decoder(load_network(Path(model), "fp32"), self.inputs)
        self.max_model_len = max_model_len
        self._block = block_size if enable_prefix_caching else None
        self._limits = limit_mm_per_prompt
        self._overridden = mm_processor_kwargs or {}
        self.logprobs_mode, self.gpu_memory_utilization = logprobs_mode, gpu_memory_utilization
        self._stale: set[str] = set()
        self._blocks: set[tuple[int, ...]] = set()
        self.calls: list[list[dict[str, Any]]] = []
        self.failing: list[str] = []
        self.leftover: list[RequestOutput] = []
        self.enable_lora, self.max_lora_rank = enable_lora, max_lora_rank
        self._adapter: LoRARequest | None = None

    def generate(
        self,
        prompts: Sequence[dict[str, Any]],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        assert not use_tqdm
        if lora_request != self._adapter:
            assert lora_request
            assert self.enable_lora
            merge_folder(self._decoder.model, Path(lora_request.lora_path))
            self._adapter = lora_request
        assert not self._stale, self._stale
        self.calls.append(list(prompts))
        expanded = [self._expanded(prompt) for prompt in prompts]
        leftover, self.leftover = self.leftover, []
        rows = zip(prompts, expanded, sampling_params, strict=True)
        return leftover + [self.answer(prompt, ids, parameters) for prompt, ids, parameters in rows]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The weights by name."""
        return dict(self._decoder.model.named_parameters())

    def collective_rpc(self, method: str, kwargs: Mapping[str, Any]) -> None:
        """Only `reload_weights`, of all weights at once, by their names in transformers or in released folders."""
        assert method == "reload_weights"
        pairs = kwargs.get("weights_iterator") or load_file(Path(kwargs["weights_path"]) / "model.safetensors").items()
        loaded = {_renamed(name): weight for name, weight in pairs}
        assert loaded.keys() == self.weights.keys()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(loaded[name])
        self._stale = {"prefix", "encoder"}

    @property
    def llm_engine(self) -> LLM:
        return self

    def reset_encoder_cache(self) -> None:
        self._stale.discard("encoder")

    def reset_prefix_cache(self) -> bool:
        self._stale.discard("prefix")
        self._blocks.clear()
        return True

    def _budget(self, prompt: Mapping[str, Any]) -> PixelBudget:
        return PixelBudget(**{**prompt.get("mm_processor_kwargs", {}), **self._overridden})

    def _images(self, prompt: Mapping[str, Any]) -> list[Any]:
        images: list[Any] = prompt.get("multi_modal_data", {}).get("image", [])
        if len(images) > self._limits["image"]:
            raise ValueError("At most this many image(s) may be provided")
        return images

    def _grids(self, prompt: Mapping[str, Any]) -> list[tuple[int, int]]:
        return [self.inputs.grid(image.height, image.width, self._budget(prompt)) for image in self._images(prompt)]

    def _expanded(self, prompt: Mapping[str, Any]) -> list[int]:
        pad, grids = self.inputs.token_id[IMAGE_PAD], iter(self._grids(prompt))
        ids: list[int] = []
        for token in prompt["prompt_token_ids"]:
            ids += [pad] * self.inputs.pads(next(grids)) if token == pad else [token]
        assert next(grids, None) is None, "fewer placeholders than images"
        if len(ids) >= self.max_model_len:
            raise ValueError("the prompt is longer than the maximum model length")
        return ids

    def answer(self, prompt: Mapping[str, Any], ids: list[int], parameters: SamplingParams) -> RequestOutput:
        text = self.inputs.tokenizer.decode(prompt["prompt_token_ids"], skip_special_tokens=False)
        if any(part in text for part in self.failing):
            raise RuntimeError(f"a kernel failed on {text}")
        answers = [self._one(prompt, ids, parameters, number) for number in range(parameters.n)]
        return RequestOutput(ids, self._cached(ids), answers)

    def _one(
        self, prompt: Mapping[str, Any], ids: list[int], parameters: SamplingParams, number: int
    ) -> CompletionOutput:
        """The answer in place `number`; vLLM counts the seed up."""
        seeded = replace(parameters, seed=None if parameters.seed is None else parameters.seed + number)
        tokens: list[int] = []
        logprobs: list[dict[int, Logprob]] = []
        finish = "length"
        for token, row in self.steps(prompt, ids, seeded):
            tokens.append(token)
            wanted = {*(parameters.logprob_token_ids or ()), token}
            logprobs.append({index: Logprob(float(row[index])) for index in wanted})
            if token in parameters.stop_token_ids:
                finish = "stop"
                break
        return CompletionOutput(tokens, finish, logprobs if parameters.logprobs is not None else None)

    def steps(
        self, prompt: Mapping[str, Any], ids: list[int], parameters: SamplingParams
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Each token with all log-probabilities in its place: the model's, or those that it was sampled from."""
        encoded = self.inputs.encoded(ids, self._grids(prompt))
        batch = self._decoder.prefill([encoded], self._images(prompt), budget=self._budget(prompt))
        generator = torch.Generator().manual_seed(parameters.seed or 0)
        for _ in range(min(parameters.max_tokens, self.max_model_len - len(ids))):
            logits = batch.logits[0].clone()
            for token, bias in parameters.logit_bias.items():
                logits[token] += bias
            if parameters.temperature > 0:
                chosen = int(torch.multinomial((logits / parameters.temperature).softmax(-1), 1, generator=generator))
            else:
                chosen = int(logits.argmax())
            processed = self.logprobs_mode == "processed_logprobs" and parameters.temperature > 0
            yield chosen, (logits / parameters.temperature if processed else batch.logits[0]).log_softmax(-1)
            self._decoder.extend(batch, [[chosen]])

    def _cached(self, ids: list[int]) -> int:
        if self._block is None:
            return 0
        heads = [tuple(ids[:end]) for end in range(self._block, len(ids), self._block)]
        hits = sum(head in self._blocks for head in heads)
        self._blocks.update(heads)
        return hits * self._block


def _renamed(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    text = name.startswith("model.") and not name.startswith(("model.language_model.", "model.visual."))
    return f"model.language_model.{name.removeprefix('model.')}" if text else name


def install(monkeypatch: pytest.MonkeyPatch) -> list[LLM]:
    """Let `import vllm` import the stand-in; every `LLM` that is opened is added to the list."""
    opened: list[LLM] = []

    def open_llm(*arguments: Any, **options: Any) -> LLM:
        opened.append(LLM(*arguments, **options))
        return opened[-1]

    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    vars(module).update(LLM=open_llm, SamplingParams=SamplingParams)
    monkeypatch.setitem(sys.modules, "vllm", module)
    requests = ModuleType("vllm.lora.request")
    vars(requests).update(LoRARequest=LoRARequest)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", requests)
    return opened
