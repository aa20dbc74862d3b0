"""The engine for large batches on GPUs: vLLM inside this process (the extra `vllm`), without a server.

    guard = Guard.load("OWNER/NAME", engine="vllm")

vLLM gets token ids in which one placeholder stands for each image, and expands them; a prompt whose length it sees
differently fails, because the model would see other pixels. Labels are scored by the log-probabilities of exactly the
candidates' tokens (`logprob_token_ids`, since vLLM 0.20), over the whole vocabulary.

vLLM answers a call as a whole: a listener hears an answer once it is complete, and a request that is cancelled
meanwhile runs to its end. `ban_empty_think` is not applied: the strict parser reads an empty think as it is.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.engines.base import Capabilities, EngineRequest, EngineResult, ScoreResult
from guardreasoner_vl.engines.int8 import is_int8
from guardreasoner_vl.engines.isolation import ResultT, isolate, reported
from guardreasoner_vl.engines.label_scores import likeliest
from guardreasoner_vl.engines.model_files import check_folder, model_info, resolve_folder
from guardreasoner_vl.engines.qwen import QwenInputs, chat_text
from guardreasoner_vl.engines.sampling import GenerationRow, Vocabulary
from guardreasoner_vl.engines.validation import check_length, check_request, error_result, error_score
from guardreasoner_vl.errors import EngineError, MissingExtraError, ModelError, RequestCancelledError, reason_of
from guardreasoner_vl.types import ModelInfo, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from guardreasoner_vl.errors import GuardError

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


@dataclass(frozen=True)
class _Job:
    """One valid request: its position in the call, its token ids for vLLM, and the prompt's length in tokens."""

    place: int
    request: EngineRequest
    ids: tuple[int, ...]
    length: int


class VLLMEngine:
    """Runs a Qwen2.5-VL in vLLM; `load` opens a folder or a hub id.

    Calls of several threads run one after another: vLLM batches the requests of one call.
    """

    def __init__(self, vllm: Any, llm: Any, inputs: QwenInputs, info: ModelInfo, max_context: int) -> None:
        self.inputs = inputs
        self._parameters = vllm.SamplingParams
        self._llm: Any = llm
        self._info = info
        self._max_context = max_context
        self._vocabulary = Vocabulary(inputs)
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls, model: str, revision: str | None = None, *, max_model_len: int | None = None, **options: Any
    ) -> VLLMEngine:
        """Open a folder, or a hub id: safetensors weights, never remote code.

        `max_model_len` bounds a prompt and its answer, in tokens; by default the model's own limit. Other `options` go
        to `vllm.LLM`, such as `tensor_parallel_size` or `gpu_memory_utilization`. Raises `ModelError`, and
        `MissingExtraError` without vLLM.
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
        inputs = QwenInputs.from_folder(folder)
        max_context = max_model_len or _positions(config)
        try:
            llm = vllm.LLM(model=str(folder), max_model_len=max_context, **{**_SETTINGS, **options})
        except Exception as error:
            raise ModelError(
                f"{folder}: vLLM cannot load it ({reason_of(error)}); check the GPU's memory, or use "
                "--engine transformers"
            ) from error
        return cls(vllm, llm, inputs, model_info(model, folder, revision), max_context)

    @property
    def model(self) -> ModelInfo:
        return self._info

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            images=True, scores=True, forced_prefix=True, prefix_cache=True, max_context=self._max_context
        )

    def count_tokens(self, request: EngineRequest) -> int:
        return self._encode(request)[1]

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
        return self._run(requests, self._generate, error_result)

    def score(
        self, requests: Sequence[EngineRequest], slots: Sequence[str], candidates: Sequence[str]
    ) -> list[ScoreResult]:
        def score_jobs(jobs: Sequence[_Job]) -> list[ScoreResult]:
            return self._score(jobs, slots, candidates)

        with_slot = [replace(request, forced_prefix=request.forced_prefix + slots[0]) for request in requests]
        return self._run(with_slot, score_jobs, error_score)

    async def agenerate(self, request: EngineRequest) -> EngineResult:
        return (await asyncio.to_thread(self.generate, [request]))[0]

    async def ascore(self, request: EngineRequest, slots: Sequence[str], candidates: Sequence[str]) -> ScoreResult:
        return (await asyncio.to_thread(self.score, [request], slots, candidates))[0]

    def close(self) -> None:
        with self._lock:
            self._llm = None  # vLLM ends its own process when the object goes

    def _encode(self, request: EngineRequest) -> tuple[tuple[int, ...], int]:
        """The token ids with one placeholder for each image, and the prompt's length once vLLM has expanded them."""
        pads = [
            self.inputs.pads(self.inputs.grid(image.height, image.width, request.pixels)) for image in request.images
        ]
        ids = self.inputs.tokens(chat_text(request.messages, [1] * len(pads)) + request.forced_prefix)
        return tuple(ids), len(ids) - len(pads) + sum(pads)

    def _job(self, place: int, request: EngineRequest) -> _Job:
        if request.listener and request.listener.cancelled:
            raise RequestCancelledError
        check_request(request, self.capabilities)
        ids, length = self._encode(request)
        check_length(length, self._max_context)
        return _Job(place, request, ids, length)

    def _run(
        self,
        requests: Sequence[EngineRequest],
        work: Callable[[Sequence[_Job]], list[ResultT]],
        refused: Callable[[GuardError], ResultT],
    ) -> list[ResultT]:
        """Encode, run `work` on all valid requests at once, and return the results in order."""
        results: dict[int, ResultT] = {}
        jobs: list[_Job] = []
        for place, request in enumerate(requests):
            try:
                jobs.append(self._job(place, request))
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
        outputs = list(self._llm.generate(prompts, list(parameters), use_tqdm=False))
        if len(outputs) != len(prompts):  # answers to a call that was interrupted
            raise EngineError(f"vLLM gave {len(outputs)} answers to {len(prompts)} requests: try again")
        return outputs

    def _prompt(self, job: _Job, further: Sequence[int]) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt_token_ids": [*job.ids, *further]}
        if job.request.images:
            budget = job.request.pixels or self.inputs.budget
            prompt["multi_modal_data"] = {"image": [image.open() for image in job.request.images]}
            prompt["mm_processor_kwargs"] = {"min_pixels": budget.min_pixels, "max_pixels": budget.max_pixels}
        return prompt

    def _candidate_ids(self, request: EngineRequest) -> tuple[list[int], list[int]]:
        scored = request.label_fields and request.candidates
        return self._vocabulary.first_difference(request.candidates) if scored else ([], [])

    def _room(self, job: _Job) -> int:
        """The number of tokens that the answer may have."""
        return min(job.request.max_new_tokens, self._max_context - job.length)

    def _generate(self, jobs: Sequence[_Job]) -> list[EngineResult]:
        candidates = [self._candidate_ids(job.request) for job in jobs]
        parameters = [
            self._parameters(
                temperature=job.request.temperature,
                top_p=job.request.top_p,
                seed=job.request.seed,
                max_tokens=self._room(job),
                stop_token_ids=sorted(self._vocabulary.end_ids),
                logit_bias=dict.fromkeys(self._vocabulary.never, _BANNED),
                detokenize=False,  # the text is decoded here, special tokens included
                **_label_parameters(ids),
            )
            for job, (_, ids) in zip(jobs, candidates, strict=True)
        ]
        outputs = self._answers(jobs, [()] * len(jobs), parameters)
        return [
            self._result(job, output, common, ids)
            for job, output, (common, ids) in zip(jobs, outputs, candidates, strict=True)
        ]

    def _result(self, job: _Job, output: Any, common: Sequence[int], ids: Sequence[int]) -> EngineResult:
        """Read the tokens in the way in which the reference engine generates them (`GenerationRow`)."""
        answer = output.outputs[0]
        row = GenerationRow(job.request, self._vocabulary, self._room(job))
        try:
            _check_length_seen(output, job.length)
            for place, token in enumerate(answer.token_ids):
                if ids:
                    row.logprobs.append(_logprobs(answer.logprobs[place], ids))
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
        except EngineError as error:
            return error_result(error)
        return EngineResult(
            text=job.request.forced_prefix + self._vocabulary.text(row.tokens),
            finish_reason=row.finish or "error",
            token_ids=tuple(row.tokens),
            end_id=row.end_id,
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
                _check_length_seen(output, job.length + len(tokens) + len(common))
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


def _positions(config: Mapping[str, object]) -> int:
    """The context length in tokens that a model's configuration states. Raises `ModelError`."""
    text = config.get("text_config")
    for section in (text if isinstance(text, dict) else {}, config):
        if isinstance(positions := section.get("max_position_embeddings"), int):
            return positions
    raise ModelError("config.json names no max_position_embeddings; download the model again, or give max_model_len")


def _label_parameters(ids: Sequence[int]) -> dict[str, Any]:
    """The parameters that ask for the log-probabilities of exactly these tokens at each position."""
    return {"logprobs": len(ids), "logprob_token_ids": list(ids)} if ids else {}


def _logprobs(of_tokens: Mapping[int, Any], ids: Sequence[int]) -> tuple[float, ...]:
    """The log-probabilities of `ids` at one position. Raises `EngineError` if one is missing or not finite."""
    values = tuple(float(of_tokens[token].logprob) if token in of_tokens else math.nan for token in ids)
    if not all(map(math.isfinite, values)):
        raise EngineError("vLLM gave no finite log-probability for a label: install vllm>=0.20, or use another dtype")
    return values


def _check_length_seen(output: Any, length: int) -> None:
    """Raise `EngineError` if vLLM saw another number of prompt tokens: it then also saw images of another size."""
    seen = len(output.prompt_token_ids)
    if seen != length:
        raise EngineError(
            f"vLLM read the prompt as {seen} tokens instead of {length}: its image settings differ from the model's "
            "preprocessor_config.json; leave mm_processor_kwargs out"
        )
