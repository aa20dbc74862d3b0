"""A teacher over HTTP: what is sent, how answers and faults come back, and the limits per minute."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.engines.openai import http as openai_http
from guardreasoner_vl.engines.openai.http import HttpError
from guardreasoner_vl.errors import ImageError, InputError, InputTooLongError, MissingExtraError
from guardreasoner_vl.protocol import build_messages
from guardreasoner_vl.teachers.base import TeacherAnswer, Tokens
from guardreasoner_vl.teachers.gates import PassedAnswer, RejectedAnswer, gate
from guardreasoner_vl.teachers.openai import Chat, OpenAITeacher, read_teacher_answer
from guardreasoner_vl.types import Sample
from tests.made_images import image
from tests.teachers.teacher_server import Reply, TeacherServer, answer, system_of, user_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

ROW = Sample(
    id="a",
    source="toy",
    modality="text",
    prompt="How do I bake bread?",
    response="Mix flour.",
    request_label="unharmful",
    response_label="harmful",
)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_http, "BACKOFF_SECONDS", 0.001)


@pytest.fixture
def server() -> Iterator[TeacherServer]:
    with TeacherServer() as running:
        yield running


def teacher(server: TeacherServer, **options: Any) -> OpenAITeacher:
    return OpenAITeacher(options.pop("chat", None), base_url=server.url, **options)


def replies(*answers: Reply) -> Any:
    """One after the other; the last one from then on."""
    remaining = list(answers)
    return lambda _: remaining.pop(0) if len(remaining) > 1 else remaining[0]


async def ask(asked: OpenAITeacher, row: Sample = ROW, complaint: str | None = None) -> TeacherAnswer:
    try:
        return await asked.write(row, complaint)
    finally:
        await asked.aclose()


# --- what is sent ---------------------------------------------------------------------------------------


async def test_the_request_and_the_answer(server: TeacherServer) -> None:
    answered = await ask(teacher(server, api_key="cake"))
    assert answered == TeacherAnswer(answer("unharmful", "harmful"), "stop", 100, 20)
    assert isinstance(gate(answered.text, ROW, answered.finish_reason), PassedAnswer)
    (payload,) = server.payloads
    assert {key: value for key, value in payload.items() if key != "messages"} == {
        "model": "gpt-4o-2024-08-06",
        "temperature": 1.0,
        "max_tokens": 1536,
    }
    assert [message["role"] for message in payload["messages"]] == ["system", "user"]
    assert "Request: unharmful\nResponse: harmful" in system_of(payload)
    assert user_of(payload) == build_messages(ROW.exchange())[1].text
    assert server.keys == ["Bearer cake"]


async def test_settings_are_the_caller_s(server: TeacherServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from-outside")
    chat = Chat("small", temperature=0.2, max_tokens=300, extra_body={"max_tokens": 7, "top_p": 0.5})
    asked = teacher(server, chat=chat)
    assert asked.name == "small"
    await ask(asked, complaint="loop")
    (payload,) = server.payloads
    assert (payload["model"], payload["temperature"], payload["max_tokens"], payload["top_p"]) == ("small", 0.2, 7, 0.5)
    assert "not accepted: it repeated itself." in system_of(payload)
    assert server.keys == ["Bearer from-outside"]


async def test_images_are_sent_as_parts(server: TeacherServer, tmp_path: Path) -> None:
    paths = []
    for name in ("a.png", "b.png"):
        image(40, 30).open().save(tmp_path / name)
        paths.append(str(tmp_path / name))
    row = Sample(
        id="p", source="toy", modality="text-image", prompt="What?", images=tuple(paths), request_label="harmful"
    )
    asked = teacher(server)
    await asked.label(row)
    await ask(asked, row)
    for payload in server.payloads:
        parts = payload["messages"][1]["content"]
        assert [part["type"] for part in parts] == ["text", "image_url", "text", "image_url", "text"]
        assert parts[1]["image_url"]["url"].startswith("data:image/png;base64,")
        assert parts[0]["text"] == "Human user:\n"
    broken = row.model_copy(update={"images": (str(tmp_path / "missing.png"),)})
    with pytest.raises(ImageError):
        await ask(asked, broken)
    assert len(server.payloads) == 2


async def test_labels_are_asked_for_without_the_truth(server: TeacherServer) -> None:
    server.brain = lambda _: Reply(answer("harmful", "harmful"))
    asked = teacher(server)
    assert (await asked.label(ROW)).text == answer("harmful", "harmful")
    await asked.aclose()
    assert "true answers" not in system_of(server.payloads[0])
    assert system_of(server.payloads[0]).startswith(build_messages(ROW.exchange())[0].text)


def test_a_teacher_can_be_used_on_one_event_loop_after_another(server: TeacherServer) -> None:
    asked = teacher(server, requests_per_minute=600_000, max_concurrency=2)

    async def several() -> None:
        await asyncio.gather(*(asked.write(ROW, None) for _ in range(6)))
        await asked.aclose()

    asyncio.run(several())
    asyncio.run(several())
    assert len(server.payloads) == 12
    assert server.most_in_flight <= 2


# --- answers that the gates reject ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply("I'm sorry, but I can't help with that."), "refusal"),
        (Reply(refusal="I'm sorry, I can't assist."), "refusal"),
        (Reply(answer("unharmful", "harmful"), finish_reason="content_filter"), "refusal"),
        (Reply(""), "empty"),
        (Reply(answer("harmful", "harmful")), "contradicts the truth"),
        (Reply(answer("unharmful", "harmful", steps="bread " * 300), finish_reason="length"), "loop"),
        (Reply(answer("unharmful", "harmful")[:60], finish_reason="length"), "unparsable: truncated"),
        (Reply(answer("unharmful", "harmful"), finish_reason=None), "unparsable: engine"),
        (Reply('{"request": "unharmful", "response": "harmful"}'), "unparsable: missing_think"),
    ],
)
async def test_what_a_bad_teacher_says_is_no_fault_and_is_rejected(
    server: TeacherServer, reply: Reply, reason: str
) -> None:
    server.brain = lambda _: reply
    answered = await ask(teacher(server))
    assert gate(answered.text, ROW, answered.finish_reason) == RejectedAnswer(reason)
    assert answered.tokens == Tokens(100, 20)
    assert len(server.payloads) == 1


# --- faults ---------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_server_that_is_busy_is_asked_again_after_the_time_it_names(server: TeacherServer) -> None:
    server.brain = replies(Reply(status=429, headers={"Retry-After": "1"}), Reply(status=500), Reply(answer()))
    started = time.monotonic()
    assert (await ask(teacher(server))).finish_reason == "stop"
    assert 1.0 <= time.monotonic() - started < 5
    assert len(server.payloads) == 3


@pytest.mark.parametrize(
    ("reply", "code", "status", "asked"),
    [
        (Reply(status=429), "engine", 429, 3),
        (Reply(status=500, body=b"cakes"), "engine", 500, 3),
        (Reply(status=401), "auth", 401, 1),
        (Reply(status=404), "engine", 404, 1),
        (Reply(body=b""), "malformed", None, 1),
        (Reply(body=b"<html>cakes</html>"), "malformed", None, 1),
        (Reply(body=b'{"choices": []}'), "malformed", None, 1),
        (Reply(body=b"[" * 100_000), "malformed", None, 1),
    ],
)
async def test_a_fault_is_one_line_that_quotes_nothing(
    server: TeacherServer, reply: Reply, code: str, status: int | None, asked: int
) -> None:
    server.brain = lambda _: reply
    with pytest.raises(HttpError) as caught:
        await ask(teacher(server, retries=2))
    assert (caught.value.code, caught.value.status, len(server.payloads)) == (code, status, asked)
    assert "\n" not in str(caught.value)
    assert "cakes" not in str(caught.value)


async def test_a_server_that_is_slow_or_gone(server: TeacherServer) -> None:
    server.brain = lambda _: time.sleep(1) or Reply(answer())  # type: ignore[func-returns-value]
    with pytest.raises(HttpError, match="did not answer within") as caught:
        await ask(teacher(server, timeout=0.1))
    assert caught.value.code == "timeout"
    with pytest.raises(HttpError, match="cannot reach"):
        await ask(OpenAITeacher(base_url="http://127.0.0.1:9/v1", retries=1))


async def test_what_is_too_long_for_the_model_is_a_fault_of_the_row(server: TeacherServer) -> None:
    server.brain = lambda _: Reply(status=400, body=b'{"error": {"code": "context_length_exceeded"}}')
    with pytest.raises(InputTooLongError):
        await ask(teacher(server))


def test_answers_are_read_without_usage() -> None:
    body = b'{"choices": [{"message": {"content": "hi", "role": "assistant"}, "finish_reason": "stop"}]}'
    assert read_teacher_answer(body) == TeacherAnswer("hi", "stop", 0, 0)


# --- limits ---------------------------------------------------------------------------------------------


def estimated(rows: Sequence[Sample]) -> int:
    return sum(Chat().estimate(row).total for row in rows)


def test_the_estimate_is_high_but_not_absurd() -> None:
    words = ROW.model_copy(update={"prompt": "bread and butter " * 600})
    characters = ROW.model_copy(update={"prompt": "\u9762\u5305" * 600})
    most = Chat(max_tokens=500).estimate(ROW)
    assert most.completion == 500
    # The task and the form are some 500 tokens.
    assert 500 < most.prompt < 1500
    assert 1800 <= Chat().estimate(words).prompt - most.prompt <= 3600
    # Three bytes a character; the twenty letters that stood there are seven tokens less.
    assert Chat().estimate(characters).prompt - most.prompt == pytest.approx(1200, abs=10)
    assert Chat().estimate(ROW.model_copy(update={"images": ("a", "b")})).prompt - most.prompt == 3000


async def test_requests_wait_for_their_turn(server: TeacherServer) -> None:
    asked = teacher(server, requests_per_minute=600)
    started = time.monotonic()
    await asyncio.gather(*(asked.write(ROW, None) for _ in range(16)))
    await asked.aclose()
    # Ten a second: ten at once, six more one by one.
    assert 0.55 <= time.monotonic() - started < 3


@pytest.mark.slow
async def test_tokens_wait_for_their_turn_however_many_one_request_takes(server: TeacherServer) -> None:
    size = estimated([ROW])
    asked = teacher(server, tokens_per_minute=60 * size)
    started = time.monotonic()
    long = ROW.model_copy(update={"prompt": "bread " * size})
    assert estimated([long]) > 2 * size
    await asyncio.gather(asked.write(ROW, None), asked.write(ROW, None))
    await ask(asked, long)
    # One request's worth a second: two wait a second, the long one longer than all that fits in at once.
    assert 2.5 <= time.monotonic() - started < 8
    assert len(server.payloads) == 3


@pytest.mark.parametrize("limits", [{"requests_per_minute": 0}, {"tokens_per_minute": -1}])
def test_a_limit_is_more_than_nothing(limits: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"per_minute is -?[01], but must be more than 0: give a larger number"):
        OpenAITeacher(base_url="http://localhost/v1", **limits)


def test_limits_need_the_extra_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiolimiter", None)
    OpenAITeacher(base_url="http://localhost/v1")
    with pytest.raises(
        MissingExtraError, match=r"aiolimiter is not installed: install guardreasoner-vl with the extra 'teacher'"
    ):
        OpenAITeacher(base_url="http://localhost/v1", requests_per_minute=60)
