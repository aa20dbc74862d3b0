"""Named keys: the caller is recorded, and no caller can use up the shared queue."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from guardreasoner_vl.service.app import create_app
from guardreasoner_vl.service.callers import Callers, QueueFullError, RefusedError
from guardreasoner_vl.service.config import ServiceConfig
from tests.service.clients import app_of, client
from tests.service.scripted_backend import ScriptedBackend

if TYPE_CHECKING:
    from pathlib import Path

KEYS = {"shop": "the-key-of-the-shop-", "chat": "the-key-of-the-chat-"}


def keys(**limits: dict[str, int]) -> list[dict[str, Any]]:
    return [{"name": name, "key": key, **limits.get(name, {})} for name, key in KEYS.items()]


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


def config(**settings: Any) -> ServiceConfig:
    return ServiceConfig(**settings)


class TestCallers:
    def test_keys_have_names(self) -> None:
        callers = Callers(config(keys=keys()))
        assert [callers.named(key.encode()) for key in (*KEYS.values(), "another-key-of-some-length", "")] == [
            *KEYS,
            None,
            None,
        ]
        plain = Callers(config(keys=("a-key-of-some-length", "b-key-of-some-length")))
        assert plain.named(b"b-key-of-some-length") == "key-2"

    def test_one_of_several_callers_has_half_of_the_queue(self) -> None:
        callers = Callers(config(keys=keys(chat={"max_in_flight": 1}), limits={"queue": 5}))
        for _ in range(3):
            callers.admit("shop", 2)
        with pytest.raises(QueueFullError) as caught:
            callers.admit("shop", 2)
        assert (caught.value.code, caught.value.status, caught.value.retry_after) == ("caller_busy", 429, 2)
        callers.admit("chat", 2)
        with pytest.raises(QueueFullError):
            callers.admit("chat", 2)
        callers.release("shop")
        callers.admit("shop", 2)
        with pytest.raises(QueueFullError, match="3 exchanges of this key are in flight"):
            callers.admit("shop", 2)

    def test_a_place_that_nobody_holds_is_not_given_back(self) -> None:
        callers = Callers(config(keys=keys(shop={"max_in_flight": 1})))
        for _ in range(3):
            callers.release("shop")
        callers.admit("shop", 2)
        with pytest.raises(QueueFullError):
            callers.admit("shop", 2)

    @pytest.mark.parametrize(("later", "wait"), [(0.0, 11), (4.5, 6), (9.5, 1)])
    def test_a_refusal_for_the_rate_says_when_to_try_again(self, later: float, wait: int) -> None:
        now = [0.0]
        callers = Callers(config(keys=keys(shop={"per_minute": 6})), clock=lambda: now[0])
        for _ in range(6):
            callers.admit("shop", 2)
        now[0] = later  # one every ten seconds
        with pytest.raises(QueueFullError, match=f"6 exchanges judged a minute; try again in {wait} s") as caught:
            callers.admit("shop", 2)
        assert caught.value.retry_after == wait

    def test_an_only_caller_has_all_of_the_queue(self) -> None:
        callers = Callers(config(limits={"queue": 3}))
        for _ in range(3):
            callers.admit("anonymous", 2)

    def test_exchanges_of_a_minute(self) -> None:
        now = [100.0]
        callers = Callers(config(keys=keys(shop={"per_minute": 6})), clock=lambda: now[0])
        for _ in range(6):
            callers.admit("shop", 2)
        with pytest.raises(QueueFullError) as caught:
            callers.admit("shop", 2)
        assert (caught.value.code, caught.value.retry_after) == ("rate_limited", 11)  # ten seconds each, rounded up
        now[0] += 10.0
        callers.admit("shop", 2)
        with pytest.raises(QueueFullError):
            callers.admit("shop", 2)
        now[0] += 3600.0  # an hour saves no more than a minute's
        for _ in range(6):
            callers.admit("shop", 2)
        with pytest.raises(QueueFullError):
            callers.admit("shop", 2)

    def test_keys_are_replaced_while_exchanges_are_in_flight(self) -> None:
        callers = Callers(config(keys=keys(shop={"max_in_flight": 1})))
        callers.admit("shop", 2)
        callers.reload(config(keys=[{"name": "shop", "key": "a-new-key-of-the-shop", "max_in_flight": 1}]))
        assert callers.named(KEYS["shop"].encode()) is None
        assert callers.named(b"a-new-key-of-the-shop") == "shop"
        with pytest.raises(QueueFullError):
            callers.admit("shop", 2)
        with pytest.raises(RefusedError, match=r"^the key is no longer valid: ask for a new one$") as caught:
            callers.admit("chat", 7)
        assert (caught.value.code, caught.value.status, caught.value.retry_after) == ("unauthorised", 503, 7)
        callers.release("chat")
        callers.release("shop")
        callers.admit("shop", 2)

    def test_a_reload_gives_no_fresh_minute(self) -> None:
        callers = Callers(config(keys=keys(shop={"per_minute": 1})), clock=lambda: 0.0)
        callers.admit("shop", 2)
        callers.reload(config(keys=keys(shop={"per_minute": 1})))
        with pytest.raises(QueueFullError):
            callers.admit("shop", 2)


async def test_a_caller_that_floods_leaves_places_for_others() -> None:
    async with client(app_of(ScriptedBackend(pause=0.1), keys=keys(), limits={"queue": 8})) as http:
        flood = [
            asyncio.create_task(http.post("/v1/guard", json={"prompt": f"Loaf {number}?"}, headers=bearer("shop")))
            for number in range(12)
        ]
        await asyncio.sleep(0.03)
        other = await http.post("/v1/guard", json={"prompt": "Hello."}, headers=bearer("chat"))
        answers = await asyncio.gather(*flood)
        shown = (await http.get("/metrics", headers=bearer("chat"))).text
    assert other.status_code == 200
    assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 8
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {(response.json()["error"]["code"], response.headers["retry-after"]) for response in refused} == {
        ("caller_busy", "2")
    }
    assert 'guardreasoner_caller_refused_total{caller="shop",reason="caller_busy"} 8.0' in shown
    assert 'guardreasoner_caller_verdicts_total{caller="shop",outcome="allow"} 4.0' in shown
    assert 'guardreasoner_caller_verdicts_total{caller="chat",outcome="allow"} 1.0' in shown


TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def test_the_caller_is_named_in_the_answer_and_the_audit_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    async with client(app_of(keys=keys(), audit={"path": path})) as http:
        headers = {**bearer("shop"), "X-Request-Id": "order-17", "traceparent": TRACE}
        response = await http.post("/v1/guard", json={"prompt": "Hello."}, headers=headers)
        strange = {**bearer("chat"), "X-Request-Id": "a b\tc", "traceparent": "00-xyz"}
        other = await http.post("/v1/guard", json={"prompt": "Hello."}, headers=strange)
        refused = await http.post("/v1/guard", json={"prompt": "Hello."}, headers={"X-Request-Id": "order-18"})
    assert (response.headers["x-request-id"], response.headers["traceparent"]) == ("order-17", TRACE)
    assert len(other.headers["x-request-id"]) == 32
    assert "traceparent" not in other.headers
    assert (refused.status_code, refused.headers["x-request-id"]) == (401, "order-18")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [(row["request_id"], row["traceparent"], row["caller"]) for row in rows] == [
        ("order-17", TRACE, "shop"),
        (other.headers["x-request-id"], None, "chat"),
    ]
    assert not any(key in path.read_text("utf-8") for key in KEYS.values())


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_probes_come_by_address_and_need_nothing(path: str) -> None:
    app = app_of(keys=keys(), allowed_hosts=("guard.example.org",))
    async with client(app, host="10.0.0.7:8800") as http:
        for _ in range(100):
            if (await http.get(path)).status_code == 200:
                break
            await asyncio.sleep(0.01)
        answers = [await http.get(path), await http.head(path), await http.get(path, headers={"Origin": "http://x"})]
        other = await http.post("/v1/guard", json={"prompt": "Hello."}, headers=bearer("shop"))
    assert [answer.status_code for answer in answers] == [200] * 3
    assert other.status_code == 421  # keys and a list of hosts: both hold


async def test_the_model_behind_the_proxy_never_gets_the_callers_key() -> None:
    asked: list[httpx.Request] = []

    def model(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        message = {"role": "assistant", "content": "Fine."}
        return httpx.Response(200, json={"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    upstream: Any = {"base_url": "http://model.test/v1"}
    app = create_app(config(keys=keys(), upstream=upstream), {"default": ScriptedBackend()}, httpx.MockTransport(model))
    async with client(app) as http:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello."}]}
        answer = await http.post("/v1/chat/completions", json=body, headers=bearer("shop"))
    assert answer.status_code == 200
    assert "authorization" not in asked[0].headers
