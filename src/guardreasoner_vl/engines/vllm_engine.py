"""The engine for large batches on GPUs: vLLM inside this process (the extra `vllm`), without a server.

    guard = Guard.load("OWNER/NAME", engine="vllm")

vLLM gets token ids in which one placeholder stands for each image, and expands them; a prompt that it reads as other
tokens fails, because the model would see other pixels. Labels are scored by the log-probabilities of exactly the
candidates' tokens (`logprob_token_ids`, since vLLM 0.20), over the whole vocabulary.

vLLM answers a call as a whole: a listener receives an answer once it is complete, and a request that is cancelled
meanwhile runs to its end. `ban_empty_think` is not applied, so an answer may have an empty think.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.engines.adapter import check_adapter, processor_folder
from guardreasoner_vl.engines.base import Capabilities, EngineRequest, EngineResult, ScoreResult
from guardreasoner_vl.engines.int8 import is_int8
from guardreasoner_vl.engines.isolation import ResultT, isolate, reported
from guardreasoner_vl.engines.label_scores import likeliest
from guardreasoner_vl.engines.model_files import check_folder, context_length, model_info, resolve_folder
from guardreasoner_vl.engines.qwen import IMAGE_PAD, QwenInputs
from guardreasoner_vl.engines.sampling import GenerationRow, Vocabulary
from guardreasoner_vl.engines.validation import (
    check_length,
    check_request,
    check_scoring,
    error_result,
    error_score,
)
from guardreasoner_vl.errors import (
    EngineError,
    GuardError,
    MissingExtraError,
    ModelError,
    RequestCancelledError,
    reason_of,
)
from guardreasoner_vl.types import CheckedImage, ModelInfo, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

BLOCK_SIZE = 16
"""Tokens of a block of vLLM's prefix cache. Only whole blocks are shared, so a block must be shorter than the
instruction (about 118 tokens with Qwen's tokenizer)."""

_SETTINGS: Mapping[str, Any] = {
    "generation_config": "vllm",  # not the model's: its repetition penalty would change labels
    "enable_prefix_caching": True,
    "block_size": BLOCK_SIZE,
    "limit_mm_per_prompt": {"image": 48, "video": 0},  # 16 frames in 3 variants each, as `ImageLimits` allows
}
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # nothing about what is judged leaves the machine
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for verdicts
}
_BANNED = -100.0
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `max_lora_rank`."""


@dataclass(frozen=True)
class _Job:
    """One valid request: its position in the call, its token ids for vLLM, and those that the model reads."""

    place: int
    request: EngineRequest
    ids: tuple[int, ...]
    expanded: tuple[int, ...]

    @property
    def length(self) -> int:
        """The prompt's length in tokens."""
        return len(self.expanded)


class VLLMEngine:
    """Runs a Qwen2.5-VL in vLLM; `load` opens a folder or a hub id.

    Calls of several threads run one after another: vLLM batches the requests of one call. `llm` is a `vllm.LLM`, or a
    `VLLMServer`, which has its methods; `parameters` builds its sampling parameters, `show` converts an image for it.
    """

    def __init__(
        self,
        llm: Any,
        inputs: QwenInputs,
        info: ModelInfo,
        max_context: int,
        *,
        parameters: Callable[..., Any],
        show: Callable[[CheckedImage], Any] = CheckedImage.open,
        scores: bool = True,
        adapter: Any = None,
    ) -> None:
        self.inputs = inputs
        self._llm: Any = llm
        self._info = info
        self._max_context = max_context
        self._parameters, self._show, self._scores = parameters, show, scores
        self._with_adapter = {"lora_request": adapter} if adapter else {}
        self._vocabulary = Vocabulary(inputs)
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        model: str,
        revision: str | None = None,
        *,
        max_model_len: int | None = None,
        adapter: Path | None = None,
        **options: Any,
    ) -> VLLMEngine:
        """Open a folder, or a hub id: safetensors weights, never remote code.

        `max_model_len` bounds a prompt and its answer, in tokens; by default the model's own limit. vLLM computes the
        LoRA adapter in the folder `adapter` beside the model. Other `options` go to `vllm.LLM`, such as
        `tensor_parallel_size` or `gpu_memory_utilization`. Raises `ModelError`, and `MissingExtraError` without vLLM.
        """
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            import vllm
        except ImportError as error:
            raise MissingExtraError("vllm", "vllm") from error
        folder = resolve_folder(model, revision)
        config = check_folder(folder)
        if is_int8(folder):
            raise ModelError(
                f"{folder}: vLLM does not read weights stored as int8: "
                "write a copy with `guardreasoner-vl compact MODEL --expand --out DIR`, and give that"
            )
        inputs = QwenInputs.from_folder(folder, processor_folder(folder, adapter))
        max_context = max_model_len or context_length(config)
        if adapter:
            rank = check_adapter(adapter)
            options |= {"enable_lora": True, "max_lora_rank": next((most for most in _RANKS if most >= rank), rank)}
        try:
            llm = vllm.LLM(model=str(folder), max_model_len=max_context, **{**_SETTINGS, **options})
        except Exception as error:
            raise ModelError(
                f"{folder}: vLLM cannot load it ({reason_of(error)}); check the GPU's memory, or use "
                "--engine transformers"
            ) from error
        info = model_info(model, folder, revision, adapter)
        request = _lora_request(adapter) if adapter else None
        return cls(llm, inputs, info, max_context, parameters=vllm.SamplingParams, adapter=request)

    @property
    def model(self) -> ModelInfo:
        """The model's name, and its revision or the digest of its weights."""
        return self._info

    @property
    def capabilities(self) -> Capabilities:
        """Images, forced prefixes and a prefix cache; scores, unless the constructor excluded them."""
        return Capabilities(
            images=True, scores=self._scores, forced_prefix=True, prefix_cache=True, max_context=self._max_context
        )

    def count_tokens(self, request: EngineRequest) -> int:
        """Number of prompt tokens of `request`, images and forced prefix included. Raises `InputError`."""
        return len(self._encode(request)[1])

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
        """Answer all requests in one call of vLLM; the results are in the requests' order."""
        return self._run(requests, self._generate, error_result, check_request)

    def score(
        self, requests: Sequence[EngineRequest], slots: Sequence[str], candidates: Sequence[str]
    ) -> list[ScoreResult]:
        """Compare the candidates in each slot, with one call of vLLM for each slot."""

        def score_jobs(jobs: Sequence[_Job]) -> list[ScoreResult]:
            return self._score(jobs, slots, candidates)

        with_slot = [replace(request, forced_prefix=request.forced_prefix + slots[0]) for request in requests]
        return self._run(with_slot, score_jobs, error_score, check_scoring)

    def sample(self, requests: Sequence[EngineRequest], count: int) -> list[list[EngineResult]]:
        """`count` answers to each request, with their tokens' log-probabilities; a prompt is sent and read once.

        The answers' seeds count up from the request's. Raises `EngineError`, or `InputError` for an invalid request.
        """
        jobs = [self._job(place, request, check_request) for place, request in enumerate(requests)]
        parameters = [self._sampling(job, n=count, logprobs=0) for job in jobs]
        try:
            with self._lock:
                outputs = self._answers(jobs, [()] * len(jobs), parameters)
            return [
                [_checked_logprobs(self._result(job, output, place)) for place in range(count)]
                for job, output in zip(jobs, outputs, strict=True)
            ]
        except Exception as error:
            raise reported(error) from error

    def reload(self, **source: Any) -> None:
        """Replace the model's weights, as `reload_weights` does. Raises `EngineError`."""
        with self._lock:
            reload_weights(self._llm, **source)

    async def agenerate(self, request: EngineRequest) -> EngineResult:
        """`generate` for one request in a thread; cancelling the coroutine does not stop vLLM."""
        return (await asyncio.to_thread(self.generate, [request]))[0]

    async def ascore(self, request: EngineRequest, slots: Sequence[str], candidates: Sequence[str]) -> ScoreResult:
        """`score` for one request in a thread; cancelling the coroutine does not stop vLLM."""
        return (await asyncio.to_thread(self.score, [request], slots, candidates))[0]

    def close(self) -> None:
        """End vLLM once no call is running; later calls fail with `EngineError`."""
        with self._lock:
            self._llm = None  # vLLM ends its process when the object is deleted

    def _encode(self, request: EngineRequest) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The token ids with one placeholder for each image, and those that the model reads."""
        ids = self.inputs.encode(request.messages, request.images, request.forced_prefix, request.pixels).ids
        pad = self.inputs.token_id[IMAGE_PAD]
        collapsed = [
            token for token, before in zip(ids, [None, *ids[:-1]], strict=True) if (token, before) != (pad, pad)
        ]
        return tuple(collapsed), tuple(ids)

    def _job(self, place: int, request: EngineRequest, check: Callable[[EngineRequest, Capabilities], None]) -> _Job:
        if request.listener and request.listener.cancelled:
            raise RequestCancelledError
        check(request, self.capabilities)
        ids, expanded = self._encode(request)
        check_length(len(expanded), self._max_context)
        return _Job(place, request, ids, expanded)

    def _run(
        self,
        requests: Sequence[EngineRequest],
        work: Callable[[Sequence[_Job]], list[ResultT]],
        refused: Callable[[GuardError], ResultT],
        check: Callable[[EngineRequest, Capabilities], None],
    ) -> list[ResultT]:
        """Encode, run `work` on all valid requests at once, and return the results in order."""
        results: dict[int, ResultT] = {}
        jobs: list[_Job] = []
        for place, request in enumerate(requests):
            try:
                jobs.append(self._job(place, request, check))
            except Exception as error:
                results[place] = refused(reported(error))
        if jobs:
            with self._lock:
                isolated = isolate(jobs, work, refused)
            results |= {job.place: result for job, result in zip(jobs, isolated, strict=True)}
        return [results[place] for place in range(len(requests))]

    def _answers(self, jobs: Sequence[_Job], further: Sequence[Sequence[int]], parameters: Sequence[Any]) -> list[Any]:
        """vLLM's outputs for the jobs' prompts, each followed by its `further` tokens."""
        if self._llm is None:
            raise EngineError("the engine is closed: open a new one")
        prompts = [self._prompt(job, tokens) for job, tokens in zip(jobs, further, strict=True)]
        outputs = list(self._llm.generate(prompts, list(parameters), use_tqdm=False, **self._with_adapter))
        if len(outputs) != len(prompts):  # answers to a call that was interrupted
            raise EngineError(f"vLLM gave {len(outputs)} answers to {len(prompts)} requests: try again")
        return outputs

    def _prompt(self, job: _Job, further: Sequence[int]) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt_token_ids": [*job.ids, *further]}
        if job.request.images:
            budget = job.request.pixels or self.inputs.budget
            prompt["multi_modal_data"] = {"image": [self._show(image) for image in job.request.images]}
            prompt["mm_processor_kwargs"] = {"min_pixels": budget.min_pixels, "max_pixels": budget.max_pixels}
        return prompt

    def _candidate_ids(self, request: EngineRequest) -> tuple[list[int], list[int]]:
        scored = self._scores and request.label_fields and request.candidates
        return self._vocabulary.first_difference(request.candidates) if scored else ([], [])

    def _room(self, job: _Job) -> int:
        """The number of tokens that the answer may have."""
        return min(job.request.max_new_tokens, self._max_context - job.length)

    def _sampling(self, job: _Job, **further: Any) -> Any:
        """vLLM's sampling parameters for a request, with `further` ones."""
        return self._parameters(
            temperature=job.request.temperature,
            top_p=job.request.top_p,
            seed=job.request.seed,
            max_tokens=self._room(job),
            stop_token_ids=sorted(self._vocabulary.end_ids),
            logit_bias=dict.fromkeys(self._vocabulary.never, _BANNED),
            detokenize=False,  # the text is decoded here, special tokens included
            **further,
        )

    def _generate(self, jobs: Sequence[_Job]) -> list[EngineResult]:
        candidates = [self._candidate_ids(job.request) for job in jobs]
        parameters = [
            self._sampling(job, **_label_parameters(ids)) for job, (_, ids) in zip(jobs, candidates, strict=True)
        ]
        outputs = self._answers(jobs, [()] * len(jobs), parameters)
        return [
            self._result(job, output, 0, common, ids)
            for job, output, (common, ids) in zip(jobs, outputs, candidates, strict=True)
        ]

    def _result(
        self, job: _Job, output: Any, number: int, common: Sequence[int] = (), ids: Sequence[int] = ()
    ) -> EngineResult:
        """Read an answer's tokens in the way in which the reference engine generates them (`GenerationRow`)."""
        row = GenerationRow(job.request, self._vocabulary, self._room(job))
        sampled: list[float] = []
        try:
            _check_prompt_seen(output, job.expanded)
            answer = output.outputs[number]
            for place, token in enumerate(answer.token_ids):
                if ids:
                    row.logprobs.append(_logprobs(answer.logprobs[place], ids))
                elif answer.logprobs is not None:
                    sampled += _logprobs(answer.logprobs[place], [token])
                row.add(token)
                if row.finish:
                    break
            else:
                raise EngineError(
                    f"vLLM ended the answer early (finish reason {answer.finish_reason!r:.40}): try again"
                )
            row.report()
            if row.finish == "error":
                raise RequestCancelledError
        except GuardError as error:
            return error_result(error)
        return EngineResult(
            text=job.request.forced_prefix + self._vocabulary.text(row.tokens),
            finish_reason=row.finish or "error",
            token_ids=tuple(row.tokens),
            end_id=row.end_id,
            token_logprobs=tuple(sampled),
            label_logprobs=row.label_logprobs(common) if ids else {},
            usage=Usage(
                prompt_tokens=job.length,
                cached_tokens=output.num_cached_tokens or 0,
                completion_tokens=len(answer.token_ids),
            ),
        )

    def _score(self, jobs: Sequence[_Job], slots: Sequence[str], candidates: Sequence[str]) -> list[ScoreResult]:
        common, ids = self._vocabulary.first_difference(candidates)
        one_token = self._parameters(temperature=0.0, max_tokens=1, detokenize=False, **_label_parameters(ids))
        logprobs: list[list[tuple[float, ...]]] = [[] for _ in jobs]
        further: list[list[int]] = [[] for _ in jobs]
        cached: list[int] = []
        for number in range(len(slots)):
            if number:
                for tokens, values in zip(further, logprobs, strict=True):
                    tokens += self.inputs.tokens(candidates[likeliest(values[-1])] + slots[number])
            outputs = self._answers(jobs, [[*tokens, *common] for tokens in further], [one_token] * len(jobs))
            for job, output, tokens, values in zip(jobs, outputs, further, logprobs, strict=True):
                _check_prompt_seen(output, (*job.expanded, *tokens, *common))
                values.append(_logprobs(output.outputs[0].logprobs[0], ids))
            cached = cached or [output.num_cached_tokens or 0 for output in outputs]
        return [
            ScoreResult(
                tuple(values),
                tuple(map(likeliest, values)),
                Usage(
                    prompt_tokens=job.length + len(tokens) + len(common),
                    cached_tokens=hits,
                    completion_tokens=len(slots),
                ),
            )
            for job, values, tokens, hits in zip(jobs, logprobs, further, cached, strict=True)
        ]


def reload_weights(llm: Any, **source: Any) -> None:
    """Have vLLM load weights from `weights_path` or `weights_iterator`, and forget what the old ones computed.

    Raises `EngineError`.
    """
    try:
        llm.collective_rpc("reload_weights", kwargs=source)
        # Both caches are keyed by the input alone; the encoder's holds the embeddings of images.
        llm.llm_engine.reset_encoder_cache()
        emptied = llm.reset_prefix_cache()
    except GuardError:
        raise
    except Exception as error:
        raise EngineError(f"vLLM did not take the weights ({reason_of(error)}): use vllm==0.31") from error
    if not emptied:
        raise EngineError("vLLM is busy and kept keys and values of the old weights: let no other client use it")


def _lora_request(adapter: Path) -> Any:
    """The object that selects the adapter in vLLM's calls."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, str(adapter))


def _label_parameters(ids: Sequence[int]) -> dict[str, Any]:
    """The sampling parameters that request the log-probabilities of exactly these tokens at each position."""
    return {"logprobs": len(ids), "logprob_token_ids": list(ids)} if ids else {}


def _logprobs(of_tokens: Mapping[int, Any], ids: Sequence[int]) -> tuple[float, ...]:
    """The log-probabilities of `ids` at one position. Raises `EngineError` if one is missing or not finite."""
    values = tuple(float(of_tokens[token].logprob) if token in of_tokens else math.nan for token in ids)
    if not all(map(math.isfinite, values)):
        raise EngineError("vLLM gave no finite log-probability of a token: install vllm>=0.20, or use another dtype")
    return values


def _checked_logprobs(result: EngineResult) -> EngineResult:
    """The result, or an error if its tokens have no log-probabilities."""
    if result.finish_reason == "error" or result.token_logprobs:
        return result
    return error_result(EngineError("vLLM gave no log-probabilities of the sampled tokens: use vllm==0.31"))


def _check_prompt_seen(output: Any, expected: Sequence[int]) -> None:
    """Raise `EngineError` if vLLM read the prompt as other tokens: it then also saw images of another size."""
    ids = output.prompt_token_ids
    if tuple(ids) != tuple(expected):
        difference = "other tokens" if len(ids) == len(expected) else f"{len(ids)} tokens instead of {len(expected)}"
        raise EngineError(
            f"vLLM read the prompt as {difference}: its model folder or its image settings differ from the model's "
            "preprocessor_config.json; leave mm_processor_kwargs out"
        )
