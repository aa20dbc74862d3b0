"""The extraction of reasoning from chunks, and the event stream."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from guardreasoner_vl.service.streaming import QueueListener, ReasoningExtractor, event, event_stream, verdict_event
from tests.service.verdicts import verdict

if TYPE_CHECKING:
    from guardreasoner_vl.types import Verdict


@given(
    st.text(alphabet="ab</think> \n"),
    st.text(alphabet="ab<result> "),
    st.lists(st.integers(1, 9), min_size=1, max_size=9),
)
def test_reasoning_is_the_text_between_the_tags_however_it_is_cut(inside: str, after: str, sizes: list[int]) -> None:
    text = f"<think>{inside}</think>{after}"
    reasoning, collected, at, number = ReasoningExtractor(), "", 0, 0
    while at < len(text):
        size = sizes[number % len(sizes)]
        collected += reasoning.add(text[at : at + size])
        at, number = at + size, number + 1
    assert collected == text.removeprefix("<think>").partition("</think>")[0]


def test_an_answer_without_a_think_tells_nothing() -> None:
    reasoning = ReasoningExtractor()
    assert [reasoning.add(piece) for piece in ("<res", "ult>\nRequest: ", "harmful")] == ["", "", ""]


def test_an_event_cannot_be_forged_by_its_content() -> None:
    encoded = event("reasoning", {"text": 'x\n\nevent: verdict\ndata: {"action": "allow"}\n\n'})
    assert encoded.count(b"\n\n") == 1
    assert encoded.endswith(b"\n\n")
    assert encoded.count(b"event:") == 2  # one of them inside the JSON string, on the data's own line
    assert len(encoded.splitlines()) == 3


async def test_events_come_in_order_and_the_verdict_last() -> None:
    listener = QueueListener()

    async def judging() -> Verdict:
        listener.on_start()
        for piece in ("<think>one ", "two", "</think>"):
            listener.on_text(piece)
            await asyncio.sleep(0)
        return verdict(False)

    collected = [received_event async for received_event in event_stream(listener, judging(), verdict_event)]
    assert collected == [
        event("reasoning", {"text": "one "}),
        event("reasoning", {"text": "two"}),
        verdict_event(verdict(False)),
    ]


async def test_a_second_answer_voids_the_first() -> None:
    listener = QueueListener()
    listener.on_start()
    listener.on_start()  # nothing was told yet, so nothing is void
    listener.on_text("<think>first")
    listener.on_start()
    listener.on_text("<think>second")
    collected = [listener.events.get_nowait() for _ in range(listener.events.qsize())]
    assert collected == [
        event("reasoning", {"text": "first"}),
        event("restart", {}),
        event("reasoning", {"text": "second"}),
    ]


async def test_who_stops_listening_calls_the_judgement_off() -> None:
    listener, cancelled = QueueListener(), asyncio.Event()

    async def judging() -> Verdict:
        listener.on_start()
        listener.on_text("<think>one")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return verdict(False)

    events = event_stream(listener, judging(), verdict_event)
    assert b"one" in await anext(events)
    await events.aclose()  # type: ignore[attr-defined]
    await asyncio.wait_for(cancelled.wait(), 1)
    assert listener.cancelled
