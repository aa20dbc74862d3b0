"""Guard complete answers, and convert an answer that came in the form that was not requested (stream or JSON)."""

from __future__ import annotations

import json
from itertools import chain
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.engines.openai.chat_stream import ChatEvents, ReportedError, UpstreamError, reported_error
from guardreasoner_vl.engines.openai.mending import plain
from guardreasoner_vl.service.answers import (
    END,
    FILTERED,
    PartialAnswer,
    allowed_chunk,
    completion_metadata,
    data_event,
    gather_or_cancel,
    judged_message,
    quotable,
    token_text,
)
from guardreasoner_vl.service.chat_fields import allowed_choice, allowed_message
from guardreasoner_vl.service.wire import blocked_reason

if TYPE_CHECKING:
    from guardreasoner_vl.service.answers import Judge

_TOKENS = ("content", "refusal")
"""The lists of log-probabilities that are sent: those of the message's texts."""

_OF_A_TOKEN = ("token", "logprob", "bytes", "top_logprobs")


async def guard_completion(body: bytes, judge: Judge) -> dict[str, Any]:
    """Judge each choice of a completion in JSON; a blocked choice is replaced by a refusal.

    Raises `UpstreamError` if the server reports an error or no answer, and one of `MALFORMED` for an unknown form.
    """
    return await _guard_choices(plain(json.loads(body)), judge)


async def guard_completion_events(body: bytes, judge: Judge) -> dict[str, Any]:
    """`guard_completion` for server-sent events, joined to a completion. An overlong event raises `EngineError`."""
    events = ChatEvents()
    answers: dict[int, PartialAnswer] = {}
    finish_reasons: dict[int, str | None] = {}
    metadata: dict[str, Any] = {}
    try:
        chunks = [allowed_chunk(chunk) for chunk in chain(events.feed(body), events.finish())]
    except ReportedError as error:
        raise UpstreamError(await quotable(str(error), judge)) from None
    for chunk in chunks:
        metadata |= completion_metadata(chunk)
        for choice in chunk["choices"]:
            index = choice["index"]
            answers.setdefault(index, PartialAnswer()).add(choice["delta"])
            finish_reasons[index] = choice["finish_reason"] or finish_reasons.get(index)
    choices = []
    for index, answer in sorted(answers.items()):
        message = {"role": "assistant", "content": None, **answer.whole}
        choices.append({"index": index, "message": message, "finish_reason": finish_reasons[index]})
    return await _guard_choices({**metadata, "object": "chat.completion", "choices": choices}, judge)


def as_stream(completion: dict[str, Any]) -> bytes:
    """A guarded completion as an event stream with one chunk."""
    choices = []
    for choice in completion["choices"]:
        delta = choice["message"]
        if calls := delta.get("tool_calls"):
            delta = {**delta, "tool_calls": [{"index": place, **call} for place, call in enumerate(calls)]}
        choices.append({"index": choice["index"], "delta": delta, "finish_reason": choice["finish_reason"]})
    return data_event({**completion, "object": "chat.completion.chunk", "choices": choices}) + END


async def _guard_choices(completion: Any, judge: Judge) -> dict[str, Any]:
    if not isinstance(completion, dict):
        raise ValueError("a completion is not a JSON object")
    if (message := reported_error(completion)) is not None:
        raise UpstreamError(await quotable(message, judge))
    choices = completion.get("choices")
    if choices is None or choices == []:
        raise UpstreamError("the model's answer holds no choice: ask again")
    if any(choice.get("message") is None and not choice.get("text") for choice in choices):
        raise UpstreamError("the model's answer holds a choice without a message: ask again")

    async def guard_choice(choice: dict[str, Any]) -> dict[str, Any]:
        message, index_and_reason = allowed_message(choice["message"]), allowed_choice(choice)
        logprobs = _allowed_logprobs(choice)
        verdict = await judge(_with_tokens(judged_message(message), logprobs))
        if verdict.action == "allow":
            return {**index_and_reason, **logprobs, "message": message}
        refusal = {"role": "assistant", "content": None, "refusal": blocked_reason(verdict)}
        return {**index_and_reason, "message": refusal, "finish_reason": FILTERED}

    return {**completion_metadata(completion), "choices": await gather_or_cancel(map(guard_choice, choices))}


def _allowed_logprobs(choice: dict[str, Any]) -> dict[str, Any]:
    """The token log-probabilities of the answer's texts, if there are any."""
    logprobs = choice.get("logprobs")
    lists = logprobs if isinstance(logprobs, dict) else {}
    kept = {
        name: [{key: token[key] for key in _OF_A_TOKEN if key in token} for token in lists[name]]
        for name in _TOKENS
        if isinstance(lists.get(name), list)
    }
    return {"logprobs": kept or None} if "logprobs" in choice else {}


def _with_tokens(answer: dict[str, Any], logprobs: dict[str, Any]) -> dict[str, Any]:
    """The answer, with the text of its tokens added if its own text lacks it (reasoning that the server left out)."""
    tokens = token_text(logprobs.get("logprobs"))
    parts = answer["content"] or []
    if not tokens or any(tokens in part.get("text", "") for part in parts):
        return answer
    return {**answer, "content": [*parts, {"type": "text", "text": tokens}]}
