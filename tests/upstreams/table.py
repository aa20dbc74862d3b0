"""What a model's server may send, and the expected result: one table for proxy, middleware and engine.

`text` is the text that a client may read at the end; `code` the error that it gets instead, None if the answer is
complete. If the answer is interrupted, the client has read a beginning of `text`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

TEXT = "Gladly: bread needs flour \U0001f600 and water."
ERROR = {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500, "quoted": "SECRET"}}
STREAM, JSON = "text/event-stream; charset=utf-8", "application/json"


@dataclass(frozen=True)
class Case:
    """`engine` tells whether the `openai` engine returns the text; None if it behaves like the others."""

    name: str
    body: bytes
    text: str = TEXT
    code: str | None = None
    kind: str = STREAM
    message: str = ""
    engine: bool | None = None

    @property
    def engine_answers(self) -> bool:
        return self.code is None if self.engine is None else self.engine


def chunk(delta: Any, finish: Any = None, **more: Any) -> str:
    return json.dumps({"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish, **more}]})


PIECES = [chunk({"role": "assistant", "content": ""}), *(chunk({"content": TEXT[n : n + 9]}) for n in range(0, 50, 9))]
END = chunk({}, "stop")
USAGE = json.dumps({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}})
EVENTS = [*PIECES, END, USAGE, "[DONE]"]


def lines(*events: str, end: str = "\n", field: str = "data: ") -> bytes:
    return "".join(f"{field}{event}{end}{end}" for event in events).encode()


def raw(event: str) -> str:
    """The same event in UTF-8, not escaped to ASCII."""
    return json.dumps(json.loads(event), ensure_ascii=False)


def whole(message: Any, finish: Any = "stop", **more: Any) -> bytes:
    choice = {"index": 0, "message": message, "finish_reason": finish, **more}
    return json.dumps({"id": "c", "choices": [choice], "usage": {"prompt_tokens": 1}}).encode()


def with_logprobs(content: Any) -> list[str]:
    return [chunk({"content": TEXT}, logprobs={"content": content}), END, "[DONE]"]


def halves(**delta: str) -> list[str]:
    """An emoji whose two halves are in two deltas, as sent by servers that count in UTF-16."""
    ((name, text),) = delta.items()
    before, after = text.split("\U0001f600")
    return [chunk({name: f"{before}\ud83d"}), chunk({name: f"\ude00{after}"}), END, "[DONE]"]


_LIKELY = {"token": "Gladly", "logprob": -0.1, "top_logprobs": [{"token": "Gladly", "logprob": -0.1}]}
_SPLIT = "\n".join(f"data: {part}" for part in chunk({"content": TEXT}).replace(", ", ",\n").split("\n"))

WHOLE_STREAMS = [
    Case("line feeds", lines(*EVENTS)),
    Case("carriage returns and line feeds", lines(*EVENTS, end="\r\n")),
    Case("carriage returns", lines(*EVENTS, end="\r")),
    Case("all three line ends", lines(*PIECES) + lines(END, end="\r") + lines("[DONE]", end="\r\n")),
    Case("no space after the colon", lines(*EVENTS, field="data:")),
    Case("a byte order mark", b"\xef\xbb\xbf" + lines(*EVENTS)),
    Case("comments", b": hello\n\n:\n" + lines(*PIECES) + b": keep-alive\n\n" + lines(END, "[DONE]")),
    Case("empty data events", b"data:\n\ndata\n\ndata: \n\n" + lines(*EVENTS) + b"data:\n\n"),
    Case("several data lines in one event", f"{_SPLIT}\n\n".encode() + lines(END, "[DONE]")),
    Case("ids, retry times, unknown fields", b"id: 1\nretry: 10\nfield\nother: x\n" + lines(*EVENTS)),
    Case("named events", b"event: message\n" + lines(PIECES[0]) + b"event: completion\n" + lines(*EVENTS[1:])),
    Case("an unterminated last event", lines(*PIECES, END)[:-2]),
    Case("an unterminated end", lines(*PIECES, END) + b"data: [DONE]"),
    Case("no [DONE], but a finish reason", lines(*PIECES, END)),
    Case("[DONE] without a finish reason", lines(*PIECES, "[DONE]"), engine=False),
    Case("something after the end", lines(*EVENTS, chunk({"content": "BAD"}), json.dumps(ERROR))),
    Case("unicode's own line ends", lines(raw(chunk({"content": "a\u2028b\x85c"})), END), "a\u2028b\x85c"),
    Case("null deltas", lines(chunk(None), *PIECES, chunk(None, "stop"), "[DONE]")),
    Case("null choices", lines('{"choices": null}', *EVENTS)),
    Case("null usage", lines(*PIECES, END, '{"choices": [], "usage": null}', "[DONE]")),
    Case("usage of another shape", lines(*PIECES, END, '{"usage": {"prompt_tokens": -1e999}}', "[DONE]")),
    Case("null fields", lines(chunk({"content": None, "tool_calls": None, "refusal": None}), *EVENTS)),
    Case("no finish reason but at the end", lines('{"choices": [{"delta": {"content": "' + "x" * 30 + '"}}]}', END),
         "x" * 30),
    Case("null log-probabilities", lines(*with_logprobs([{**_LIKELY, "logprob": None, "top_logprobs": None}]))),
    Case("log-probabilities that are no numbers", lines(*with_logprobs([{**_LIKELY, "logprob": float("nan")}]))),
    Case("log-probabilities of nothing", lines(*with_logprobs([{**_LIKELY, "logprob": float("-inf")}]))),
    Case("log-probabilities of another shape", lines(*with_logprobs({"Gladly": 1}))),
    Case("NaN beside the answer", lines('{"choices": [], "created": NaN, "usage": {"x": 1e999}}', *EVENTS)),
    Case("halves of a character beside the answer", lines('{"id": "\\ud83d", "choices": []}', *EVENTS)),
    Case("halves of a character in two deltas", lines(*halves(content=TEXT))),
    Case("halves with a null delta between", lines(*halves(content=TEXT)[:1], chunk(None), *halves(content=TEXT)[1:])),
    Case("a half that stays alone", lines(chunk({"content": "Gladly\ud83d"}), END, "[DONE]"), "Gladly\ufffd"),
    Case("a half that stays alone, with the finish reason", lines(chunk({"content": "So\ud83d"}, "stop")), "So\ufffd"),
    Case("characters cut between their bytes", lines(raw(chunk({"content": TEXT})), END)),
]  # fmt: skip
BROKEN_STREAMS = [
    Case("an error in the data", lines(*PIECES, json.dumps(ERROR), "[DONE]"), code="upstream",
         message="EngineCore died"),
    Case("an error at once", lines(json.dumps(ERROR)), code="upstream", message="EngineCore died"),
    Case("an error event", lines(*PIECES) + b"event: error\n" + lines(json.dumps(ERROR)), code="upstream",
         message="EngineCore died"),
    Case("an error event with a message alone", b'event: error\ndata: {"message": "died"}\n\n', code="upstream",
         message="died"),
    Case("an error event of plain text", b"event: error\ndata: BAD\n\n", code="upstream", message="the model failed"),
    Case("an error that is a string", lines(*PIECES, '{"error": "died"}'), code="upstream", message="died"),
    Case("an error beside a choice", lines(json.dumps({**json.loads(chunk({"content": "BAD"}, "error")), **ERROR})),
         code="upstream", message="EngineCore died"),
    Case("an error that quotes the answer", lines('{"error": {"message": "cannot parse: BAD"}}'), code="upstream",
         message="the model failed"),
    Case("nothing", b"", code="upstream"),
    Case("comments alone", b": hello\n\n", code="upstream"),
    Case("an end before the finish reason", lines(*PIECES), code="upstream"),
    Case("an end within an event", lines(*PIECES, chunk({"content": TEXT}))[:-20], code="upstream"),
    Case("an end before the other choice's", lines(*PIECES, chunk({"content": "x"}).replace('"index": 0', '"index": 1'),
         END), code="upstream"),
    Case("what is not JSON", lines(*PIECES, "BAD"), code="guard_error"),
    Case("what is no object", lines(*PIECES, "[]"), code="guard_error"),
    Case("choices of another shape", lines(*PIECES, '{"choices": [1]}'), code="guard_error"),
    Case("a text of another shape", lines(*PIECES, chunk({"content": ["BAD"]})), code="guard_error"),
    Case("nested without end", lines('{"a":' + "[" * 100_000), code="guard_error"),
]  # fmt: skip
STREAMS = [*WHOLE_STREAMS, *BROKEN_STREAMS]
WHOLE = [
    Case("an answer", whole({"role": "assistant", "content": TEXT}), kind=JSON),
    Case("its content type in capitals", whole({"role": "assistant", "content": TEXT}), kind="Application/JSON"),
    Case("NaN as a log-probability", whole({"content": TEXT}, logprobs={"content": [{**_LIKELY, "logprob": float("nan")}
         ]}), kind=JSON),
    Case("1e999 as usage", whole({"content": TEXT}).replace(b'"prompt_tokens": 1', b'"prompt_tokens": 1e999'),
         kind=JSON),
    Case("null usage of a whole answer", whole({"content": TEXT}).replace(b'{"prompt_tokens": 1}', b"null"), kind=JSON),
    Case("a half of a character", whole({"content": "Gladly\ud83d"}), "Gladly\ufffd", kind=JSON),
    Case("halves beside the answer", whole({"content": TEXT}).replace(b'"id": "c"', b'"id": "\\udead"'), kind=JSON),
    Case("an error body", json.dumps(ERROR).encode(), code="upstream", kind=JSON, message="EngineCore died"),
    Case("an error that quotes", b'{"error": {"message": "BAD"}}', code="upstream", kind=JSON, message="model failed"),
    Case("no choices", b'{"choices": []}', code="upstream", kind=JSON, message="no choice"),
    Case("choices that are null", b'{"choices": null}', code="upstream", kind=JSON, message="no choice"),
    Case("no field of that name", b"{}", code="upstream", kind=JSON, message="no choice"),
    Case("a null message", whole(None), code="upstream", kind=JSON, message="without a message"),
    Case("what is no JSON", b"<html>SECRET</html>", code="guard_error", kind=JSON, message="unknown form"),
    Case("a list", b"[]", code="guard_error", kind=JSON, message="unknown form"),
    Case("an endless list", b"[" * 100_000, code="guard_error", kind=JSON, message="unknown form"),
]  # fmt: skip
