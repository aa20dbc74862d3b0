"""The reference engine: Qwen2.5-VL models in this process, on the CPU or a GPU."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from guardreasoner_vl.engines.base import Capabilities, EngineRequest, EngineResult, ScoreResult
from guardreasoner_vl.engines.checks import check_request, failed, unscored
from guardreasoner_vl.engines.decoding import Batch, Decoder, Prefix
from guardreasoner_vl.engines.folders import check_folder, model_info, resolve_folder
from guardreasoner_vl.engines.qwen import QwenInputs
from guardreasoner_vl.engines.sampling import Row, Vocabulary
from guardreasoner_vl.errors import EngineError, GuardError, InputTooLongError, ModelError
from guardreasoner_vl.types import ModelInfo, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from guardreasoner_vl.engines.qwen import Encoded

_log = logging.getLogger(__name__)
DType = Literal["auto", "bf16", "fp32"]
_SHRINK_BELOW = 0.75
Result = TypeVar("Result", EngineResult, ScoreResult)


@dataclass(frozen=True)
class _Job:
    """One readable request: its place in the call and its encoded prompt."""

    place: int
    request: EngineRequest
    prompt: Encoded


class TransformersEngine:
    """Runs a model folder with safetensors weights; never remote code.

    `max_rows` and `max_tokens` bound one batch (rows, and rows times longest prompt).
    """

    def __init__(
        self, folder: Path, info: ModelInfo, dtype: DType = "auto", max_rows: int = 32, max_tokens: int = 32_768
    ) -> None:
        config = check_folder(folder)
        self.inputs = QwenInputs.from_folder(folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = _load(folder, _dtype(dtype, device)).to(device).eval()
        self._info = info
        self._decoder = Decoder(model, self.inputs)
        self._vocabulary = Vocabulary(self.inputs)
        self._max_rows, self._max_tokens = max_rows, max_tokens
        self._max_context = _context(config)
        self._prefix: Prefix | None = None
        self._lock = threading.Lock()

    @classmethod
    def load(cls, model: str, revision: str | None = None, **options: Any) -> TransformersEngine:
        """Open 'embedded', a folder, or a hub id. Raises `ModelError`."""
        folder = resolve_folder(model, revision)
        return cls(folder, model_info(model, folder, revision), **options)

    @property
    def model(self) -> ModelInfo:
        return self._info

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            images=True, scores=True, forced_prefix=True, prefix_cache=True, max_context=self._max_context
        )

    @property
    def network(self) -> Any:
        """The transformers model itself."""
        return self._decoder.model

    def count_tokens(self, request: EngineRequest) -> int:
        return len(self._encode(request).ids)

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
        return self._run(requests, self._generate_batch, failed)

    def score(
        self, requests: Sequence[EngineRequest], slots: Sequence[str], candidates: Sequence[str]
    ) -> list[ScoreResult]:
        def score_batch(jobs: Sequence[_Job]) -> list[ScoreResult]:
            return self._score_batch(jobs, slots, candidates)

        with_slot = [replace(request, forced_prefix=request.forced_prefix + slots[0]) for request in requests]
        return self._run(with_slot, score_batch, unscored)

    async def agenerate(self, request: EngineRequest) -> EngineResult:
        return (await asyncio.to_thread(self.generate, [request]))[0]

    async def ascore(self, request: EngineRequest, slots: Sequence[str], candidates: Sequence[str]) -> ScoreResult:
        return (await asyncio.to_thread(self.score, [request], slots, candidates))[0]

    def close(self) -> None:
        self._prefix = None

    def _encode(self, request: EngineRequest) -> Encoded:
        return self.inputs.encode(request.messages, request.pictures, request.forced_prefix, request.pixels)

    def _run(
        self,
        requests: Sequence[EngineRequest],
        work: Callable[[Sequence[_Job]], list[Result]],
        refused: Callable[[GuardError], Result],
    ) -> list[Result]:
        """Encode, batch by length, work, and put the results back in order; one bad request harms no other."""
        results: dict[int, Result] = {}
        jobs: list[_Job] = []
        for place, request in enumerate(requests):
            try:
                jobs.append(_Job(place, request, self._checked(request)))
            except Exception as error:
                results[place] = refused(_fault(error))
        with self._lock:
            for batch in self._batches(jobs):
                for job, result in zip(batch, self._guarded(batch, work, refused), strict=True):
                    results[job.place] = result
        return [results[place] for place in range(len(requests))]

    def _checked(self, request: EngineRequest) -> Encoded:
        check_request(request, self.capabilities)
        prompt = self._encode(request)
        if len(prompt.ids) >= self._max_context:
            raise InputTooLongError(
                f"the exchange takes {len(prompt.ids)} tokens, the model reads {self._max_context}: shorten it or "
                "judge it in windows"
            )
        return prompt

    def _batches(self, jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
        """Jobs of like length together, longest first, so that a batch pads little."""
        batch: list[_Job] = []
        for job in sorted(jobs, key=lambda job: -len(job.prompt.ids)):
            longest = len((batch or [job])[0].prompt.ids)
            same = not batch or _shared_settings(batch[0].request) == _shared_settings(job.request)
            if batch and (not same or len(batch) >= self._max_rows or longest * (len(batch) + 1) > self._max_tokens):
                yield batch
                batch = []
            batch.append(job)
        if batch:
            yield batch

    def _guarded(
        self,
        jobs: Sequence[_Job],
        work: Callable[[Sequence[_Job]], list[Result]],
        refused: Callable[[GuardError], Result],
    ) -> list[Result]:
        """The batch's results; a batch that fails is halved until the guilty request stands alone."""
        started = time.perf_counter()
        try:
            results = work(jobs)
        except Exception as error:
            if len(jobs) == 1:
                return [refused(_fault(error))]
            results = []  # halved outside of this block: the error's frames hold the failed batch's memory
        if not results:
            middle = len(jobs) // 2
            return self._guarded(jobs[:middle], work, refused) + self._guarded(jobs[middle:], work, refused)
        share = (time.perf_counter() - started) / len(jobs)
        return [
            replace(result, usage=result.usage.model_copy(update={"seconds": result.usage.seconds + share}))
            for result in results
        ]

    def _prefill(self, jobs: Sequence[_Job]) -> tuple[Batch, int]:
        """The batch after its prompts, and how many tokens of each came from the prefix cache."""
        prefix = self._prefix_of(jobs)
        images = [picture.open() for job in jobs for picture in job.request.pictures]
        batch = self._decoder.prefill([job.prompt for job in jobs], images, prefix, jobs[0].request.pixels)
        return batch, len(prefix.ids) if prefix else 0

    def _prefix_of(self, jobs: Sequence[_Job]) -> Prefix | None:
        """The cached head that all these prompts share: the first system message that was ever asked with."""
        if self._prefix is None and jobs[0].request.messages[0].role == "system":
            head = jobs[0].request.messages[0].text
            ids = self.inputs.tokens(f"<|im_start|>system\n{head}<|im_end|>\n<|im_start|>user\n")
            self._prefix = self._decoder.compute_prefix(ids)
        shared = self._prefix is not None and all(self._prefix.starts(job.prompt.ids) for job in jobs)
        return self._prefix if shared else None

    def _generate_batch(self, jobs: Sequence[_Job]) -> list[EngineResult]:
        batch, cached = self._prefill(jobs)
        common, ids = self._candidate_ids(jobs)
        rows = [
            Row(
                job.request,
                self._vocabulary,
                min(job.request.max_new_tokens, self._max_context - len(job.prompt.ids)),
            )
            for job in jobs
        ]
        active = list(range(len(rows)))
        while True:
            _check_finite(batch.logits)
            logprobs = None
            if ids:
                logprobs = (batch.logits[:, ids] - batch.logits.logsumexp(-1, keepdim=True)).cpu()
            tokens = [self._step(rows[number], batch, at, logprobs) for at, number in enumerate(active)]
            going = [at for at, number in enumerate(active) if rows[number].finish is None]
            if not going:
                break
            if len(going) <= _SHRINK_BELOW * len(active):
                batch.keep_rows(torch.tensor(going, device=batch.mask.device))
                active = [active[at] for at in going]
                tokens = [tokens[at] for at in going]
            self._decoder.extend(batch, [[token] for token in tokens])
        return [self._result(job, row, cached, common) for job, row in zip(jobs, rows, strict=True)]

    def _step(self, row: Row, batch: Batch, at: int, logprobs: torch.Tensor | None) -> int:
        """One row's next token; a row that has ended only keeps the batch's shape."""
        if row.finish is not None:
            return self.inputs.token_id["<|endoftext|>"]
        if logprobs is not None:
            row.logprobs.append(logprobs[at])
        token = row.choose(batch.logits[at])
        row.add(token)
        return token

    def _candidate_ids(self, jobs: Sequence[_Job]) -> tuple[list[int], list[int]]:
        request = jobs[0].request  # a batch shares them
        asked = request.candidates if request.label_fields else ()
        return self._vocabulary.first_difference(asked) if asked else ([], [])

    def _result(self, job: _Job, row: Row, cached: int, common: Sequence[int]) -> EngineResult:
        usage = Usage(
            prompt_tokens=len(job.prompt.ids),
            cached_tokens=cached,
            completion_tokens=len(row.tokens) + (row.finish == "stop"),
        )
        return EngineResult(
            text=job.request.forced_prefix + self._vocabulary.text(row.tokens),
            finish_reason=row.finish or "error",
            token_ids=tuple(row.tokens),
            label_logprobs=row.label_logprobs(common) if job.request.label_fields else {},
            usage=usage,
        )

    def _score_batch(self, jobs: Sequence[_Job], slots: Sequence[str], candidates: Sequence[str]) -> list[ScoreResult]:
        batch, cached = self._prefill(jobs)
        common, ids = self._vocabulary.first_difference(candidates)
        logprobs: list[list[tuple[float, ...]]] = [[] for _ in jobs]
        chosen: list[list[int]] = [[] for _ in jobs]
        read = [0] * len(jobs)
        for number in range(len(slots)):
            if number:
                further = [self.inputs.tokens(candidates[picks[-1]] + slots[number])[len(common) :] for picks in chosen]
                read = [count + len(tokens) for count, tokens in zip(read, further, strict=True)]
                self._decoder.extend(batch, further)
            if common:
                read = [count + len(common) for count in read]
                self._decoder.extend(batch, [common] * len(jobs))
            _check_finite(batch.logits)
            here = batch.logits[:, ids] - batch.logits.logsumexp(-1, keepdim=True)
            for place, values in enumerate(here.tolist()):
                logprobs[place].append(tuple(values))
                chosen[place].append(max(range(len(values)), key=values.__getitem__))
        return [
            ScoreResult(
                tuple(values),
                tuple(picks),
                Usage(prompt_tokens=len(job.prompt.ids) + extra, cached_tokens=cached, completion_tokens=len(slots)),
            )
            for job, values, picks, extra in zip(jobs, logprobs, chosen, read, strict=True)
        ]


def _shared_settings(request: EngineRequest) -> tuple[object, ...]:
    """What all requests of a batch must agree on."""
    return request.pixels, request.candidates if request.label_fields else ()


def _fault(error: Exception) -> GuardError:
    """What a failure looks like from outside; an unforeseen one's text stays in, for it may quote the input."""
    if isinstance(error, GuardError):
        return error
    _log.warning("the model failed: %s", type(error).__name__)
    _log.debug("the model failed", exc_info=error)
    return EngineError(f"the model failed ({type(error).__name__}): try a smaller input")


def _check_finite(logits: torch.Tensor) -> None:
    if not logits.isfinite().all():
        raise FloatingPointError("the model gave NaN or infinity")


def _dtype(wanted: DType, device: str) -> torch.dtype:
    """bf16 where the hardware computes in it, else fp32."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bf16" else torch.float32
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capable = torch.cpu.get_capabilities()
    return torch.bfloat16 if capable.get("avx512_bf16") or capable.get("amx_bf16") else torch.float32


def _load(folder: Path, dtype: torch.dtype) -> Any:
    """The network; a folder whose weights are broken or do not fill it is refused, never filled up at random."""
    try:
        network, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{folder}: cannot be loaded ({reason}); download it again") from error
    lacking = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if lacking:
        raise ModelError(
            f"{folder}: {len(lacking)} weights are missing or of another shape ({lacking[0]:.80}); download it again"
        )
    return network


def _context(config: dict[str, Any]) -> int:
    text = config.get("text_config") or config
    return int(text.get("max_position_embeddings", 32_768))
