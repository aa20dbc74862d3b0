"""Answers that come whole, and answers in another form than was asked for: each is judged, then sent."""

from __future__ import annotations

import json
from itertools import chain
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.engines.openai.chat_stream import ChatEvents, ReportedError, UpstreamError, reported_error
from guardreasoner_vl.engines.openai.mending import plain
from guardreasoner_vl.service.answers import (
    END,
    FILTERED,
    GrowingAnswer,
    all_of,
    answer_of,
    beside_choices,
    data_event,
    leaving_chunk,
    quotable,
    spelled,
)
from guardreasoner_vl.service.passing import leaving, leaving_choice
from guardreasoner_vl.service.wire import blocked_reason

if TYPE_CHECKING:
    from guardreasoner_vl.service.answers import Judge

_TOKENS = ("content", "refusal")
"""The texts whose log-probabilities leave."""

_OF_A_TOKEN = ("token", "logprob", "bytes", "top_logprobs")


async def released(body: bytes, judge: Judge) -> dict[str, Any]:
    """A whole completion, each choice judged, a refusal in the place of one that is blocked.

    Raises `UpstreamError` if the server reports an error or there is no answer, and one of `MALFORMED` for an answer of
    unknown form.
    """
    return await _released(plain(json.loads(body)), judge)


async def released_events(body: bytes, judge: Judge) -> dict[str, Any]:
    """`released` for a whole answer in server-sent events. Raises `EngineError` too, if an event is too long."""
    events = ChatEvents()
    answers: dict[int, GrowingAnswer] = {}
    ends: dict[int, str | None] = {}
    beside: dict[str, Any] = {}
    try:
        chunks = [leaving_chunk(chunk) for chunk in chain(events.feed(body), events.finish())]
    except ReportedError as error:
        raise UpstreamError(await quotable(str(error), judge)) from None
    for chunk in chunks:
        beside |= beside_choices(chunk)
        for choice in chunk["choices"]:
            index = choice["index"]
            answers.setdefault(index, GrowingAnswer()).add(choice["delta"])
            ends[index] = choice["finish_reason"] or ends.get(index)
    choices = []
    for index, answer in sorted(answers.items()):
        message = {"role": "assistant", "content": None, **answer.whole}
        choices.append({"index": index, "message": message, "finish_reason": ends[index]})
    return await _released({**beside, "object": "chat.completion", "choices": choices}, judge)


def as_stream(completion: dict[str, Any]) -> bytes:
    """A released completion as a stream of one piece."""
    choices = []
    for choice in completion["choices"]:
        delta = choice["message"]
        if calls := delta.get("tool_calls"):
            delta = {**delta, "tool_calls": [{"index": place, **call} for place, call in enumerate(calls)]}
        choices.append({"index": choice["index"], "delta": delta, "finish_reason": choice["finish_reason"]})
    return data_event({**completion, "object": "chat.completion.chunk", "choices": choices}) + END


async def _released(completion: Any, judge: Judge) -> dict[str, Any]:
    if not isinstance(completion, dict):
        raise ValueError("a completion is not a JSON object")
    if (message := reported_error(completion)) is not None:
        raise UpstreamError(await quotable(message, judge))
    choices = completion.get("choices")
    if choices is None or choices == []:
        raise UpstreamError("the model's answer holds no choice: ask again")
    if any(choice.get("message") is None and not choice.get("text") for choice in choices):
        raise UpstreamError("the model's answer holds a choice without a message: ask again")

    async def judged(choice: dict[str, Any]) -> dict[str, Any]:
        message, ending = leaving(choice["message"]), leaving_choice(choice)
        logprobs = _leaving_logprobs(choice)
        verdict = await judge(_with_tokens(answer_of(message), logprobs))
        if verdict.action == "allow":
            return {**ending, **logprobs, "message": message}
        refusal = {"role": "assistant", "content": None, "refusal": blocked_reason(verdict)}
        return {**ending, "message": refusal, "finish_reason": FILTERED}

    return {**beside_choices(completion), "choices": await all_of(map(judged, choices))}


def _leaving_logprobs(choice: dict[str, Any]) -> dict[str, Any]:
    """The token log-probabilities of the answer's texts, if there are any."""
    given = choice.get("logprobs")
    lists = given if isinstance(given, dict) else {}
    kept = {
        name: [{key: token[key] for key in _OF_A_TOKEN if key in token} for token in lists[name]]
        for name in _TOKENS
        if isinstance(lists.get(name), list)
    }
    return {"logprobs": kept or None} if "logprobs" in choice else {}


def _with_tokens(answer: dict[str, Any], logprobs: dict[str, Any]) -> dict[str, Any]:
    """The answer with what its tokens spell, where its own text does not hold that: reasoning that was left out."""
    tokens = spelled(logprobs.get("logprobs"))
    parts = answer["content"] or []
    if not tokens or any(tokens in part.get("text", "") for part in parts):
        return answer
    return {**answer, "content": [*parts, {"type": "text", "text": tokens}]}
