"""Accumulates streamed answers from the events of any vendor, and converts them to parts to judge.

Reads OpenAI's chat deltas, Anthropic's message events and the events of the Responses API. Events may repeat content
(deltas, then the whole text, then the whole item): repeated content is judged once, differing content as well.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.engines.openai.sse import EventDecoder
from guardreasoner_vl.service.answers import token_text
from guardreasoner_vl.service.parts import (
    UnsupportedContentError,
    answer_parts,
    call_parts,
    is_text_in,
    parts_of,
    readable_fields,
    remaining_parts,
    texts_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from guardreasoner_vl.service.parts import Part

    Place = tuple[Any, ...]

_SHOWN = ("content", "reasoning_content", "reasoning", "refusal", "text", "thinking")
_CALLED = ("function", "custom")
_CALL_TEXTS = ("name", "arguments", "input")
_PLAIN_EVENTS = ("output_text", "refusal", "reasoning_text", "reasoning_summary_text", "reasoning", "reasoning_summary")
_OF_AN_EVENT = (
    *("type", "sequence_number", "item_id", "output_index", "content_index", "summary_index", "annotation_index"),
    *("obfuscation", "logprobs", "partial_image_index", "partial_image_b64", "item", "part", "response"),
)
_OF_A_RESPONSE = (
    *("id", "object", "model", "created_at", "completed_at", "status", "usage", "output", "instructions", "metadata"),
    *("tools", "tool_choice", "temperature", "top_p", "max_output_tokens", "max_tool_calls", "parallel_tool_calls"),
    *("previous_response_id", "conversation", "prompt", "reasoning", "text", "truncation", "top_logprobs", "store"),
    *("background", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "user", "type"),
    *("incomplete_details", "billing", "frequency_penalty", "presence_penalty"),
)
"""A response's metadata, and the fields that it repeats from its request."""
_OF_A_MESSAGE = ("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage", "container")
_OF_A_COMPLETION = (*("id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier"),)
_OF_A_CHOICE = ("index", "finish_reason", "delta", "message", "logprobs", "text", "stop_reason", "token_ids")


class StreamedAnswer:
    """One streamed answer. `characters` is its length so far; if `whole` is true it can only be judged at its end."""

    def __init__(self) -> None:
        self.characters = 0
        self.whole = False
        self._shown: defaultdict[Place, str] = defaultdict(str)
        self._hidden: defaultdict[Place, str] = defaultdict(str)
        self._calls: defaultdict[Place, dict[str, str]] = defaultdict(dict)
        self._parts: list[Part] = []
        self._tokens = ""

    @property
    def parts(self) -> list[Part]:
        """All content so far. Raises `UnsupportedContentError`."""
        parts = [part for text in self._shown.values() for part in parts_of(text)]
        parts += [part for call in self._calls.values() for part in call_parts(call)]
        texts = texts_of(parts)
        parts += _new_text(self._tokens, texts)
        hidden = {".".join(map(str, place)): text for place, text in self._hidden.items()}
        return [*parts, *remaining_parts(hidden, (), texts), *self._parts]

    def show(self, place: Place, text: str) -> None:
        """Append to a text that is shown to the user as it is written."""
        self.characters += len(text)
        self._shown[place] += text

    def hide(self, place: Place, text: str) -> None:
        """Append to another text, which can only be judged when it is complete."""
        if text:
            self.characters += len(text)
            self.whole = True
            self._hidden[place] += text

    def add_tokens(self, tokens: str, text_length: int) -> None:
        """Append tokens of log-probabilities; `text_length` is the length of the texts in the same chunk.

        A server may list text here that its texts lack.
        """
        self.characters += max(0, len(tokens) - text_length)
        self._tokens += tokens

    def add(self, parts: list[Part]) -> None:
        """Add complete content, unless it has already come in pieces."""
        texts = [*self._shown.values(), *self._hidden.values(), *texts_of(self._parts)]
        new = [part for part in parts if part not in self._parts and not is_text_in(part, texts)]
        if new:
            self.characters += sum(len(text) for text in texts_of(new)) + 1
            self.whole = True
            self._parts += new

    def call(self, place: Place, call: Mapping[str, Any]) -> None:
        """Append to a tool call."""
        self.whole = True
        for name in _CALL_TEXTS:
            if isinstance(call.get(name), str):
                self.characters += len(call[name])
                fields = self._calls[place]
                fields[name] = fields.get(name, "") + call[name]
        self.strings(place, {name: value for name, value in call.items() if name not in _CALL_TEXTS})

    def strings(self, place: Place, value: Any) -> None:
        """Append every string of a value to the hidden text with the same path."""
        for path, text in _strings(place, value):
            self.hide(path, text)


def _new_text(tokens: str, texts: list[str]) -> list[Part]:
    """The tokens' text as parts, unless one of the texts contains it."""
    return [] if any(tokens in text for text in texts) else parts_of(tokens)


class StreamedAnswers:
    """All answers of one stream, accumulated from its chunks or events.

    Raises `UnsupportedContentError` for content that cannot be judged.
    """

    def __init__(self) -> None:
        self._answers: defaultdict[int, StreamedAnswer] = defaultdict(StreamedAnswer)
        self._decoder = EventDecoder()
        self._tail = b"\n\n"

    @property
    def characters(self) -> int:
        """The total length of the answers so far, in characters."""
        return sum(answer.characters for answer in self._answers.values())

    @property
    def whole(self) -> bool:
        """Whether nothing may be released yet: an event is incomplete, or an answer can only be judged at its end."""
        cut = not self._tail.endswith((b"\n\n", b"\r\r", b"\r\n\r\n"))
        return cut or any(answer.whole for answer in self._answers.values())

    @property
    def parts(self) -> list[list[Part]]:
        """The parts of each answer to judge."""
        return [answer.parts for answer in self._answers.values()]

    def feed(self, raw: bytes) -> None:
        """Read server-sent events of the Responses or Messages API, cut anywhere. Raises `TooLongError`, too."""
        self._tail = (self._tail + raw)[-4:]
        for event in self._decoder.feed(raw):
            self._read(event.data)

    def finish(self) -> None:
        """Read the last event, once all bytes were fed."""
        for event in self._decoder.finish():
            self._read(event.data)

    def chunk(self, chunk: Mapping[str, Any]) -> None:
        """Read a chunk of chat or text completions."""
        for choice in chunk.get("choices") or ():
            answer = self._answers[choice.get("index") or 0]
            delta, before = choice.get("delta") or {}, answer.characters
            _add_delta(answer, delta if delta or choice.get("text") is None else {"content": choice["text"]})
            answer.add_tokens(token_text(choice.get("logprobs")), answer.characters - before)
            answer.strings(("choice",), _without_fields(choice, _OF_A_CHOICE))
        self._answers[0].strings(("chunk",), _without_fields(chunk, _OF_A_COMPLETION))

    def event(self, event: Mapping[str, Any]) -> None:
        """Read an event of the Responses or Messages API."""
        kind = event.get("type")
        if not isinstance(kind, str):
            raise UnsupportedContentError("an event of the stream names no type: see the model server's log")
        if kind.startswith("response."):
            _add_response_event(self._answers[0], kind.removeprefix("response."), event)
        else:
            _add_message_event(self._answers[0], kind, event)

    def _read(self, data: str) -> None:
        if data.strip() in ("", "[DONE]"):
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            raise UnsupportedContentError("an event of the stream is not JSON: see the model server's log") from None
        if not isinstance(event, dict):
            raise UnsupportedContentError("an event of the stream is not a JSON object: see the model server's log")
        self.chunk(event) if "choices" in event else self.event(event)


def completion_parts(completion: Mapping[str, Any]) -> list[list[Part]]:
    """The parts of each choice of a complete completion to judge."""
    rest = remaining_parts(completion, _OF_A_COMPLETION)
    choices = []
    for choice in completion.get("choices") or ():
        parts = answer_parts(choice.get("message") or {"content": choice.get("text")})
        parts += _new_text(token_text(choice.get("logprobs")), texts_of(parts))
        choices.append([*parts, *remaining_parts(choice, _OF_A_CHOICE, texts_of(parts)), *rest])
    return choices


def message_parts(message: Mapping[str, Any]) -> list[Part]:
    """The parts of an answer of Anthropic's Messages API to judge."""
    parts = parts_of(message.get("content"))
    return [*parts, *remaining_parts(message, _OF_A_MESSAGE, texts_of(parts))]


def response_parts(response: Mapping[str, Any]) -> list[Part]:
    """The parts of an answer of the Responses API to judge."""
    parts = parts_of(response.get("output"))
    return [*parts, *remaining_parts(response, _OF_A_RESPONSE, texts_of(parts))]


def _add_delta(answer: StreamedAnswer, delta: Mapping[str, Any]) -> None:
    if delta.get("audio") is not None:
        raise UnsupportedContentError("audio cannot be judged: use text and images")
    for number, call in enumerate(delta.get("tool_calls") or ()):
        index = call.get("index")
        place = ("call", number if index is None else index)
        for kind in _CALLED:
            if call.get(kind):
                answer.call((*place, kind), call[kind])
        answer.strings(place, _without_fields(call, (*_CALLED, "id", "index", "type")))
    if delta.get("function_call"):
        answer.call(("function_call",), delta["function_call"])
    text_fields = [name for name in _SHOWN if isinstance(delta.get(name), str)]
    for name in text_fields:
        answer.show((name,), delta[name])
    rest = _without_fields(delta, ("role", "tool_calls", "function_call", *text_fields))
    answer.add([part for image in rest.pop("images", None) or () for part in parts_of(image)])
    if isinstance(rest.get("content"), list):
        answer.add(parts_of(rest.pop("content")))
    for place, text in _strings((), rest):
        # Vendors' fields may repeat the reasoning of the same delta.
        if not any(text in delta[name] for name in text_fields):
            answer.hide(place, text)


def _add_message_event(answer: StreamedAnswer, kind: str, event: Mapping[str, Any]) -> None:
    index = event.get("index")
    delta = event.get("delta")
    if kind == "message_start":
        answer.add(message_parts(event.get("message") or {}))
    elif kind == "content_block_start":
        answer.add(parts_of(event.get("content_block")))
    elif kind == "content_block_delta" and isinstance(delta, dict):
        for place, text in _strings((), _without_fields(delta, ("type",))):
            if delta.get("type") == f"{place[-1]}_delta" and place[-1] in _SHOWN:
                answer.show((index, *place), text)
            else:
                answer.hide((index, *place), text)
    elif kind == "message_delta":
        answer.add([*remaining_parts(delta or {}, _OF_A_MESSAGE), *remaining_parts(event, ("delta", "usage"))])
    elif kind not in ("content_block_stop", "message_stop", "ping"):
        answer.add(parts_of(event))


def _add_response_event(answer: StreamedAnswer, kind: str, event: Mapping[str, Any]) -> None:
    if "audio" in kind:
        raise UnsupportedContentError("audio cannot be judged: use text and images")
    place = tuple(event.get(name) for name in ("output_index", "content_index", "summary_index"))
    name, _, step = kind.rpartition(".")
    delta = event.get("delta")
    if step == "delta" and isinstance(delta, str):
        (answer.show if name in _PLAIN_EVENTS else answer.hide)((name, *place), delta)
        rest = _without_fields(event, (*_OF_AN_EVENT, "delta"))
    else:
        rest = _without_fields(event, _OF_AN_EVENT)
    if isinstance(event.get("partial_image_b64"), str):
        answer.add(parts_of({"type": "image", "base64": event["partial_image_b64"]}))
    answer.add(parts_of([event.get("item"), event.get("part")]))
    if isinstance(event.get("response"), dict):
        answer.add(response_parts(event["response"]))
    for text in rest.values():
        answer.add(parts_of(text))


def _without_fields(value: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: part for name, part in value.items() if name not in names and part is not None}


def _strings(place: Place, value: Any) -> Iterator[tuple[Place, str]]:
    """Every string with its path, without ids, log-probabilities and ciphertext."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for name, part in readable_fields(value).items():
            yield from _strings((*place, name), part)
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            at = part.get("index", number) if isinstance(part, dict) else number
            yield from _strings((*place, at), part)
