"""The reference engine: runs Qwen2.5-VL models in this process, on the CPU or a GPU."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch

from guardreasoner_vl.engines.adapter import merge_folder, processor_folder
from guardreasoner_vl.engines.base import Capabilities, EngineRequest, EngineResult, ScoreResult
from guardreasoner_vl.engines.decoding import Batch, Decoder, Prefix
from guardreasoner_vl.engines.isolation import ResultT, isolate, reported
from guardreasoner_vl.engines.jobs import MAX_TOKENS, EncodedRequest, batches, prompt_key, same_prompts
from guardreasoner_vl.engines.model_files import check_folder, context_length, model_info, resolve_folder
from guardreasoner_vl.engines.qwen import QwenInputs
from guardreasoner_vl.engines.sampling import GenerationRow, Vocabulary, choose_tokens
from guardreasoner_vl.engines.validation import check_length, check_request, error_result, error_score
from guardreasoner_vl.engines.weights import load_network
from guardreasoner_vl.errors import EngineError, RequestCancelledError
from guardreasoner_vl.types import ModelInfo, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence
    from pathlib import Path

    from PIL.Image import Image

    from guardreasoner_vl.engines.qwen import Encoded
    from guardreasoner_vl.engines.weights import DType
    from guardreasoner_vl.errors import GuardError
    from guardreasoner_vl.types import CheckedImage

_SHRINK_BELOW = 0.75


class TransformersEngine:
    """Runs a Qwen2.5-VL on the network's device; `load` opens a folder or a hub id, `of_network` takes a network.

    `max_rows` and `max_tokens` bound one batch (rows, and rows times longest prompt).
    """

    def __init__(self, decoder: Decoder, info: ModelInfo, max_rows: int = 32, max_tokens: int = MAX_TOKENS) -> None:
        self.inputs = decoder.inputs
        self._info = info
        self.decoder = decoder
        self._vocabulary = Vocabulary(decoder.inputs)
        self._max_rows, self._max_tokens = max_rows, max_tokens
        self._max_context = context_length(decoder.model.config.to_dict())
        self._prefix: Prefix | None = None
        self._opened: dict[CheckedImage, Image] = {}
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        model: str,
        revision: str | None = None,
        *,
        dtype: DType = "auto",
        adapter: Path | None = None,
        **limits: int,
    ) -> Self:
        """Open 'embedded', a folder, or a hub id: safetensors weights, never remote code. Raises `ModelError`.

        The LoRA adapter in the folder `adapter` is merged into the network.
        """
        folder = resolve_folder(model, revision)
        check_folder(folder)
        inputs = QwenInputs.from_folder(folder, processor_folder(folder, adapter))
        return cls(cls._open(folder, inputs, dtype, adapter), model_info(model, folder, revision, adapter), **limits)

    @staticmethod
    def _open(folder: Path, inputs: QwenInputs, dtype: DType, adapter: Path | None) -> Decoder:
        network = load_network(folder, dtype)
        if adapter:
            merge_folder(network, adapter)
        return Decoder(network, inputs)

    @classmethod
    def of_network(cls, network: Any, inputs: QwenInputs, info: ModelInfo, **limits: int) -> Self:
        """Wrap a network in memory, such as that of a training run; its training mode is restored after each call.

        The caller must call `forget` after changing the weights.
        """
        return cls(Decoder(network, inputs), info, **limits)

    @property
    def model(self) -> ModelInfo:
        """The model's name, and its revision or the digest of its weights."""
        return self._info

    @property
    def capabilities(self) -> Capabilities:
        """Everything that an engine can support, and the context length in the model's configuration."""
        return Capabilities(
            images=True, scores=True, forced_prefix=True, prefix_cache=True, max_context=self._max_context
        )

    @property
    def network(self) -> Any:
        """The transformers model itself."""
        return self.decoder.model

    def count_tokens(self, request: EngineRequest) -> int:
        """Number of prompt tokens of `request`, images and forced prefix included. Raises `InputError`."""
        return len(self._encode(request).ids)

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
        """Answer all requests in batches of similar prompt length; the results are in the requests' order."""
        return self._run(requests, self._generate_batch, error_result)

    def score(
        self, requests: Sequence[EngineRequest], slots: Sequence[str], candidates: Sequence[str]
    ) -> list[ScoreResult]:
        """Compare the candidates in each slot, in batches; a batch reads its prompts once for all slots."""

        def score_batch(jobs: Sequence[EncodedRequest]) -> list[ScoreResult]:
            return self._score_batch(jobs, slots, candidates)

        with_slot = [replace(request, forced_prefix=request.forced_prefix + slots[0]) for request in requests]
        return self._run(with_slot, score_batch, error_score)

    async def agenerate(self, request: EngineRequest) -> EngineResult:
        """`generate` for one request in a thread; cancelling the coroutine does not stop the computation."""
        return (await asyncio.to_thread(self.generate, [request]))[0]

    async def ascore(self, request: EngineRequest, slots: Sequence[str], candidates: Sequence[str]) -> ScoreResult:
        """`score` for one request in a thread; cancelling the coroutine does not stop the computation."""
        return (await asyncio.to_thread(self.score, [request], slots, candidates))[0]

    def forget(self) -> None:
        """Discard what was computed with the old weights; call it after each change of the weights."""
        self._prefix = None

    def close(self) -> None:
        """Free the prefix cache; the network is freed with the engine."""
        self.forget()

    def _encode(self, request: EngineRequest) -> Encoded:
        return self.inputs.encode(request.messages, request.images, request.forced_prefix, request.pixels)

    def _run(
        self,
        requests: Sequence[EngineRequest],
        work: Callable[[Sequence[EncodedRequest]], list[ResultT]],
        refused: Callable[[GuardError], ResultT],
    ) -> list[ResultT]:
        """Encode, batch by length, run `work`, and return the results in order; a bad request affects no other."""
        results: dict[int, ResultT] = {}
        prompts: dict[Hashable, Encoded] = {}
        jobs: list[EncodedRequest] = []
        for place, request in enumerate(requests):
            try:
                key = prompt_key(request)
                if key not in prompts:
                    prompts[key] = self._checked(request)
                jobs.append(EncodedRequest(place, request, prompts[key]))
            except Exception as error:
                results[place] = refused(reported(error))
        with self._at_work():
            for batch in batches(jobs, self._max_rows, self._max_tokens):
                for job, result in zip(batch, isolate(batch, work, refused), strict=True):
                    results[job.place] = result
        return [results[place] for place in range(len(requests))]

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Allow one call at a time, in evaluation mode; restore each module's mode afterwards."""
        with self._lock:
            training = [module for module in self.network.modules() if module.training]
            self.network.eval()
            try:
                yield
            finally:
                for module in training:
                    module.training = True
                self._opened = {}

    def _checked(self, request: EngineRequest) -> Encoded:
        check_request(request, self.capabilities)
        prompt = self._encode(request)
        check_length(len(prompt.ids), self._max_context)
        return prompt

    def _prefill(self, jobs: Sequence[EncodedRequest]) -> tuple[Batch, int]:
        """Read the jobs' prompts, equal ones once; returns the batch and each row's number of cached tokens."""
        runs = same_prompts(jobs)
        firsts = [run[0] for run in runs]
        prefix = self._prefix_of(firsts)
        batch = self.decoder.prefill(
            [job.prompt for job in firsts], self._images(firsts), prefix, firsts[0].request.pixels
        )
        if len(runs) < len(jobs):
            batch.keep_rows(torch.tensor([row for row, run in enumerate(runs) for _ in run], device=batch.mask.device))
        return batch, len(prefix.ids) if prefix else 0

    def _images(self, jobs: Sequence[EncodedRequest]) -> list[Image]:
        """The jobs' images, each decoded once; images of the previous batch are reused."""
        images = [image for job in jobs for image in job.request.images]
        previous = self._opened
        self._opened = {image: previous.get(image) or image.open() for image in dict.fromkeys(images)}
        return [self._opened[image] for image in images]

    def _prefix_of(self, jobs: Sequence[EncodedRequest]) -> Prefix | None:
        """The cached prefix if all these prompts start with it; built from the first system message ever used."""
        if self._prefix is None and jobs[0].request.messages[0].role == "system":
            head = jobs[0].request.messages[0].text
            ids = self.inputs.tokens(f"<|im_start|>system\n{head}<|im_end|>\n<|im_start|>user\n")
            self._prefix = self.decoder.compute_prefix(ids)
        shared = self._prefix is not None and all(self._prefix.starts(job.prompt.ids) for job in jobs)
        return self._prefix if shared else None

    def _generate_batch(self, jobs: Sequence[EncodedRequest]) -> list[EngineResult]:
        batch, cached = self._prefill(jobs)
        common, ids = self._candidate_ids(jobs)
        rows = [
            GenerationRow(
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
            stepping = [rows[number] for number in active]
            tokens = choose_tokens(batch.logits, stepping, self._vocabulary)
            for index, row in enumerate(stepping):
                if row.finish is None:  # finished rows stay until the batch is shrunk
                    if logprobs is not None:
                        row.logprobs.append(logprobs[index])
                    row.add(tokens[index])
                    row.report()
            unfinished = [index for index, row in enumerate(stepping) if row.finish is None]
            if not unfinished:
                break
            if len(unfinished) <= _SHRINK_BELOW * len(active):
                batch.keep_rows(torch.tensor(unfinished, device=batch.mask.device))
                active = [active[index] for index in unfinished]
                tokens = [tokens[index] for index in unfinished]
            self.decoder.extend(batch, [[token] for token in tokens])
        return [self._result(job, row, cached, common) for job, row in zip(jobs, rows, strict=True)]

    def _candidate_ids(self, jobs: Sequence[EncodedRequest]) -> tuple[list[int], list[int]]:
        request = jobs[0].request  # all requests of a batch have the same candidates
        candidates = request.candidates if request.label_fields else ()
        return self._vocabulary.first_difference(candidates) if candidates else ([], [])

    def _result(self, job: EncodedRequest, row: GenerationRow, cached: int, common: Sequence[int]) -> EngineResult:
        if row.finish == "error":
            return error_result(RequestCancelledError())
        usage = Usage(
            prompt_tokens=len(job.prompt.ids),
            cached_tokens=cached,
            completion_tokens=len(row.tokens) + (row.finish == "stop"),
        )
        return EngineResult(
            text=job.request.forced_prefix + self._vocabulary.text(row.tokens),
            finish_reason=row.finish or "error",
            token_ids=tuple(row.tokens),
            end_id=row.end_id,
            label_logprobs=row.label_logprobs(common) if job.request.label_fields else {},
            usage=usage,
        )

    def _score_batch(
        self, jobs: Sequence[EncodedRequest], slots: Sequence[str], candidates: Sequence[str]
    ) -> list[ScoreResult]:
        batch, cached = self._prefill(jobs)
        common, ids = self._vocabulary.first_difference(candidates)
        logprobs: list[list[tuple[float, ...]]] = [[] for _ in jobs]
        chosen: list[list[int]] = [[] for _ in jobs]
        extra_tokens = [0] * len(jobs)
        for number in range(len(slots)):
            if number:
                further = [self.inputs.tokens(candidates[picks[-1]] + slots[number])[len(common) :] for picks in chosen]
                extra_tokens = [count + len(tokens) for count, tokens in zip(extra_tokens, further, strict=True)]
                self.decoder.extend(batch, further)
            if common:
                extra_tokens = [count + len(common) for count in extra_tokens]
                self.decoder.extend(batch, [common] * len(jobs))
            _check_finite(batch.logits)
            slot_logprobs = batch.logits[:, ids] - batch.logits.logsumexp(-1, keepdim=True)
            for place, values in enumerate(slot_logprobs.tolist()):
                logprobs[place].append(tuple(values))
                chosen[place].append(max(range(len(values)), key=values.__getitem__))
        return [
            ScoreResult(
                tuple(values),
                tuple(picks),
                Usage(prompt_tokens=len(job.prompt.ids) + extra, cached_tokens=cached, completion_tokens=len(slots)),
            )
            for job, values, picks, extra in zip(jobs, logprobs, chosen, extra_tokens, strict=True)
        ]


def _check_finite(logits: torch.Tensor) -> None:
    if not torch.stack(logits.aminmax()).isfinite().all():  # minimum and maximum are NaN if any value is
        raise EngineError("the model returned NaN or infinity: load it with dtype fp32, or download it again")
