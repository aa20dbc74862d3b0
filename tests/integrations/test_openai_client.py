"""OpenAI's own client, as users have it, against the moderation route and the guarded proxy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.integrations.examples import example
from tests.integrations.service import CLOSED, GREEN, KEY, RED, Running, image_part, sse

pytest.importorskip("openai", reason="openai is not installed")

import openai

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow
EXAMPLE = example("openai_client.py")


@pytest.fixture
def client(service: Running) -> Iterator[Any]:
    with EXAMPLE["connect"](service.url, KEY) as client:
        yield client


@pytest.mark.parametrize(
    ("moderation_input", "flagged"),
    [
        ("Hello.", False),
        ("BAD", True),
        ("BROKEN", True),
        (["Hello.", "BAD"], True),
        ([image_part(GREEN)], False),
        ([image_part(RED)], True),
        ([{"type": "text", "text": "Hello."}, image_part(GREEN), image_part(RED)], True),
        ([image_part("https://images.test/a.png")], True),
    ],
)
def test_moderation_flags_what_is_to_be_blocked(client: Any, moderation_input: Any, flagged: bool) -> None:
    assert EXAMPLE["is_flagged"](client, moderation_input) is flagged


def test_the_result_keeps_the_verdict_and_makes_no_category_up(client: Any) -> None:
    moderation = client.moderations.create(model="omni-moderation-latest", input="BAD")
    result = moderation.results[0].model_dump()
    assert result["verdict"]["request"]["label"] == "harmful"
    assert result["categories"]["harmful/request"] is True
    assert result["categories"]["violence"] is None


def test_messages_judge_the_answer_too(client: Any) -> None:
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "BAD"}]
    moderation = client.moderations.create(input=openai.omit, extra_body={"messages": messages})
    assert moderation.results[0].flagged
    assert moderation.results[0].model_dump()["verdict"]["response"]["label"] == "harmful"


@pytest.mark.parametrize(
    ("prompt", "answer", "shown"),
    [
        ("Hello.", "Gladly.", "Gladly."),
        ("BAD", "Gladly.", "(refused)"),
        ("BROKEN", "Gladly.", "(refused)"),
        ("Hello.", "BAD", "(refused)"),
        ("Hello.", "BROKEN", "(refused)"),
    ],
)
def test_the_proxy_refuses(client: Any, service: Running, prompt: str, answer: str, shown: str) -> None:
    service.model.answer = answer
    assert EXAMPLE["ask"](client, "m", prompt).startswith(shown)
    assert len(service.model.asked) == (prompt == "Hello.")


@pytest.mark.parametrize("answer", ["Gladly, and at some length, so that it takes two windows.", "Fine. " * 12 + "BAD"])
def test_a_streamed_answer_is_held_back(client: Any, service: Running, answer: str) -> None:
    service.model.answer = answer
    stream = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hello."}], stream=True)
    choices = [choice for chunk in stream for choice in chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    assert choices[-1].finish_reason == ("content_filter" if "BAD" in answer else "stop")
    assert answer.startswith(text)
    assert (text == answer) == ("BAD" not in answer)
    assert "BAD" not in text


ENDS: list[tuple[list[str], str]] = [
    (sse("Gladly.")[:-2], "the model's answer ended before it was complete: ask again"),
    (
        [*sse("Gladly.")[:-2], 'data: {"error": {"message": "EngineCore died"}}\n\n', "data: [DONE]\n\n"],
        "EngineCore died",
    ),
]


@pytest.mark.parametrize(("events", "message"), ENDS)
def test_a_broken_stream_raises(client: Any, service: Running, events: list[str], message: str) -> None:
    service.model.events = events
    stream = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hello."}], stream=True)
    with pytest.raises(openai.APIError, match=message) as raised:
        list(stream)
    assert raised.value.code == "upstream"


def test_without_service_or_key_there_is_no_answer(service: Running) -> None:
    with EXAMPLE["connect"](CLOSED) as client, pytest.raises(openai.APIConnectionError):
        EXAMPLE["is_flagged"](client, "Hello.")
    with EXAMPLE["connect"](service.url, "wrong-key") as client, pytest.raises(openai.AuthenticationError):
        EXAMPLE["is_flagged"](client, "Hello.")
