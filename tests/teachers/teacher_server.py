"""A local server that answers as an OpenAI-compatible teacher would, by a function of the request."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.local_server import Handler, LocalServer

STEPS = "# Task 1\n## Reasoning Step 1\nThe user asks for something.\n# Task 2\n## Reasoning Step 2\nThat settles it."


@dataclass(frozen=True)
class Reply:
    """What the server sends; `body` None is the whole answer with `text`."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    finish_reason: str | None = "stop"
    usage: tuple[int, int] = (100, 20)
    refusal: str | None = None


Brain = Callable[[dict[str, Any]], Reply]


def answer(request: str = "unharmful", response: str = "unharmful", steps: str = STEPS) -> str:
    """A whole answer in the protocol's form."""
    return f"<think>\n{steps}\n</think>\n<result>\nAnswers:\nRequest: {request}\nResponse: {response}\n</result>"


def system_of(payload: dict[str, Any]) -> str:
    return str(payload["messages"][0]["content"])


def user_of(payload: dict[str, Any]) -> str:
    content = payload["messages"][1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def truthful(payload: dict[str, Any]) -> Reply:
    """Says what it was told is true; where it is told nothing, that all is unharmful."""
    truths = system_of(payload).partition("The true answers:\n")[2]
    labels = {
        name.lower(): word for name, word in re.findall(r"^(Request|Response): (harmful|unharmful|None)", truths, re.M)
    }
    return Reply(answer(**labels))


def completion(reply: Reply) -> dict[str, Any]:
    """The body of `/chat/completions`."""
    message = {"role": "assistant", "content": None if reply.refusal else reply.text, "refusal": reply.refusal}
    usage = {"prompt_tokens": reply.usage[0], "completion_tokens": reply.usage[1]}
    return {"choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason}], "usage": usage}


class TeacherServer(LocalServer):
    """`payloads` holds what was asked, in order."""

    def __init__(self, brain: Brain = truthful) -> None:
        super().__init__(_Handler)
        self.brain = brain
        self.payloads: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    def asked(self, word: str) -> int:
        """How many requests were about an exchange that holds `word`."""
        return sum(word in user_of(payload) for payload in self.payloads)

    def answer(self, payload: dict[str, Any], key: str | None) -> Reply:
        with self.lock:
            self.payloads.append(payload)
            self.keys.append(key)
            self.entered()
        try:
            return self.brain(payload)
        finally:
            self.left()


class _Handler(Handler):
    stub: TeacherServer

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = self.stub.answer(payload, self.headers.get("Authorization"))
        body = json.dumps(completion(reply)).encode() if reply.body is None else reply.body
        self.send(reply.status, body, reply.headers)
