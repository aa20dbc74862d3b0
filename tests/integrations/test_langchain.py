"""The middleware in a real LangChain agent with a scripted model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel

from tests.integrations.examples import example
from tests.integrations.service import EXCHANGES, GREEN, KEY, RED, Running

pytest.importorskip("langchain", minversion="1.0", reason="langchain 1.x is not installed")

from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool

from guardreasoner_vl.integrations.langchain import chat_messages

if TYPE_CHECKING:
    from guardreasoner_vl.integrations import GuardClient

pytestmark = pytest.mark.slow
EXAMPLE = example("langchain_middleware.py")


class Oven(BaseModel):
    dish: str


baked: list[str] = []


@tool
def bake(dish: str) -> str:
    """Bake something."""
    baked.append(dish)
    return f"a {dish}, baked"


class Script(GenericFakeChatModel):
    """A model that returns the scripted messages in order."""

    def bind_tools(self, tools: Any, **_: Any) -> Any:
        return self


def agent(guard: GuardClient, *says: Any) -> Any:
    return EXAMPLE["guarded"](Script(messages=iter(says)), guard, [bake])


async def run(agent: Any, content: Any, asynchronously: bool) -> list[Any]:
    state = {"messages": [HumanMessage(content)]}
    result = await agent.ainvoke(state) if asynchronously else agent.invoke(state)
    return list(result["messages"])


def calling(food: str) -> AIMessage:
    return AIMessage("", tool_calls=[{"name": "bake", "args": {"dish": food}, "id": "c1"}])


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
    def look(dish: str) -> str:
        """Look something up."""
        return "BAD"

    call = AIMessage("", tool_calls=[{"name": "look", "args": {"dish": "it"}, "id": "c1"}])
    agent = EXAMPLE["guarded"](Script(messages=iter([call, "Gladly."])), guard, [look])
    messages = await run(agent, "Look.", asynchronously=True)
    assert isinstance(messages[-2], ToolMessage)
    assert messages[-1].response_metadata["finish_reason"] == "content_filter"


async def test_a_refused_turn_is_history_to_the_next(service: Running, guard: GuardClient) -> None:
    first = await run(agent(guard), "BAD", asynchronously=True)
    await agent(guard, "Gladly.").ainvoke({"messages": [*first, HumanMessage("Hello.")]})
    judged = service.backend.judged[-1]
    assert (judged.prompt, judged.history[0].prompt) == ("Hello.", "BAD")


def test_reasoning_is_judged_as_text_and_a_repeated_call_once() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "bake", "arguments": "{}"}
    content: list[Any] = [
        {"type": "thinking", "thinking": "first"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "second"}]},
        {"type": "text", "text": "third"},
        call,
    ]
    said = AIMessage(content, tool_calls=[{"name": "bake", "args": {}, "id": "c1"}], response_metadata=METADATA)
    judged = chat_messages([said])
    assert judged is not None
    assert [part["text"] for part in judged[0]["content"]] == ["first", "second", "third", "bake({})"]


METADATA = {"model_name": "BAD", "token_usage": {"BAD": 1}, "finish_reason": "stop", "logprobs": {"content": ["BAD"]}}
HARMFUL: dict[str, dict[str, Any]] = {
    "reasoning_content": {"additional_kwargs": {"reasoning_content": "BAD"}},
    "function_call": {"additional_kwargs": {"function_call": {"name": "bake", "arguments": "BAD"}}},
    "raw tool calls": {"additional_kwargs": {"tool_calls": [{"id": "c1", "function": {"name": "BAD"}}]}},
    "refusal": {"additional_kwargs": {"refusal": "BAD"}},
    "audio": {"additional_kwargs": {"audio": {"id": "a1", "transcript": "Fine."}}},
    "a vendor's field": {"additional_kwargs": {"citations": [{"title": "BAD"}]}},
    "a vendor's content": {"additional_kwargs": {"content": "BAD", "role": "system"}},
    "an object": {"additional_kwargs": {"parsed": Oven(dish="BAD")}},
    "no JSON": {"additional_kwargs": {"parsed": object()}},
    "invalid tool call": {
        "invalid_tool_calls": [{"name": "bake", "args": "{BAD", "id": "c1", "error": None, "type": "invalid_tool_call"}]
    },
    "metadata": {"response_metadata": {**METADATA, "grounding": {"query": "BAD"}}},
    "name": {"name": "BAD"},
    "thinking": {"content": [{"type": "thinking", "thinking": "BAD", "signature": "s" * 80}]},
    "thinking that is no ciphertext": {"content": [{"type": "redacted_thinking", "data": "BAD"}]},
    "reasoning": {"content": [{"type": "reasoning", "reasoning": "BAD"}]},
    "reasoning, summed up": {"content": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "BAD"}]}]},
    "a field of a text": {"content": [{"type": "text", "text": "Fine.", "annotations": [{"title": "BAD"}]}]},
    "server tool call": {
        "content": [{"type": "server_tool_call", "id": "s1", "name": "web_search", "args": {"query": "BAD"}}]
    },
    "server tool result": {
        "content": [{"type": "server_tool_result", "tool_call_id": "s1", "status": "success", "output": ["BAD"]}]
    },
    "web search of Anthropic": {
        "content": [{"type": "web_search_tool_result", "content": [{"title": "BAD", "encrypted_content": "e" * 90}]}]
    },
    "non-standard": {"content": [{"type": "non_standard", "value": {"x": {"y": "BAD"}}}]},
    "image": {"content": [{"type": "image", "base64": RED.partition(",")[2], "mime_type": "image/png"}]},
    "image beside another": {
        "content": [{"type": "image", "url": GREEN, "base64": RED.partition(",")[2], "mime_type": "image/png"}]
    },
    "image in a result": {"content": [{"type": "server_tool_result", "output": [{"type": "image", "url": RED}]}]},
    "audio block": {"content": [{"type": "audio", "base64": "AA==", "mime_type": "audio/wav"}]},
    "file block": {"content": [{"type": "file", "file_id": "f1"}]},
    "text file": {"content": [{"type": "text-plain", "file_id": "f1", "mime_type": "text/plain"}]},
    "bytes in a vendor's block": {"content": [{"type": "non_standard", "value": {"pdf": "A" * 600}}]},
}
"""Where an answer may hold what is harmful, or what nobody can judge."""


@pytest.mark.parametrize("place", HARMFUL)
async def test_wherever_an_answer_holds_it_it_does_not_leave(guard: GuardClient, place: str) -> None:
    said = AIMessage(**{"content": "Fine.", **HARMFUL[place]})
    messages = await run(agent(guard, said), "Hello.", asynchronously=True)
    assert messages[-1].response_metadata.get("finish_reason") == "content_filter"
    assert (messages[-1].additional_kwargs, "BAD" in str(messages[1:])) == ({}, False)


@pytest.mark.parametrize(
    "said",
    [
        {"content": "Fine.", "response_metadata": METADATA, "name": "helper"},
        {"content": "Fine.", "additional_kwargs": {"reasoning_content": "First this.", "refusal": None}},
        {"content": [{"type": "thinking", "thinking": "First this.", "signature": "s" * 80}]},
        {"content": [{"type": "redacted_thinking", "data": "c" * 80}, {"type": "text", "text": "Fine."}]},
        {"content": [{"type": "server_tool_call", "id": "s1", "name": "web_search", "args": {"query": "bread"}}]},
        {"content": [{"type": "image", "url": GREEN}]},
    ],
)
async def test_a_harmless_answer_leaves_as_it_is(guard: GuardClient, said: dict[str, Any]) -> None:
    messages = await run(agent(guard, AIMessage(**said)), "Hello.", asynchronously=True)
    assert {name: getattr(messages[-1], name) for name in said} == said


@pytest.mark.parametrize(
    "said",
    [
        HumanMessage("Hello.", name="BAD"),
        HumanMessage("Hello.", additional_kwargs={"note": "BAD"}),
        HumanMessage([{"type": "text", "text": "Hello."}, {"type": "file", "file_id": "f1"}]),
        HumanMessage([{"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "BAD"}]}]),
    ],
)
async def test_wherever_a_request_holds_it_the_model_is_not_asked(guard: GuardClient, said: HumanMessage) -> None:
    result = await agent(guard).ainvoke({"messages": [said]})
    assert result["messages"][-1].response_metadata["finish_reason"] == "content_filter"


def test_the_example(service: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GUARD_URL", service.url)
    monkeypatch.setenv("GUARD_KEY", KEY)
    EXAMPLE["main"]()
    assert capsys.readouterr().out.count("->") == 2
