"""Any OpenAI-compatible server, such as vLLM, as an engine.

    engine = OpenAIEngine.connect(base_url="http://localhost:8000/v1")

Full use needs vLLM's `continue_final_message` (forced prefix) and `top_logprobs` (scores); what the server
lacks is found out once, in `probe`, and declared in `capabilities`. `ban_empty_think` has no counterpart
on the wire: the strict parser sees an empty think as it stands.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from guardreasoner_vl.engines.base import EngineResult, FinishReason, ScoreResult
from guardreasoner_vl.engines.label_scores import compare, likeliest, read_labels
from guardreasoner_vl.engines.openai.chat import (
    BROKEN_OFF,
    ONE_TOKEN,
    STREAMED,
    GrowingCompletion,
    chat_payload,
    malformed,
    read_completion,
    sampling,
    with_logprobs,
)
from guardreasoner_vl.engines.openai.chat_stream import UpstreamError, chunks_of, is_event_stream
from guardreasoner_vl.engines.openai.http import HttpClient, LoopThread
from guardreasoner_vl.engines.openai.probe import choose_model, probe_server
from guardreasoner_vl.engines.validation import check_request, check_scoring, failed, unscored
from guardreasoner_vl.errors import CalledOffError, EngineError, GuardError
from guardreasoner_vl.types import ModelInfo, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    import httpx

    from guardreasoner_vl.engines.base import Capabilities, EngineRequest, Watch
    from guardreasoner_vl.engines.openai.chat import Completion

Result = TypeVar("Result", EngineResult, ScoreResult)

_FINISH: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}


class OpenAIEngine:
    """Asks a server over HTTP; all faults of one request end in its result, `code` and one line of text.

    `model` None takes the first one that the server lists; `api_key` None reads OPENAI_API_KEY. `timeout`
    is in seconds for one HTTP answer, retries and pauses included, time in the queue not. `extra_body`
    is added to each request's JSON and wins over what stands there. Safe to use from several threads and
    event loops at once.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str | None = None,
        api_key: str | None = None,
        max_concurrency: int = 32,
        timeout: float = 120.0,
        retries: int = 3,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        self._http = HttpClient(
            base_url,
            os.environ.get("OPENAI_API_KEY") if api_key is None else api_key,
            max_concurrency=max_concurrency,
            timeout=timeout,
            retries=retries,
        )
        self._wanted = model
        self._extra_body = dict(extra_body or {})
        self._loop = LoopThread()
        self._model: str | None = None
        self._capabilities: Capabilities | None = None
        self._neutral: Mapping[str, float] = {}

    @classmethod
    def connect(
        cls,
        *,
        base_url: str,
        model: str | None = None,
        api_key: str | None = None,
        max_concurrency: int = 32,
        timeout: float = 120.0,
        retries: int = 3,
        extra_body: Mapping[str, Any] | None = None,
    ) -> Self:
        """A probed engine. Raises what `probe` raises."""
        engine = cls(
            base_url=base_url,
            model=model,
            api_key=api_key,
            max_concurrency=max_concurrency,
            timeout=timeout,
            retries=retries,
            extra_body=extra_body,
        )
        try:
            engine.probe()
        except BaseException:
            engine.close()
            raise
        return engine

    def probe(self) -> None:
        """Find the model and what the server can do, with a few tiny requests.

        Raises `ModelError` if the model is not served and `EngineError` if the server cannot be used.
        """
        self._loop.run_all([self._probe()])

    @property
    def model(self) -> ModelInfo:
        if self._model is None:
            raise EngineError("the engine is not connected: use OpenAIEngine.connect(...) or call probe()")
        return ModelInfo(name=self._model)

    @property
    def capabilities(self) -> Capabilities:
        if self._capabilities is None:
            raise EngineError("the engine is not connected: use OpenAIEngine.connect(...) or call probe()")
        return self._capabilities

    def count_tokens(self, request: EngineRequest) -> int | None:  # noqa: ARG002
        """None: the server counts, and refuses what is too long instead of cutting it."""
        return None

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
        started = time.perf_counter()
        return _shared_out(self._loop.run_all(map(self._generate, requests)), time.perf_counter() - started)

    def score(
        self, requests: Sequence[EngineRequest], slots: Sequence[str], candidates: Sequence[str]
    ) -> list[ScoreResult]:
        started = time.perf_counter()
        results = self._loop.run_all(self._score(request, slots, candidates) for request in requests)
        return _shared_out(results, time.perf_counter() - started)

    async def agenerate(self, request: EngineRequest) -> EngineResult:
        return await asyncio.wrap_future(self._loop.submit(self._generate(request)))

    async def ascore(self, request: EngineRequest, slots: Sequence[str], candidates: Sequence[str]) -> ScoreResult:
        return await asyncio.wrap_future(self._loop.submit(self._score(request, slots, candidates)))

    def close(self) -> None:
        """End the connections; requests under way get error results."""
        self._http.stop()
        self._loop.close(self._http.aclose)

    async def _probe(self) -> None:
        served = await choose_model(self._http, self._wanted)
        self._capabilities, self._neutral = await probe_server(self._http, served)
        self._model = served.id

    async def _generate(self, request: EngineRequest) -> EngineResult:
        try:
            check_request(request, self.capabilities)
            extra = sampling(request)
            if request.label_fields and self.capabilities.scores:
                extra |= with_logprobs()
            started = time.perf_counter()
            completion = await self._complete(request, request.forced_prefix, extra, request.watch)
            return _result(request, completion, time.perf_counter() - started)
        except GuardError as error:
            return failed(error)

    async def _score(self, request: EngineRequest, slots: Sequence[str], candidates: Sequence[str]) -> ScoreResult:
        logprobs: list[tuple[float, ...]] = []
        prefix, usage = request.forced_prefix, Usage()
        try:
            check_scoring(request, self.capabilities)
            for slot in slots:
                prefix += slot
                started = time.perf_counter()
                completion = await self._complete(request, prefix, ONE_TOKEN | with_logprobs())
                usage += completion.used(time.perf_counter() - started)
                logprobs.append(_compared(completion, candidates))
                prefix += candidates[likeliest(logprobs[-1])]
        except GuardError as error:
            return unscored(error)
        return ScoreResult(tuple(logprobs), tuple(map(likeliest, logprobs)), usage)

    async def _complete(
        self, request: EngineRequest, prefix: str, how: Mapping[str, Any], watch: Watch | None = None
    ) -> Completion:
        def payload() -> dict[str, Any]:
            streamed = STREAMED if watch else {}
            sent = {"model": self.model.name, **chat_payload(request, prefix), **self._neutral}
            return {**sent, **how, **streamed, **self._extra_body}

        if watch:
            completion = await self._http.post_streamed("chat/completions", payload, partial(_watched, watch))
        else:
            completion = read_completion(await self._http.post("chat/completions", payload))
        if completion.finish_reason not in _FINISH:
            raise EngineError(f"the server ended the answer early (finish reason {completion.finish_reason!r:.40})")
        return completion


async def _watched(watch: Watch, response: httpx.Response) -> Completion:
    """The answer, reported to `watch` as it arrives. Raises `CalledOffError` if the watch gives up."""
    watch.begin()
    if not is_event_stream(response.headers.get("Content-Type", "")):
        completion = read_completion(await response.aread())
        _tell(watch, completion.text)
        return completion
    answer = GrowingCompletion()
    try:
        async with aclosing(chunks_of(_bytes_of(response))) as chunks:
            async for chunk in chunks:
                _tell(watch, answer.add(chunk))
    except UpstreamError:
        raise EngineError(BROKEN_OFF) from None
    except (ValueError, RecursionError):
        raise malformed("not JSON") from None
    return answer.completion


async def _bytes_of(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    async for body in response.aiter_bytes():
        yield body


def _tell(watch: Watch, text: str) -> None:
    if text:
        watch.tell(text)
    if watch.called_off:
        raise CalledOffError


def _result(request: EngineRequest, completion: Completion, seconds: float) -> EngineResult:
    if completion.reasoning_split_off:
        raise EngineError("the server cuts the reasoning out of the answer: start it without --reasoning-parser")
    labels = read_labels(
        request.forced_prefix, completion.text, completion.tokens(), request.label_fields, request.candidates
    )
    return EngineResult(
        request.forced_prefix + completion.text,
        _FINISH[completion.finish_reason],
        label_logprobs=labels,
        usage=completion.used(seconds),
    )


def _compared(completion: Completion, candidates: Sequence[str]) -> tuple[float, ...]:
    tokens = completion.tokens()
    logprobs = compare(tokens[0].top, candidates) if tokens else None
    if logprobs is None:
        raise EngineError("no label is among the model's likeliest next tokens: use mode 'slow' with this model")
    return logprobs


def _shared_out(results: Sequence[Result], seconds: float) -> list[Result]:
    """The batch's seconds in equal parts: requests overlap, so their own would add up to more."""
    return [
        replace(result, usage=result.usage.model_copy(update={"seconds": seconds / len(results)})) for result in results
    ]
