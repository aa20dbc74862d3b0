"""The middleware in a real LangChain agent with a scripted model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.integrations.examples import example
from tests.integrations.service import EXCHANGES, KEY, RED, Running

pytest.importorskip("langchain", minversion="1.0", reason="langchain 1.x is not installed")

from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool

from guardreasoner_vl.integrations.langchain import chat_messages

if TYPE_CHECKING:
    from guardreasoner_vl.integrations import GuardClient

EXAMPLE = example("langchain_middleware.py")
baked: list[str] = []


@tool
def bake(what: str) -> str:
    """Bake something."""
    baked.append(what)
    return f"a {what}, baked"


class Script(GenericFakeChatModel):
    """Says one message after the other."""

    def bind_tools(self, tools: Any, **_: Any) -> Any:
        return self


def agent(guard: GuardClient, *says: Any) -> Any:
    return EXAMPLE["guarded"](Script(messages=iter(says)), guard, [bake])


async def run(agent: Any, content: Any, asynchronously: bool) -> list[Any]:
    state = {"messages": [HumanMessage(content)]}
    result = await agent.ainvoke(state) if asynchronously else agent.invoke(state)
    return list(result["messages"])


def calling(what: str) -> AIMessage:
    return AIMessage("", tool_calls=[{"name": "bake", "args": {"what": what}, "id": "c1"}])


@pytest.mark.parametrize("asynchronously", [True, False])
@pytest.mark.parametrize(
    ("content", "answer", "blocked"),
    [
        *EXCHANGES,
        ([{"type": "image", "base64": RED.partition(",")[2], "mime_type": "image/png"}], "Gladly.", True),
        ([{"type": "audio", "base64": "AA==", "mime_type": "audio/wav"}], "Gladly.", True),
        ([{"type": "image"}], "Gladly.", True),
    ],
)
async def test_the_model_is_asked_and_answers_only_after_a_verdict(
    guard: GuardClient, content: Any, answer: str, blocked: bool, asynchronously: bool
) -> None:
    messages = await run(agent(guard, answer), content, asynchronously)
    assert len(messages) == 2
    assert (messages[-1].content == answer) == (not blocked)
    assert (messages[-1].response_metadata.get("finish_reason") == "content_filter") == blocked


async def test_without_a_service_everything_is_blocked(down: GuardClient) -> None:
    for asynchronously in (True, False):
        messages = await run(agent(down, "Gladly."), "Hello.", asynchronously)
        assert messages[-1].content == "the guard could not judge (guard_unreachable)"


async def test_a_refused_call_of_a_tool_is_not_made(guard: GuardClient) -> None:
    baked.clear()
    messages = await run(agent(guard, calling("BAD"), "Gladly."), "Bake.", asynchronously=True)
    assert (baked, len(messages), messages[-1].tool_calls) == ([], 2, [])


async def test_an_allowed_call_is_made(guard: GuardClient) -> None:
    baked.clear()
    messages = await run(agent(guard, calling("cake"), "Gladly."), "Bake.", asynchronously=True)
    assert (baked, messages[-1].content) == (["cake"], "Gladly.")


async def test_what_a_tool_gives_back_is_judged(guard: GuardClient) -> None:
    @tool
    def look(what: str) -> str:
        """Look something up."""
        return "BAD"

    call = AIMessage("", tool_calls=[{"name": "look", "args": {"what": "it"}, "id": "c1"}])
    agent = EXAMPLE["guarded"](Script(messages=iter([call, "Gladly."])), guard, [look])
    messages = await run(agent, "Look.", asynchronously=True)
    assert isinstance(messages[-2], ToolMessage)
    assert messages[-1].response_metadata["finish_reason"] == "content_filter"


async def test_a_refused_turn_is_history_to_the_next(service: Running, guard: GuardClient) -> None:
    first = await run(agent(guard), "BAD", asynchronously=True)
    await agent(guard, "Gladly.").ainvoke({"messages": [*first, HumanMessage("Hello.")]})
    judged = service.backend.judged[-1]
    assert (judged.prompt, judged.history[0].prompt) == ("Hello.", "BAD")


def test_reasoning_is_judged_as_text_and_a_call_told_twice_once() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "bake", "arguments": "{}"}
    content: list[Any] = [
        {"type": "thinking", "thinking": "first"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "second"}]},
        {"type": "text", "text": "third"},
        call,
    ]
    made = chat_messages([AIMessage(content, tool_calls=[{"name": "bake", "args": {}, "id": "c1"}])])
    assert made is not None
    assert [part["text"] for part in made[0]["content"]] == ["first", "second", "third"]
    assert len(made[0]["tool_calls"]) == 1


def test_the_example(service: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GUARD_URL", service.url)
    monkeypatch.setenv("GUARD_KEY", KEY)
    EXAMPLE["main"]()
    assert capsys.readouterr().out.count("->") == 2
