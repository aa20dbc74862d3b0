"""Each integration follows the verdict's action only, whatever the operator enforces."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.integrations import GuardClient
from tests.integrations.examples import example
from tests.integrations.service import KEY, running_service
from tests.service.enforcement_table import ENFORCE, USES, settings_of
from tests.service.sided_backend import SidedBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    Ask = Callable[[str, str, str], Coroutine[Any, Any, bool]]

pytestmark = pytest.mark.slow
CASES = [("Hello.", "Fine.", None), ("A BAD request.", "Fine.", "request"), ("Hello.", "A BAD answer.", "response")]


@contextmanager
def service(request_use: str, response_use: str) -> Iterator[str]:
    with running_service(SidedBackend(), **settings_of(request_use, response_use)) as running:
        yield running.url


async def client(url: str, said: str, answer: str) -> bool:
    async with GuardClient(url, KEY) as guard:
        actions = [(await guard.ajudge(said)).action, (await guard.ajudge(said, response=answer)).action]
    return "block" in actions


async def langchain(url: str, said: str, answer: str) -> bool:
    pytest.importorskip("langchain", minversion="1.0", reason="langchain 1.x is not installed")
    from langchain_core.language_models.fake_chat_models import FakeListChatModel

    async with GuardClient(url, KEY) as guard:
        agent = example("langchain_middleware.py")["guarded"](FakeListChatModel(responses=[answer]), guard)
        state = await agent.ainvoke({"messages": [{"role": "user", "content": said}]})
    return bool(state["messages"][-1].content != answer)


async def agents(url: str, said: str, answer: str) -> bool:
    library = pytest.importorskip("agents", reason="openai-agents is not installed")
    module = example("openai_agents.py")

    async def get_response(*_: Any, **__: Any) -> Any:
        return module["said"](answer)

    model = module["Parrot"]()
    model.get_response = get_response
    library.set_tracing_disabled(True)
    async with GuardClient(url, KEY) as guard:
        return bool(await module["answer"](module["guarded"](model, guard), said) != answer)


async def nemo(url: str, said: str, answer: str) -> bool:
    pytest.importorskip("nemoguardrails", reason="nemoguardrails is not installed")
    module = example("nemo_guardrails.py")
    module["Stub"].answer = answer
    rails = module["rails"](url)
    reply = await rails.generate_async(messages=[{"role": "user", "content": said}])
    await rails.runtime.registered_action_params["llms"]["guardreasoner"].aclose()
    return bool(reply["content"] != answer)


@pytest.mark.filterwarnings("ignore:Use 'nim_base_url' instead:DeprecationWarning")  # NeMo reads a field of its own
@pytest.mark.parametrize("ask", [client, langchain, agents, nemo])
@pytest.mark.parametrize(("request_use", "response_use"), USES)
def test_what_is_enforced_is_blocked_and_what_is_monitored_passes(
    ask: Ask, request_use: str, response_use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUARD_KEY", KEY)
    uses = {None: "monitor", "request": request_use, "response": response_use}
    with service(request_use, response_use) as url:
        blocked = {harm: asyncio.run(ask(url, said, answer)) for said, answer, harm in CASES}
    assert blocked == {harm: use == ENFORCE for harm, use in uses.items()}
