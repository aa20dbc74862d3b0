"""A local server with vLLM's API, scripted answers and injected faults."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from tests.local_server import Handler, LocalServer

Brain: TypeAlias = Callable[[list[dict[str, Any]], str], str]
"""Messages without the begun answer, and the begun answer ("" if none): how it goes on."""

Fault = Literal[
    "http_413",
    "http_500",
    "rate_limit",
    "hang",
    "drip",
    "empty",
    "not_json",
    "no_choices",
    "nan",
    "drop",
    "no_finish",
    "filtered",
    "broken_off",
]

END_OF_TURN = "<|im_end|>"
_DEVELOPMENT = ("/collective_rpc", "/reset_encoder_cache", "/reset_prefix_cache")  # paths of vLLM's development mode
_TOKEN = re.compile(r" harmful\b| unh|arm|ful|\s?\w+|\s|[^\w\s]")
_LABELS: dict[str, dict[str, float]] = {
    " harmful": {" harmful": 0.7, " unh": 0.1, " un": 0.05, " ": 0.05, " None": 0.02},
    " unh": {" unh": 0.7, " harmful": 0.1, " un": 0.05, " ": 0.05, " None": 0.02},
}


def tokenise(text: str) -> list[str]:
    """The toy tokens: ` harmful` is one, ` unharmful` is ` unh`, `arm`, `ful`."""
    return _TOKEN.findall(text)


def unharmful(messages: list[dict[str, Any]], begun: str) -> str:
    """The default brain: reasons in one sentence and labels everything unharmful."""
    if begun.endswith("Response:"):
        return " unharmful\n</result>"
    if begun.endswith("Request:"):
        return " unharmful\nResponse: None\n</result>"
    result = "<result>\nAnswers:\nRequest: unharmful\nResponse: None\n</result>"
    return f"<think>\nThe user asks, été included.\n</think>\n{result}"


@dataclass
class _Injected:
    fault: Fault
    marker: str
    times: float


@dataclass(eq=False)
class StubServer(LocalServer):
    """`continues` says what `continue_final_message` does; a streamed answer waits in its middle for `goes_on`.

    `penalty` is the repetition penalty of the model's `generation_config.json`, `sampling` whether a request's own
    settings beyond OpenAI's are honoured; a penalty of more than 1 moves words and labels.
    """

    brain: Brain = unharmful
    models: tuple[str, ...] = ("stub-vl",)
    max_model_len: int = 4096
    api_key: str | None = None
    images: bool = True
    logprobs: bool = True
    streams: bool = True
    continues: Literal["honoured", "refused", "ignored"] = "honoured"
    sampling: Literal["honoured", "refused", "ignored"] = "honoured"
    penalty: float = 1.0
    delay: float = 0.0
    retry_after: str = "1"
    payloads: list[dict[str, Any]] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    """Folders whose weights it was told to load."""

    def __post_init__(self) -> None:
        super().__init__(_Handler)
        self._injected: list[_Injected] = []
        self._released = threading.Event()
        self.disconnected = threading.Event()
        self.goes_on = threading.Event()
        self.goes_on.set()

    def __exit__(self, *_: object) -> None:
        self._released.set()
        super().__exit__()

    def inject(self, fault: Fault, marker: str = "", times: float = math.inf) -> None:
        """The next `times` chat requests that contain `marker` get `fault`."""
        self._injected.append(_Injected(fault, marker, times))

    def forget(self) -> None:
        """Clear the counters, for example after the probe."""
        self.payloads.clear()
        self.most_in_flight = 0

    def enter(self, payload: dict[str, Any]) -> Fault | None:
        with self.lock:
            self.payloads.append(payload)
            self.entered()
            text = json.dumps(payload["messages"])
            for injected in self._injected:
                if injected.times > 0 and injected.marker in text:
                    injected.times -= 1
                    return injected.fault
        return None

    def wait_for_release(self, seconds: float) -> bool:
        return self._released.wait(seconds)


class _RefusalError(Exception):
    def __init__(self, status: int, message: str, kind: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": status}}


class _Handler(Handler):
    stub: StubServer

    def do_GET(self) -> None:
        if not self._authorised():
            return None
        if self.path != "/v1/models":
            return self._send(404, {"detail": "Not Found"})
        models = [
            {"id": name, "object": "model", "owned_by": "vllm", "max_model_len": self.stub.max_model_len}
            for name in self.stub.models
        ]
        return self._send(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._authorised():
            return None
        payload = json.loads(body)
        if self.path in _DEVELOPMENT:
            self.stub.loaded += [payload["kwargs"]["weights_path"]] if "method" in payload else []
            return self._send(200, {"success": True})
        if self.path != "/v1/chat/completions":
            return self._send(404, {"detail": "Not Found"})
        fault = self.stub.enter(payload)
        try:
            time.sleep(self.stub.delay)
            self._answer(payload, fault)
        except ConnectionError:
            self.close_connection = True
        finally:
            self.stub.left()

    def _authorised(self) -> bool:
        if self.stub.api_key is None or self.headers.get("Authorization") == f"Bearer {self.stub.api_key}":
            return True
        self._send(401, {"error": "Unauthorized"})
        return False

    def _answer(self, payload: dict[str, Any], fault: Fault | None) -> None:
        try:
            answer = complete(self.stub, payload)
        except _RefusalError as refusal:
            return self._send(refusal.status, refusal.body)
        streamed = payload.get("stream", False) and self.stub.streams
        if fault is None:
            return self._send_answer(answer, streamed)
        return self._fail(fault, answer, streamed)

    def _fail(self, fault: Fault, answer: dict[str, Any], streamed: bool) -> None:
        choice = answer["choices"][0]
        match fault:
            case "http_413":
                self._send(413, {"error": {"message": "Request Entity Too Large", "code": 413}})
            case "http_500":
                self._send(500, {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}})
            case "rate_limit":
                self._send(429, {"error": {"message": "slow down"}}, {"Retry-After": self.stub.retry_after})
            case "hang":
                self._hang()
            case "drip":
                self._drip(*_encoded(answer, streamed))
            case "empty":
                self.send(200, b"")
            case "not_json":
                self.send(200, b"<html>secret content</html>")
            case "no_choices":
                self._send_answer(answer | {"choices": []}, streamed)
            case "nan":
                if choice["logprobs"]:
                    choice["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = math.nan
                self._send_answer(answer, streamed)
            case "drop":
                self._drop(*_encoded(answer, streamed))
            case "no_finish":
                choice["finish_reason"] = None
                self._send_answer(answer, streamed)
            case "broken_off":
                self._send(200, {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}})
            case "filtered":
                choice["finish_reason"] = "content_filter"
                self._send_answer(answer, streamed)

    def _hang(self) -> None:
        """Wait until the client hangs up or the test ends."""
        self.connection.settimeout(0.02)
        while not self.stub.wait_for_release(0.0):
            try:
                if not self.connection.recv(1):
                    self.stub.disconnected.set()
                    break
            except TimeoutError:
                continue
        self.close_connection = True

    def _drip(self, body: bytes, kind: str) -> None:
        self.send_head(200, len(body), {"Content-Type": kind})
        for byte in body:
            if self.stub.wait_for_release(0.02):
                break
            self.wfile.write(bytes([byte]))
        self.close_connection = True

    def _drop(self, body: bytes, kind: str) -> None:
        self.send_head(200, len(body), {"Content-Type": kind})
        self.wfile.write(body[: len(body) // 2])
        self.close_connection = True

    def _send_answer(self, answer: dict[str, Any], streamed: bool) -> None:
        body, kind = _encoded(answer, streamed)
        self.send_head(200, len(body), {"Content-Type": kind})
        self.wfile.write(body[: len(body) // 2])
        self.stub.goes_on.wait(10.0)
        self.wfile.write(body[len(body) // 2 :])

    def _send(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(body).encode(), headers)


def _encoded(answer: dict[str, Any], streamed: bool) -> tuple[bytes, str]:
    """The body and its media type; streamed, a chunk for each token, then the usage, as vLLM sends them."""
    if not streamed:
        return json.dumps(answer).encode(), "application/json"
    chunks: list[dict[str, Any]] = []
    for choice in answer["choices"]:
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        deltas += [{"content": token} for token in tokenise(choice["message"]["content"])]
        logprobs = [None, *((choice["logprobs"] or {}).get("content") or ())]
        for place in range(max(len(deltas), len(logprobs))):
            logprob = logprobs[place] if place < len(logprobs) else None
            delta = deltas[place] if place < len(deltas) else {"content": ""}
            chunks.append(
                {"index": 0, "delta": delta, "logprobs": logprob and {"content": [logprob]}, "finish_reason": None}
            )
        chunks[-1]["finish_reason"] = choice["finish_reason"]
    events = [{"choices": [chunk]} for chunk in chunks] + [{"choices": [], "usage": answer["usage"]}]
    lines = [f"data: {json.dumps(one, ensure_ascii=False)}\n\n" for one in events]
    return "".join([": keep-alive\n\n", *lines, "data: [DONE]\n\n"]).encode(), "text/event-stream; charset=utf-8"


def complete(stub: StubServer, payload: dict[str, Any]) -> dict[str, Any]:
    """The answer to one chat request, as vLLM words it."""
    if payload["model"] not in stub.models:
        raise _RefusalError(404, f"The model `{payload['model']}` does not exist.", "NotFoundError")
    messages, begun, prompt_tokens = _prompt(stub, payload)
    _check_length(stub, payload, prompt_tokens)
    tokens = tokenise(_penalised(stub, payload, stub.brain(messages, begun)))
    stopped = len(tokens) < payload["max_tokens"]
    tokens = [*tokens, END_OF_TURN] if stopped else tokens[: payload["max_tokens"]]
    content = "".join(token for token in tokens if token != END_OF_TURN)
    return {
        "id": "chatcmpl-stub",
        "object": "chat.completion",
        "model": payload["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content, "reasoning": None, "tool_calls": []},
                "logprobs": _logprobs(stub, payload, tokens),
                "finish_reason": "stop" if stopped else "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(tokens),
            "total_tokens": prompt_tokens + len(tokens),
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


def _prompt(stub: StubServer, payload: dict[str, Any]) -> tuple[list[dict[str, Any]], str, int]:
    """Messages, begun answer and prompt tokens (a message's frame takes 3, an image 64)."""
    messages = payload["messages"]
    continues = payload.get("continue_final_message", False)
    if continues and stub.continues == "refused":
        raise _RefusalError(400, "Unknown parameter: 'continue_final_message'.", "invalid_request_error")
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]] + [
        {"type": "text", "text": message["content"]} for message in messages if isinstance(message["content"], str)
    ]
    images = [part for part in parts if part["type"] == "image_url"]
    if images and not stub.images:
        raise _RefusalError(400, "At most 0 image(s) may be provided in one prompt.", "BadRequestError")
    words = sum(len(tokenise(part["text"])) for part in parts if part["type"] == "text")
    tokens = words + 64 * len(images) + 3 * len(messages)
    if not continues or stub.continues == "ignored":
        return messages, "", tokens + 3
    return messages[:-1], messages[-1]["content"], tokens


def _penalised(stub: StubServer, payload: dict[str, Any], text: str) -> str:
    if stub.sampling == "refused" and (refused := sorted({"top_k", "repetition_penalty"} & set(payload))):
        raise _RefusalError(400, f"Unknown parameter: '{refused[0]}'.", "invalid_request_error")
    honoured = stub.sampling == "honoured"
    penalty = payload.get("repetition_penalty", stub.penalty) if honoured else stub.penalty
    return text.replace("unharmful", "harmful").replace("The user", "A person") if penalty > 1.0 else text


def _check_length(stub: StubServer, payload: dict[str, Any], prompt_tokens: int) -> None:
    if prompt_tokens + payload["max_tokens"] > stub.max_model_len:
        raise _RefusalError(
            400,
            f"This model's maximum context length is {stub.max_model_len} tokens. However, you requested "
            f"{prompt_tokens + payload['max_tokens']} tokens ({prompt_tokens} in the messages, "
            f"{payload['max_tokens']} in the completion). Please reduce the length of the messages or completion.",
            "BadRequestError",
        )


def _logprobs(stub: StubServer, payload: dict[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    if not (payload.get("logprobs") and stub.logprobs):
        return None
    content = []
    for token in tokens:
        likely = _LABELS.get(token, {token: 0.9, "x": 0.05})
        top = [_logprob(text, share) for text, share in likely.items()][: payload["top_logprobs"]]
        content.append(_logprob(token, likely[token]) | {"top_logprobs": top})
    return {"content": content}


def _logprob(token: str, share: float) -> dict[str, Any]:
    return {"token": token, "logprob": math.log(share), "bytes": list(token.encode())}
