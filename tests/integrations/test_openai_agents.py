"""The guardrails in a real agent of the OpenAI Agents SDK, with a scripted model."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel

from tests.integrations.examples import example
from tests.integrations.service import GREEN, KEY, RED, Running

pytest.importorskip("agents", reason="openai-agents is not installed")

import agents
from openai.types.responses import Response, ResponseCompletedEvent, ResponseFunctionToolCall, ResponseReasoningItem
from openai.types.responses.response_reasoning_item import Summary

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from guardreasoner_vl.integrations import GuardClient

pytestmark = pytest.mark.slow
EXAMPLE = example("openai_agents.py")


class Cake(BaseModel):
    name: str


@pytest.fixture(autouse=True, scope="module")
def no_tracing() -> Iterator[None]:
    agents.set_tracing_disabled(True)
    yield
    agents.set_tracing_disabled(False)


class Script(agents.Model):
    """A model that returns the scripted answers in order and counts its calls."""

    def __init__(self, *says: Any) -> None:
        self.left = list(says)
        self.asked = 0

    async def get_response(self, *_: Any, **__: Any) -> Any:
        self.asked += 1
        scripted = self.left.pop(0)
        return EXAMPLE["said"](scripted) if isinstance(scripted, str) else scripted

    async def stream_response(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        scripted = await self.get_response()
        response = Response(
            id="1",
            created_at=1,
            model="m",
            object="response",
            output=scripted.output,
            parallel_tool_calls=False,
            tool_choice="auto",
            tools=[],
        )
        yield ResponseCompletedEvent(type="response.completed", response=response, sequence_number=0)


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def image(url: str) -> dict[str, Any]:
    return {"type": "input_image", "image_url": url, "detail": "auto"}


CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c1"}


async def streamed(agent: Any, agent_input: Any) -> str:
    run = agents.Runner.run_streamed(agent, agent_input)
    try:
        async for _ in run.stream_events():
            pass
    except (agents.InputGuardrailTripwireTriggered, agents.OutputGuardrailTripwireTriggered):
        return "(refused)"
    return str(run.final_output)


@pytest.mark.parametrize("way", [EXAMPLE["answer"], streamed])
@pytest.mark.parametrize(
    ("agent_input", "answer", "asked", "blocked"),
    [
        ("Hello.", "Gladly.", 1, False),
        ("BAD", "Gladly.", 0, True),
        ("BROKEN", "Gladly.", 0, True),
        ("Hello.", "BAD", 1, True),
        ("Hello.", "BROKEN", 1, True),
        (user(image(GREEN)), "Gladly.", 1, False),
        (user(image(RED)), "Gladly.", 0, True),
        (user({"type": "input_text", "text": "Hello."}, image(RED)), "Gladly.", 0, True),
        (user({"type": "input_image", "file_id": "f1", "detail": "auto"}), "Gladly.", 0, True),
        (user({"type": "input_file", "file_id": "f1"}), "Gladly.", 0, True),
        ([{"type": "item_reference", "id": "i1"}], "Gladly.", 0, True),
        ([*user(image(GREEN)), CALL, {**RESULT, "output": [image(RED)]}], "Gladly.", 0, True),
    ],
)
async def test_the_agent_starts_and_ends_only_after_a_verdict(
    guard: GuardClient, agent_input: Any, answer: str, asked: int, blocked: bool, way: Any
) -> None:
    model = Script(answer)
    reply = await way(EXAMPLE["guarded"](model, guard), agent_input)
    assert reply.startswith("(refused)") if blocked else reply == answer
    assert model.asked == asked


BETWEEN: list[dict[str, Any]] = [
    {"type": "reasoning", "id": "r1", "summary": [{"type": "summary_text", "text": "BAD"}]},
    {"type": "reasoning", "id": "r1", "summary": [], "content": [{"type": "reasoning_text", "text": "BAD"}]},
    {**CALL, "arguments": '{"topic": "BAD"}'},
    {"type": "custom_tool_call", "call_id": "c1", "name": "look", "input": "BAD"},
    {"type": "web_search_call", "id": "w1", "status": "completed", "action": {"type": "search", "query": "BAD"}},
    {"type": "file_search_call", "id": "f1", "status": "completed", "queries": ["Fine."], "results": [{"text": "BAD"}]},
    {"type": "code_interpreter_call", "id": "i1", "code": "1", "outputs": [{"type": "logs", "logs": "BAD"}]},
    {"type": "code_interpreter_call", "id": "i1", "code": "1", "outputs": [{"type": "image", "url": RED}]},
    {"type": "image_generation_call", "id": "g1", "status": "completed", "result": RED.partition(",")[2]},
    {"type": "mcp_call", "id": "m1", "server_label": "s", "name": "look", "arguments": "{}", "output": "BAD"},
    {"type": "computer_call_output", "call_id": "c1", "output": {"type": "computer_screenshot", "image_url": RED}},
    {"type": "computer_call_output", "call_id": "c1", "output": {"type": "computer_screenshot", "file_id": "f1"}},
    {**RESULT, "output": [{"type": "input_file", "file_id": "f1"}]},
    {"type": "something_new", "inside": {"deep": ["BAD"]}},
]
"""Items beside messages, each with something harmful or unseen."""


@pytest.mark.parametrize("item", BETWEEN)
async def test_every_item_of_the_input_is_judged_or_blocked(guard: GuardClient, item: dict[str, Any]) -> None:
    model = Script("Gladly.")
    items = [{"role": "user", "content": "Hello."}, item]
    assert (await EXAMPLE["answer"](EXAMPLE["guarded"](model, guard), items)).startswith("(refused)")
    assert model.asked == 0


async def test_harmless_items_pass(guard: GuardClient) -> None:
    secret = {"type": "reasoning", "id": "r1", "summary": [], "encrypted_content": "c" * 90}
    search = {"type": "web_search_call", "id": "w1", "status": "completed", "action": {"type": "search", "query": "x"}}
    items = [{"role": "user", "content": "Hello."}, secret, search, CALL, {**RESULT, "output": "Fine."}]
    assert await EXAMPLE["answer"](EXAMPLE["guarded"](Script("Gladly."), guard), items) == "Gladly."


def response(*output: Any) -> agents.ModelResponse:
    return agents.ModelResponse(output=list(output), usage=agents.Usage(), response_id=None)


def called(arguments: str = "{}") -> ResponseFunctionToolCall:
    return ResponseFunctionToolCall(name="look", arguments=arguments, call_id="c1", type="function_call")


def looking(result: str, looked: list[str]) -> Any:
    @agents.function_tool
    def look(topic: str = "") -> str:
        looked.append(topic)
        return result

    return look


@pytest.mark.parametrize("way", [EXAMPLE["answer"], streamed])
@pytest.mark.parametrize(
    ("arguments", "result", "calls", "blocked"),
    [
        ('{"topic": "it"}', "Fine.", 1, False),
        ('{"topic": "BAD"}', "Fine.", 0, True),
        ('{"topic": "BROKEN"}', "Fine.", 0, True),
        ('{"topic": "it"}', "BAD", 1, True),
    ],
)
async def test_what_tools_are_given_and_give_back_is_judged(
    guard: GuardClient, arguments: str, result: str, calls: int, blocked: bool, way: Any
) -> None:
    looked: list[str] = []
    model = Script(response(called(arguments)), "Gladly.")
    output = await way(EXAMPLE["guarded"](model, guard, tools=[looking(result, looked)]), "Look.")
    assert (output.startswith("(refused)"), len(looked)) == (blocked, calls)
    assert model.asked == (1 if blocked else 2)


@pytest.mark.parametrize("way", [EXAMPLE["answer"], streamed])
async def test_reasoning_does_not_leave_unjudged(guard: GuardClient, way: Any) -> None:
    said = EXAMPLE["said"]("Gladly.").output
    for thought, blocked in (("BAD", True), ("First this.", False)):
        summary = Summary(text=thought, type="summary_text")
        model = Script(response(ResponseReasoningItem(id="r1", summary=[summary], type="reasoning"), *said))
        output = await way(EXAMPLE["guarded"](model, guard), "Hello.")
        assert output.startswith("(refused)") == blocked


async def test_a_refused_input_stays_in_the_session_until_it_is_taken_out(guard: GuardClient) -> None:
    agent = EXAMPLE["guarded"](Script("Gladly.", "Gladly."), guard)
    session = agents.SQLiteSession("one")
    for prompt in ("BAD", "Hello."):  # the SDK keeps both: the second is refused for what the first said
        with pytest.raises(agents.InputGuardrailTripwireTriggered):
            await agents.Runner.run(agent, prompt, session=session)
    for _ in range(2):
        await session.pop_item()
    assert (await agents.Runner.run(agent, "Hello.", session=session)).final_output == "Gladly."


async def test_the_example_takes_a_refused_input_out_of_the_session(guard: GuardClient) -> None:
    agent = EXAMPLE["guarded"](Script("Gladly.", "BAD", "Gladly."), guard)
    session = agents.SQLiteSession("one")
    assert (await EXAMPLE["answer"](agent, "BAD", session)).startswith("(refused)")
    assert await session.get_items() == []
    assert await EXAMPLE["answer"](agent, "Hello.", session) == "Gladly."
    items = await session.get_items()
    assert (await EXAMPLE["answer"](agent, "Tell me.", session)).startswith("(refused)")
    assert await session.get_items() == items
    assert await EXAMPLE["answer"](agent, "Hello.", session) == "Gladly."


async def test_without_a_service_everything_is_blocked(down: GuardClient) -> None:
    model = Script("Gladly.")
    assert (await EXAMPLE["answer"](EXAMPLE["guarded"](model, down), "Hello.")).startswith("(refused)")
    assert model.asked == 0


async def test_the_answer_is_judged_in_its_conversation(service: Running, guard: GuardClient) -> None:
    earlier = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}]
    await EXAMPLE["answer"](
        EXAMPLE["guarded"](Script("Gladly."), guard), [*earlier, {"role": "user", "content": "Go."}]
    )
    asked, *_, answered = service.backend.judged
    assert (asked.prompt, asked.response, asked.history[0].response) == ("Go.", None, "Yes?")
    assert (answered.prompt, answered.response) == ("Go.", "Gladly.")


async def test_a_structured_output_is_judged_as_json(service: Running, guard: GuardClient) -> None:
    agent = EXAMPLE["guarded"](Script('{"name": "BAD"}'), guard, output_type=Cake)
    assert (await EXAMPLE["answer"](agent, "Bake.")).startswith("(refused)")
    assert service.backend.judged[-1].response == '{"name": "BAD"}'


async def test_the_tripwire_carries_the_verdict(guard: GuardClient) -> None:
    with pytest.raises(agents.InputGuardrailTripwireTriggered) as tripped:
        await agents.Runner.run(EXAMPLE["guarded"](Script(), guard), "BAD")
    result = tripped.value.guardrail_result
    assert (result.guardrail.get_name(), result.output.output_info.flagged) == ("guardreasoner", True)


async def test_a_tool_is_not_called_before_the_input_was_judged(guard: GuardClient) -> None:
    called: list[str] = []

    @agents.function_tool
    def bake() -> str:
        called.append("bake")
        return "baked"

    call = ResponseFunctionToolCall(name="bake", arguments="{}", call_id="c1", type="function_call")
    response = agents.ModelResponse(output=[call], usage=agents.Usage(), response_id=None)
    replies = [
        await EXAMPLE["answer"](EXAMPLE["guarded"](Script(response, "Gladly."), guard, tools=[bake]), agent_input)
        for agent_input in ("BAD", "Bake.")
    ]
    assert replies == ["(refused) InputGuardrailTripwireTriggered", "Gladly."]
    assert called == ["bake"]


def test_the_example(service: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GUARD_URL", service.url)
    monkeypatch.setenv("GUARD_KEY", KEY)
    asyncio.run(EXAMPLE["main"]())
    assert capsys.readouterr().out.count("->") == 2
