"""LiteLLM's real proxy in this process, with the guardrail in its configuration and a scripted server behind it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.integrations.service import chunk, completion
from tests.local_server import Handler

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import httpx

MASTER_KEY = "sk-" + "0123456789abcdef" * 2
Item = dict[str, Any]


@dataclass
class Upstream:
    """The answer of the server behind the proxy: Anthropic blocks, Responses items or a chat message."""

    blocks: list[Item] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    message: str = ""
    asked: list[Item] = field(default_factory=list)

    def answer(self, path: str) -> Item:
        if path.endswith("/messages"):
            return {**MESSAGE, "content": self.blocks}
        return {**RESPONSE, "output": self.items} if path.endswith("/responses") else completion(self.message)

    def events(self, path: str) -> Iterator[Item]:
        if path.endswith("/messages"):
            return message_events(self.blocks)
        return response_events(self.items) if path.endswith("/responses") else chat_chunks(self.message)


MESSAGE: Item = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude",
    "content": [],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 1, "output_tokens": 1},
}
RESPONSE: Item = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "model": "gpt",
    "status": "completed",
    "output": [],
    "parallel_tool_calls": False,
    "tool_choice": "auto",
    "tools": [],
}
_DELTAS = {
    "text": ("text", "text_delta", "text"),
    "thinking": ("thinking", "thinking_delta", "thinking"),
    "tool_use": ("input", "input_json_delta", "partial_json"),
    "server_tool_use": ("input", "input_json_delta", "partial_json"),
}


def pieces(text: str) -> Iterator[str]:
    return (text[at : at + 10] for at in range(0, len(text), 10))


def message_events(blocks: list[Item]) -> Iterator[Item]:
    """Events as Anthropic streams them: texts and inputs in pieces, other blocks at once."""
    yield {"type": "message_start", "message": {**MESSAGE, "stop_reason": None}}
    for index, block in enumerate(blocks):
        name, kind, delta_field = _DELTAS.get(block["type"], ("", "", ""))
        said = block.get(name, "") if name != "input" else json.dumps(block["input"])
        begun = {**block, name: {} if name == "input" else ""} if name else block
        yield {"type": "content_block_start", "index": index, "content_block": begun}
        for piece in pieces(said) if name else ():
            yield {"type": "content_block_delta", "index": index, "delta": {"type": kind, delta_field: piece}}
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}}
    yield {"type": "message_stop"}


def response_events(items: list[Item]) -> Iterator[Item]:
    """Events as OpenAI streams them: texts in pieces and again as a whole, then each item, then all."""
    yield {"type": "response.created", "response": {**RESPONSE, "status": "in_progress"}}
    for index, item in enumerate(items):
        begun = {**item, "content": []} if item["type"] == "message" else item
        yield {"type": "response.output_item.added", "output_index": index, "item": begun}
        for number, part in enumerate(item["content"] if item["type"] == "message" else ()):
            place = {"item_id": item["id"], "output_index": index, "content_index": number}
            for piece in pieces(part["text"]):
                yield {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
            yield {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": []}
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    yield {"type": "response.completed", "response": {**RESPONSE, "output": items}}


def chat_chunks(message: str) -> Iterator[Item]:
    yield from (chunk({"content": piece}) for piece in pieces(message))
    yield chunk({}, "stop")


class Server(Handler):
    """Answers with the `Upstream` of a subclass."""

    upstream: Upstream

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.upstream.asked.append(body)
        if not body.get("stream"):
            self.send(200, json.dumps(self.upstream.answer(self.path)).encode())
            return
        events = [{**event, "sequence_number": number} for number, event in enumerate(self.upstream.events(self.path))]
        written = [
            (f"event: {event['type']}\n" if "type" in event else "") + f"data: {json.dumps(event)}\n\n"
            for event in events
        ]
        ended = "data: [DONE]\n\n" if self.path.endswith("/completions") else ""
        self.send(200, "".join([*written, ended]).encode(), {"Content-Type": "text/event-stream"})


def write_config(folder: Path, guardrail: Item, upstream: str) -> Path:
    """Write a proxy configuration: the example's guardrail in front of two models of the server."""
    models = {
        "gpt": {"model": "openai/gpt-4o", "api_base": upstream},
        "claude": {"model": "anthropic/claude-sonnet-4", "api_base": upstream.removesuffix("/v1")},
    }
    config = {
        "model_list": [
            {"model_name": name, "litellm_params": {**params, "api_key": "k"}} for name, params in models.items()
        ],
        "guardrails": [guardrail],
        "litellm_settings": {"num_retries": 0},
        "general_settings": {"master_key": MASTER_KEY},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))  # YAML, too
    return path


def shown_text(answer: httpx.Response) -> str:
    """The texts of an answer, complete or streamed."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return answer.text
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    return "".join(map(_piece, events))


def _piece(event: Item) -> str:
    delta = event.get("delta")
    if isinstance(delta, str):
        return delta
    if isinstance(delta, dict):
        return str(delta.get("text") or "")
    choices = event.get("choices") or ()
    return "".join((choice.get("delta") or {}).get("content") or choice.get("text") or "" for choice in choices)
