"""NeMo Guardrails' own content-safety flows, from the example's folder, with the service behind them."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardreasoner_vl.remote.client import unjudged
from tests.integrations.examples import example
from tests.integrations.service import CLOSED, EXCHANGES, GREEN, KEY, RED, Running, image_part

pytest.importorskip("nemoguardrails", reason="nemoguardrails is not installed")

from nemoguardrails import RailsConfig
from nemoguardrails.types import LLMResponse, ToolCall, ToolCallFunction

from guardreasoner_vl.integrations.nemo import GuardModel, read_nemo_verdict

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [
    pytest.mark.slow,
    # NeMo reads a field of its own that it calls deprecated.
    pytest.mark.filterwarnings("ignore:Use 'nim_base_url' instead:DeprecationWarning"),
]
REFUSAL = "I'm sorry, I can't respond to that."


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("GUARD_KEY", KEY)
    return example("nemo_guardrails.py")


async def with_rails(module: dict[str, Any], url: str) -> AsyncIterator[Any]:
    rails = module["rails"](url)
    yield rails
    await rails.runtime.registered_action_params["llms"]["guardreasoner"].aclose()


@pytest.fixture
async def rails(module: dict[str, Any], service: Running) -> AsyncIterator[Any]:
    async for rails_under_test in with_rails(module, service.url):
        yield rails_under_test


def said(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("content", "answer", "blocked"),
    [
        *EXCHANGES,
        ([{"type": "text", "text": "What is it?"}, image_part(GREEN), image_part(RED)], "Gladly.", True),
        ([{"type": "input_audio", "input_audio": {"data": "AA=="}}], "Gladly.", True),
    ],
)
async def test_the_flows_block(
    rails: Any, module: dict[str, Any], service: Running, content: Any, answer: str, blocked: bool
) -> None:
    module["Stub"].answer = answer
    reply = await rails.generate_async(messages=said(content))
    assert reply["content"] == (REFUSAL if blocked else answer)
    if not blocked:
        asked, answered = service.backend.judged
        assert (asked.response, answered.response) == (None, answer)
        assert len(asked.images) == len(answered.images) == (0 if content == "Hello." else 1)


async def test_without_a_service_everything_is_blocked(module: dict[str, Any]) -> None:
    async for rails in with_rails(module, CLOSED):
        assert (await rails.generate_async(messages=said("Hello.")))["content"] == REFUSAL


async def test_the_check_names_the_rail(rails: Any) -> None:
    for messages, rail in (
        (said("BAD"), "content safety check input $model=guardreasoner"),
        (
            [*said("Hello."), {"role": "assistant", "content": "BAD"}],
            "content safety check output $model=guardreasoner",
        ),
    ):
        result = await rails.check_async(messages)
        assert (result.status.value, result.rail) == ("blocked", rail)
    assert (await rails.check_async(said("Hello."))).status.value == "passed"


@pytest.mark.parametrize(("prompt", "answer"), [("Hello.", "Fine words. " * 150 + "BAD"), ("BAD", "Gladly.")])
async def test_a_streamed_answer_is_held_back(rails: Any, module: dict[str, Any], prompt: str, answer: str) -> None:
    module["Stub"].answer = answer
    reply = [piece async for piece in rails.stream_async(messages=said(prompt))]
    assert '"guardrails_violation"' in reply[-1]
    assert bool(reply[:-1]) == (prompt == "Hello.")
    assert "BAD" not in "".join(reply)


@pytest.mark.parametrize(("thought", "blocked"), [("First this.", False), ("BAD", True), ("BROKEN", True)])
@pytest.mark.parametrize("options", [None, {"log": {}}])
async def test_the_reasoning_that_nemo_tells_is_judged(
    rails: Any, module: dict[str, Any], monkeypatch: pytest.MonkeyPatch, thought: str, blocked: bool, options: Any
) -> None:
    async def generate(self: Any, *_: Any, **__: Any) -> LLMResponse:
        return LLMResponse("Gladly.", reasoning=thought)

    monkeypatch.setattr(module["Stub"], "generate_async", generate)
    answer = str(await rails.generate_async(messages=said("Hello."), options=options))
    assert (thought in answer, REFUSAL in answer) == (not blocked, blocked)


def with_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `tools.co` says that config.yml names its flows."""
    read = RailsConfig.from_path

    def of_path(path: str) -> RailsConfig:
        config = read(path)
        config.passthrough = True
        config.rails.tool_output.flows = ["guardreasoner check tool calls"]
        config.rails.tool_input.flows = ["guardreasoner check tool result"]
        return config

    monkeypatch.setattr(RailsConfig, "from_path", of_path)


@pytest.mark.parametrize(("name", "blocked"), [("look", False), ("BAD", True), ("BROKEN", True)])
async def test_calls_of_tools_that_pass_through_are_judged(
    module: dict[str, Any], service: Running, monkeypatch: pytest.MonkeyPatch, name: str, blocked: bool
) -> None:
    async def generate(self: Any, *_: Any, **__: Any) -> LLMResponse:
        function = ToolCallFunction(name=name, arguments={"what": "it"})
        return LLMResponse("", tool_calls=[ToolCall(id="c1", function=function)])

    monkeypatch.setattr(module["Stub"], "generate_async", generate)
    with_tools(monkeypatch)
    async for rails in with_rails(module, service.url):
        answer = await rails.generate_async(messages=said("Hello."))
        assert (answer["content"] == REFUSAL, bool(answer.get("tool_calls"))) == (blocked, not blocked)


@pytest.mark.parametrize(("result", "blocked"), [("Fine.", False), ("BAD", True), ("BROKEN", True)])
async def test_results_of_tools_that_pass_through_are_judged(
    module: dict[str, Any], service: Running, monkeypatch: pytest.MonkeyPatch, result: str, blocked: bool
) -> None:
    with_tools(monkeypatch)
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        *said("Hello."),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "name": "look", "content": result},
    ]
    async for rails in with_rails(module, service.url):
        answer = await rails.generate_async(messages=messages)
        assert (answer["content"] == REFUSAL) == blocked
    assert any(result in (exchange.response or "") for exchange in service.backend.judged)


@given(st.text())
def test_no_text_but_a_verdict_is_safe(text: str) -> None:
    assert read_nemo_verdict(text)[0] is False


def test_the_parser_follows_the_verdict() -> None:
    blocked = unjudged("code", "message")
    assert read_nemo_verdict(blocked.model_dump_json()) == [False, "the guard could not judge (code)"]
    assert read_nemo_verdict(blocked.model_copy(update={"action": "allow"}).model_dump_json()) == [True]


async def test_a_prompt_in_one_string_is_judged(service: Running) -> None:
    model = GuardModel("default", service.url, KEY)
    reply = [chunk.delta_content async for chunk in model.stream_async("BAD")]
    assert read_nemo_verdict("".join(reply)) == [False, "the guard finds harmful: request"]
    await model.aclose()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # NeMo never tells a model to close its connections
def test_the_example(
    service: Running, module: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GUARD_URL", service.url)
    asyncio.run(module["main"]())
    gc.collect()
    assert capsys.readouterr().out.count("->  I would gladly tell you.") == 2
