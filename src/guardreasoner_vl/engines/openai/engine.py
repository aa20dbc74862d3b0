"""The engine for OpenAI-compatible servers such as vLLM.

    engine = OpenAIEngine(base_url="http://localhost:8000/v1").connect()

The forced prefix needs vLLM's `continue_final_message`, scores need `top_logprobs`. `probe` finds out once what the
server supports and sets `capabilities`. `ban_empty_think` cannot be sent to a server, so an answer may have an empty
think.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from guardreasoner_vl.engines.base import EngineResult, FinishReason, ScoreResult
from guardreasoner_vl.engines.label_scores import compare_candidates, likeliest, read_labels
from guardreasoner_vl.engines.openai.chat import ONE_TOKEN, STREAMED, chat_payload, logprob_parameters, sampling
from guardreasoner_vl.engines.openai.chat_stream import UpstreamError, chunks_of, is_event_stream
from guardreasoner_vl.engines.openai.completion import INTERRUPTED, StreamedCompletion, malformed, read_completion
from guardreasoner_vl.engines.openai.http import REFUSED, HttpClient, HttpError, LoopThread, openai_key
from guardreasoner_vl.engines.openai.probe import choose_model, probe_server
from guardreasoner_vl.engines.validation import check_request, check_scoring, error_result, error_score
from guardreasoner_vl.errors import EngineError, GuardError, RequestCancelledError
from guardreasoner_vl.types import ModelInfo, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    import httpx

    from guardreasoner_vl.engines.base import Capabilities, EngineRequest, StreamListener
    from guardreasoner_vl.engines.openai.completion import Completion

ResultT = TypeVar("ResultT", EngineResult, ScoreResult)

_FINISH: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}
_BROKEN_OFF = (None, "abort", "error")
"""Finish reasons of the server's own faults; what is judged may cause others, such as `content_filter`."""


class OpenAIEngine:
    """Sends requests to a server over HTTP. A failed request gets a result with an error code and a one-line message.

    `model` None uses the first model that the server lists; `api_key` None reads OPENAI_API_KEY. `timeout` is the time
    in seconds for one HTTP answer, retries and pauses included, time in the queue excluded. `extra_body` is added to
    each request's JSON and overrides its fields. The property `model` is `info` if that is set, else the served name.
    The engine can be used from several threads and event loops at once.
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
        info: ModelInfo | None = None,
    ) -> None:
        self._http = HttpClient(
            base_url,
            openai_key(api_key),
            max_concurrency=max_concurrency,
            timeout=timeout,
            retries=retries,
        )
        self._requested_model = model
        self._extra_body = dict(extra_body or {})
        self._info = info
        self._loop = LoopThread()
        self._model: str | None = None
        self._capabilities: Capabilities | None = None
        self._neutral: Mapping[str, float] = {}

    def connect(self) -> Self:
        """Probe the server and return the engine, which is closed if that fails. Raises what `probe` raises."""
        try:
            self.probe()
        except BaseException:
            self.close()
            raise
        return self

    def probe(self) -> None:
        """Find the model and the server's capabilities with a few short requests.

        Raises `ModelError` if the model is not served and `EngineError` if the server cannot be used.
        """
        self._loop.run_all([self._probe()])

    @property
    def model(self) -> ModelInfo:
        """The served model, or `info` if that was passed. Raises `EngineError` before `connect`."""
        if self._model is None:
            raise EngineError("the engine is not connected: call connect()")
        return self._info or ModelInfo(name=self._model)

    @property
    def capabilities(self) -> Capabilities:
        """What the server supports, as `probe` measured it. Raises `EngineError` before `connect`."""
        if self._capabilities is None:
            raise EngineError("the engine is not connected: call connect()")
        return self._capabilities

    def count_tokens(self, request: EngineRequest) -> int | None:  # noqa: ARG002
        """Returns None: only the server can count, and it refuses prompts that are too long."""
        return None

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
        """Answer all requests concurrently; the batch's wall-clock seconds are shared equally."""
        started = time.perf_counter()
        return _share_seconds(self._loop.run_all(map(self._generate, requests)), time.perf_counter() - started)

    def score(
        self, requests: Sequence[EngineRequest], slots: Sequence[str], candidates: Sequence[str]
    ) -> list[ScoreResult]:
        """Compare the candidates in each slot, with one HTTP request for each slot."""
        started = time.perf_counter()
        results = self._loop.run_all(self._score(request, slots, candidates) for request in requests)
        return _share_seconds(results, time.perf_counter() - started)

    async def agenerate(self, request: EngineRequest) -> EngineResult:
        """`generate` for one request; cancelling the coroutine cancels the HTTP request."""
        return await asyncio.wrap_future(self._loop.submit(self._generate(request)))

    async def ascore(self, request: EngineRequest, slots: Sequence[str], candidates: Sequence[str]) -> ScoreResult:
        """`score` for one request; cancelling the coroutine cancels the HTTP request."""
        return await asyncio.wrap_future(self._loop.submit(self._score(request, slots, candidates)))

    def close(self) -> None:
        """Close the connections; requests in progress get error results."""
        self._http.stop()
        self._loop.close(self._http.aclose)

    async def _probe(self) -> None:
        served = await choose_model(self._http, self._requested_model)
        self._capabilities, self._neutral = await probe_server(self._http, served)
        self._model = served.id

    async def _generate(self, request: EngineRequest) -> EngineResult:
        try:
            check_request(request, self.capabilities)
            extra = sampling(request)
            if request.label_fields and self.capabilities.scores:
                extra |= logprob_parameters()
            started = time.perf_counter()
            completion = await self._complete(request, request.forced_prefix, extra, request.listener)
            return _result(request, completion, time.perf_counter() - started)
        except GuardError as error:
            return error_result(error)

    async def _score(self, request: EngineRequest, slots: Sequence[str], candidates: Sequence[str]) -> ScoreResult:
        logprobs: list[tuple[float, ...]] = []
        prefix, usage = request.forced_prefix, Usage()
        try:
            check_scoring(request, self.capabilities)
            for slot in slots:
                prefix += slot
                started = time.perf_counter()
                completion = await self._complete(request, prefix, ONE_TOKEN | logprob_parameters())
                usage += completion.used(time.perf_counter() - started)
                logprobs.append(_label_logprobs(completion, candidates))
                prefix += candidates[likeliest(logprobs[-1])]
        except GuardError as error:
            return error_score(error)
        return ScoreResult(tuple(logprobs), tuple(map(likeliest, logprobs)), usage)

    async def _complete(
        self, request: EngineRequest, prefix: str, parameters: Mapping[str, Any], listener: StreamListener | None = None
    ) -> Completion:
        def payload() -> dict[str, Any]:
            streamed = STREAMED if listener else {}
            base = {"model": self._model, **chat_payload(request, prefix), **self._neutral}
            return {**base, **parameters, **streamed, **self._extra_body}

        if listener:
            completion = await self._http.post_streamed("chat/completions", payload, partial(_read_streamed, listener))
        else:
            completion = read_completion(await self._http.post("chat/completions", payload))
        if completion.finish_reason not in _FINISH:
            code = HttpError.code if completion.finish_reason in _BROKEN_OFF else REFUSED
            reason = f"finish reason {completion.finish_reason!r:.40}"
            raise HttpError(f"the server ended the answer early ({reason}): see the server's log", code)
        return completion


async def _read_streamed(listener: StreamListener, response: httpx.Response) -> Completion:
    """Read the answer and pass its text to `listener` as it arrives. Raises `RequestCancelledError`."""
    listener.on_start()
    if not is_event_stream(response.headers.get("Content-Type", "")):
        completion = read_completion(await response.aread())
        _pass_on(listener, completion.text)
        return completion
    answer = StreamedCompletion()
    try:
        async with aclosing(chunks_of(_bytes_of(response))) as chunks:
            async for chunk in chunks:
                _pass_on(listener, answer.add(chunk))
    except UpstreamError:
        raise EngineError(INTERRUPTED) from None
    except (ValueError, RecursionError):
        raise malformed("not JSON") from None
    return answer.completion


async def _bytes_of(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    async for body in response.aiter_bytes():
        yield body


def _pass_on(listener: StreamListener, text: str) -> None:
    if text:
        listener.on_text(text)
    if listener.cancelled:
        raise RequestCancelledError


def _result(request: EngineRequest, completion: Completion, seconds: float) -> EngineResult:
    if completion.reasoning_split_off:
        raise EngineError("the server removes the reasoning from the answer: start it without --reasoning-parser")
    labels = read_labels(
        request.forced_prefix, completion.text, completion.tokens(), request.label_fields, request.candidates
    )
    return EngineResult(
        request.forced_prefix + completion.text,
        _FINISH[completion.finish_reason],
        label_logprobs=labels,
        usage=completion.used(seconds),
    )


def _label_logprobs(completion: Completion, candidates: Sequence[str]) -> tuple[float, ...]:
    tokens = completion.tokens()
    logprobs = compare_candidates(tokens[0].top, candidates) if tokens else None
    if logprobs is None:
        message = "none of the model's likeliest next tokens starts a label: use mode 'slow' with this model"
        raise HttpError(message, "no_score" if tokens else HttpError.code)  # the judged text may turn a label away
    return logprobs


def _share_seconds(results: Sequence[ResultT], seconds: float) -> list[ResultT]:
    """Split the batch's wall-clock seconds equally; concurrent requests' own times would add up to more."""
    return [
        replace(result, usage=result.usage.model_copy(update={"seconds": seconds / len(results)})) for result in results
    ]
