"""Exchanges from every kind of caller, and the verdict's shape."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel, ValidationError

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.guard import as_exchange
from guardreasoner_vl.types import (
    MODES,
    Exchange,
    Judgement,
    Label,
    ModelInfo,
    Sample,
    Turn,
    Usage,
    Verdict,
    VerdictError,
    failed_verdict,
)
from tests.made_images import image

PIXEL = "data:image/png;base64,iVBORw0KGgo="
OTHER = "DATA:image/jpeg;base64,/9j/"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


# --- Exchange ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [None, "", " \n\t"])
@pytest.mark.parametrize("response", [None, "", "\r\n"])
def test_an_empty_exchange_is_refused(prompt: str | None, response: str | None) -> None:
    with pytest.raises(InputError, match="empty"):
        Exchange(prompt, (), response)
    with pytest.raises(InputError, match="empty"):
        Exchange(prompt, (), response, (Turn("earlier", (), "answer"),))


def test_what_is_there_to_judge() -> None:
    assert (Exchange("q").has_prompt, Exchange("q").has_response) == (True, False)
    assert (Exchange(response="a").has_prompt, Exchange(response="a").has_response) == (False, True)
    assert (Exchange(images=(b"x",)).has_prompt, Exchange(" ", (b"x",), " ").has_response) == (True, False)


def test_sequences_become_tuples_and_images_are_in_reading_order() -> None:
    exchange = Exchange("q", ["c"], "a", [Turn("x", ("a", "b")), Turn("y")])  # type: ignore[arg-type]  # what callers do
    assert exchange.images == ("c",)
    assert exchange.history == (Turn("x", ("a", "b")), Turn("y"))
    assert exchange.all_images == ("a", "b", "c")
    with pytest.raises(FrozenInstanceError):
        exchange.prompt = "other"  # type: ignore[misc]  # the point of the test


@pytest.mark.parametrize("source", ["cat.png", b"\x89PNG"])
def test_one_bare_image_is_not_taken_letter_by_letter(source: Any) -> None:
    with pytest.raises(InputError, match="tuple"):
        Exchange("q", source)


@pytest.mark.parametrize(
    "make",
    [
        lambda bad: Exchange(bad),
        lambda bad: Exchange("q", (), bad),
        lambda bad: Exchange("q", history=(Turn(bad),)),
        lambda bad: Exchange("q", history=(Turn("x", (), bad),)),
        lambda bad: Exchange.from_messages([user(bad)]),
        lambda bad: Exchange.from_messages(json.loads(json.dumps([user("q"), assistant(bad)]))),
    ],
)
def test_text_that_no_tokenizer_takes_is_refused(make: Any) -> None:
    with pytest.raises(InputError, match="Unicode"):
        make("a\ud83db")
    assert make("a\U0001f600b")


@pytest.mark.parametrize("bad", [f"{PIXEL}\ud800", "\udfff.png", "data:\ud83dimage/png;base64,", "\ud800"])
@pytest.mark.parametrize(
    "make",
    [
        lambda bad: Exchange("q", (bad,)),
        lambda bad: Exchange("q", (PIXEL, bad)),
        lambda bad: Exchange("q", history=(Turn("x", (bad,)),)),
        lambda bad: Exchange("q", history=(Turn("x"), Turn("y", (PIXEL, bad), "z"))),
        lambda bad: as_exchange({"prompt": "q", "images": [bad]}),
        lambda bad: Exchange.from_messages([user([{"type": "image_url", "image_url": {"url": f"data:{bad}"}}])]),
    ],
)
def test_an_image_string_that_nothing_can_encode_is_refused_in_one_line(make: Any, bad: str) -> None:
    with pytest.raises(InputError) as caught:
        make(bad)
    assert "\n" not in str(caught.value)
    assert "Unicode" in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize("junk", [None, 5, 2.5, True, {"url": PIXEL}, [PIXEL], (), object(), bytearray(b"x")])
def test_what_is_no_image_is_refused(junk: Any) -> None:
    with pytest.raises(InputError, match=f"{type(junk).__name__} is not an image"):
        Exchange("q", (junk,))
    with pytest.raises(InputError, match=f"{type(junk).__name__} is not an image"):
        Exchange("q", history=(Turn("x", (junk,)),))


@pytest.mark.parametrize("junk", [5, {"url": PIXEL}, Path("cat.png"), Image.new("RGB", (2, 2)), "cat.png", None])
def test_images_come_in_a_sequence(junk: Any) -> None:
    with pytest.raises(InputError, match="sequence of images"):
        Exchange("q", junk)
    with pytest.raises(InputError, match="sequence of images"):
        Exchange("q", history=(Turn("x", junk),))


@pytest.mark.parametrize("make", [lambda bad: Exchange(bad), lambda bad: Exchange("q", (), bad), lambda bad: Turn(bad)])
@pytest.mark.parametrize("junk", [5, b"q", ["q"], {"text": "q"}])
def test_text_is_a_string(make: Any, junk: Any) -> None:
    with pytest.raises(InputError, match="must be a string"):
        make(junk)


def test_history_is_made_of_turns() -> None:
    for history in (["x"], [{"prompt": "x"}]):
        with pytest.raises(InputError, match="sequence of Turn"):
            Exchange("q", history=history)  # type: ignore[arg-type]  # what callers do


def test_every_kind_of_image_passes_untouched() -> None:
    images = (PIXEL, "cat.png", Path("cat.png"), b"\x89PNG\r\n", Image.new("RGB", (2, 2)), image(2, 2))
    assert Exchange("q", images, history=(Turn("x", images),)).all_images == images * 2


# --- Line ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_make_no_difference(end: str) -> None:
    text = f"one{end}two{end}{end}three{end}"
    plain = "one\ntwo\n\nthree\n"
    exchange = Exchange(text, (), text, (Turn(text, (), text),))
    assert exchange == Exchange(plain, (), plain, (Turn(plain, (), plain),))
    assert Exchange.from_messages([user(text), assistant(text)]) == Exchange.from_messages(
        [user(plain), assistant(plain)]
    )
    assert as_exchange({"prompt": text, "response": text}) == Exchange(plain, (), plain)
    assert replace(exchange, response=text).response == plain


def test_mixed_line_ends() -> None:
    assert Exchange("a\r\r\nb\n\rc\u2028d\x85").prompt == "a\n\nb\n\nc\u2028d\x85"


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_rows_of_a_corpus_have_the_line_ends_of_exchanges(end: str) -> None:
    values = {"id": "1", "source": "s", "modality": "text", "reasoning": f"a{end}b"}
    sample = Sample.model_validate({**values, "prompt": f"a{end}b", "response": f"c{end}d"})
    assert (sample.prompt, sample.response, sample.reasoning) == ("a\nb", "c\nd", "a\nb")
    assert sample.exchange() == Exchange("a\nb", (), "c\nd")


# --- Exchange.from_messages --------------------------------------------------------------------------

CALL = {"id": "1", "type": "function", "function": {"name": "sh", "arguments": '{"cmd": "ls"}'}}

FORMS = [
    pytest.param([user("q")], Exchange("q"), id="prompt"),
    pytest.param((user("q"), assistant("a")), Exchange("q", (), "a"), id="a tuple of messages"),
    pytest.param(
        [user("1"), assistant("2"), user("3"), assistant("4"), user("5")],
        Exchange("5", history=(Turn("1", (), "2"), Turn("3", (), "4"))),
        id="history",
    ),
    pytest.param(
        [{"role": "system", "content": "secret"}, {"role": "developer", "content": ["?"]}, user("q")],
        Exchange("q"),
        id="system and developer are left out",
    ),
    pytest.param(
        [user("1"), {"role": "system", "content": "s"}, user("2"), assistant("3")],
        Exchange("1\n\n2", (), "3"),
        id="consecutive user messages are one turn",
    ),
    pytest.param(
        [user("1"), assistant("2"), assistant("3")],
        Exchange("1", (), "2\n\n3"),
        id="consecutive assistant messages are one answer",
    ),
    pytest.param([assistant("a")], Exchange(response="a"), id="assistant alone"),
    pytest.param(
        [assistant("hello"), user("q")], Exchange("q", history=(Turn(response="hello"),)), id="assistant first"
    ),
    pytest.param([user("q"), assistant(None)], Exchange("q"), id="content None"),
    pytest.param([user("q"), {"role": "assistant"}], Exchange("q"), id="content missing"),
    pytest.param([user("q"), assistant("")], Exchange("q"), id="content empty"),
    pytest.param([user("1"), assistant(" "), user("2")], Exchange("1\n\n2"), id="a blank answer is none"),
    pytest.param([user([])], None, id="no parts"),
    pytest.param(
        [user([{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}])], Exchange("a\nb"), id="text parts"
    ),
    pytest.param(
        [user("q"), assistant([{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "no"}])],
        Exchange("q", (), "a\nno"),
        id="assistant parts",
    ),
    pytest.param([user("q"), assistant(None, refusal="I won't.")], Exchange("q", (), "I won't."), id="refusal field"),
    pytest.param(
        [user("q"), assistant("a", refusal=None, tool_calls=None, audio=None)], Exchange("q", (), "a"), id="nulls"
    ),
    pytest.param(
        [user([{"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}}])],
        Exchange(images=(PIXEL,)),
        id="image alone",
    ),
    pytest.param(
        [
            user([{"type": "image_url", "image_url": PIXEL}, {"type": "text", "text": "1"}]),
            assistant("2"),
            user([{"type": "text", "text": "3"}, {"type": "input_image", "image_url": OTHER}]),
        ],
        Exchange("3", (OTHER,), history=(Turn("1", (PIXEL,), "2"),)),
        id="images in their own turns",
    ),
    pytest.param(
        [user("q"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "a.txt"}, assistant("Done.")],
        Exchange("q", (), 'sh({"cmd": "ls"})\n\na.txt\n\nDone.'),
        id="tool calls and results are judged with the answer",
    ),
    pytest.param(
        [user("q"), assistant("Wait.", tool_calls=[CALL, CALL])],
        Exchange("q", (), 'Wait.\nsh({"cmd": "ls"})\nsh({"cmd": "ls"})'),
        id="text and two calls",
    ),
    pytest.param(
        [user("q"), assistant(None, tool_calls=[{"type": "custom", "custom": {"name": "sh", "input": "rm -rf /"}}])],
        Exchange("q", (), "sh(rm -rf /)"),
        id="custom tool call",
    ),
    pytest.param(
        [
            user("q"),
            assistant(
                None, tool_calls=[{"function": {"name": "f", "arguments": ""}, "custom": {"name": "sh", "input": "rm"}}]
            ),
        ],
        Exchange("q", (), "f()\nsh(rm)"),
        id="a call of both kinds",
    ),
    pytest.param(
        [user("q"), assistant(None, tool_calls=[{"function": {"name": "sh", "arguments": "-r", "input": "rm"}}])],
        Exchange("q", (), "sh(-r rm)"),
        id="arguments and input",
    ),
    pytest.param(
        [user("q"), assistant("ok", reasoning_content="First", reasoning={"b": 1}, thinking="third")],
        Exchange("q", (), 'First\n{"b": 1}\nthird\nok'),
        id="reasoning is judged with the answer",
    ),
    pytest.param(
        [{**user("q"), "reasoning": "unread"}, assistant("a", reasoning=None)],
        Exchange("q", (), "a"),
        id="no reasoning",
    ),
    pytest.param(
        [user("q"), assistant(None, function_call={"name": "sh", "arguments": "rm"})],
        Exchange("q", (), "sh(rm)"),
        id="legacy function call",
    ),
    pytest.param(
        [user("q"), assistant(None, tool_calls=[{"function": {"name": "sh", "arguments": {"cmd": "é"}}}])],
        Exchange("q", (), 'sh({"cmd": "é"})'),
        id="arguments as an object",
    ),
    pytest.param(
        [user("q"), {"role": "tool", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}],
        Exchange("q", (PIXEL,)),
        id="an image from a tool is judged with the turn",
    ),
    pytest.param([{"role": "tool", "content": "out"}], Exchange(response="out"), id="tool result alone"),
]


@pytest.mark.parametrize(("messages", "exchange"), FORMS)
def test_from_messages(messages: Any, exchange: Exchange | None) -> None:
    if exchange is None:
        with pytest.raises(InputError):
            Exchange.from_messages(messages)
    else:
        assert Exchange.from_messages(messages) == exchange


def part(kind: str, **more: Any) -> list[dict[str, Any]]:
    return [user([{"type": "text", "text": "q"}, {"type": kind, **more}])]


BAD_CALLS: list[Any] = [5, True, "sh", {}, [None], ["sh"], [{}], [{"function": None}]]
REFUSED: list[Any] = [
    [],
    None,
    "hello",
    {"role": "user", "content": "q"},
    [None],
    ["hello"],
    [{}],
    [{"content": "q"}],
    [{"role": None, "content": "q"}],
    [{"role": "function", "content": "q"}],
    [{"role": "User", "content": "q"}],
    [{"role": {}, "content": "q"}],
    [{"role": "system", "content": "only rules"}],
    [user(None)],
    [user("")],
    [user(0)],
    [user(False)],
    [user({})],
    [user(5)],
    [user(["q"])],
    [user([None])],
    [user([{}])],
    [user([{"text": "q"}])],
    part("text"),
    part("text", text=None),
    part("text", text=["q"]),
    part("input_audio", input_audio={"data": "", "format": "wav"}),
    part("file", file={"file_id": "x"}),
    part("video", video="x"),
    part("video_url", video_url={"url": PIXEL}),
    part("image", image=PIXEL),
    part("thinking", thinking="x"),
    part("image_url"),
    part("image_url", image_url=None),
    part("image_url", image_url={}),
    part("image_url", image_url={"url": None}),
    part("input_image", file_id="x"),
    *(
        part("image_url", image_url={"url": url})
        for url in (
            "http://a/b.png",
            "https://a/b.png",
            "file:///etc/passwd",
            "/etc/passwd",
            "ftp://a",
            " data:x",
            "",
            "dat",
        )
    ),
    [user("q"), assistant("a", audio={"id": "x"})],
    [user("q"), assistant("a", refusal=5)],
    *([user("q"), assistant("a", tool_calls=calls)] for calls in BAD_CALLS),
    [user("q"), assistant("a", tool_calls=[{"type": "mcp", "mcp": {"name": "x"}}])],
    [user("q"), assistant("a", tool_calls=[{"function": {"name": 5}}])],
    [user("q"), assistant("a", tool_calls=[{"function": {"name": "x", "arguments": object()}}])],
    [user("q"), assistant("a", function_call="sh")],
]


@pytest.mark.parametrize("messages", REFUSED)
def test_what_cannot_be_judged_is_refused(messages: Any) -> None:
    with pytest.raises(InputError):
        Exchange.from_messages(messages)


def test_refusals_do_not_repeat_what_was_sent() -> None:
    for messages in (
        [{"role": "x" * 10_000}],
        part("x" * 10_000),
        [{"role": ["secret"]}],
        part("image_url", image_url="http://secret"),
    ):
        with pytest.raises(InputError) as refusal:
            Exchange.from_messages(messages)
        assert len(str(refusal.value)) < 200
        assert "secret" not in str(refusal.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def loosely(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of these fields, each valid or any JSON."""
    return st.fixed_dictionaries({}, optional={name: right | JSON for name, right in fields.items()})


PARTS = loosely(
    type=st.sampled_from(["text", "image_url", "input_image", "refusal", "input_audio"]),
    text=st.text(max_size=3),
    refusal=st.text(max_size=3),
    image_url=st.just(PIXEL) | loosely(url=st.just(PIXEL)),
)
FUNCTIONS = loosely(name=st.just("f"), arguments=st.just("{}"), input=st.just("x"))
MESSAGES = loosely(
    role=st.sampled_from(["user", "assistant", "tool", "system", "developer"]),
    content=st.text(max_size=3) | st.lists(PARTS | JSON, max_size=3),
    tool_calls=st.lists(loosely(function=FUNCTIONS, custom=FUNCTIONS), max_size=2),
    function_call=FUNCTIONS,
    refusal=st.text(max_size=3),
    reasoning=st.text(max_size=3) | JSON,
    audio=st.none(),
)


@pytest.mark.slow
@settings(deadline=None, max_examples=1000)
@given(st.lists(MESSAGES, max_size=4) | st.lists(MESSAGES | JSON, max_size=3) | JSON)
@example([user([{"type": [], "text": {}}])])
@example([{"role": "user", "content": "x", "tool_calls": {"a": 1}}])
def test_any_json_is_an_exchange_or_an_input_error(messages: Any) -> None:
    try:
        exchange = Exchange.from_messages(messages)
    except InputError:
        return
    assert exchange.has_prompt or exchange.has_response
    assert all(isinstance(image, str) and image.lower().startswith("data:") for image in exchange.all_images)
    for turn in (*exchange.history, exchange):
        assert isinstance(turn.prompt, (str, type(None)))
        assert isinstance(turn.response, (str, type(None)))


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant", "tool"]), st.sampled_from(["a", "b", "é"])),
        min_size=1,
        max_size=8,
    )
)
def test_no_message_is_lost(said: list[tuple[str, str]]) -> None:
    exchange = Exchange.from_messages([{"role": role, "content": text} for role, text in said])
    turns = [text for turn in (*exchange.history, exchange) for text in (turn.prompt, turn.response) if text]
    assert "\n\n".join(turns).split("\n\n") == [text for _, text in said]


# --- Verdict -----------------------------------------------------------------------------------------


def verdict() -> Verdict:
    return Verdict(
        request=Judgement(label=Label.HARMFUL, score=0.75),
        response=Judgement(label=Label.NOT_APPLICABLE),
        flagged=True,
        action="block",
        mode="fast",
        model=ModelInfo(name="embedded", revision="abc"),
    )


def test_verdict_as_json() -> None:
    assert json.loads(verdict().model_dump_json()) == {
        "request": {"label": "harmful", "score": 0.75},
        "response": {"label": "not_applicable", "score": None},
        "flagged": True,
        "action": "block",
        "reasoning": None,
        "unsupported_quotes": 0,
        "mode": "fast",
        "error": None,
        "model": {"name": "embedded", "revision": "abc"},
        "usage": {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0, "seconds": 0.0},
    }
    assert Verdict.model_validate_json(verdict().model_dump_json()) == verdict()


def test_a_failure_is_said() -> None:
    failed = failed_verdict("truncated", "the answer was cut", "fast", ModelInfo(name="embedded"))
    dumped = json.loads(failed.model_dump_json())
    assert dumped["error"] == {"code": "truncated", "message": "the answer was cut"}
    assert dumped["flagged"] is None
    assert dumped["action"] == "block"
    assert dumped["request"] == dumped["response"] == {"label": "error", "score": None}
    assert dumped["usage"] == verdict().usage.model_dump()


def test_verdict_schema() -> None:
    schema = Verdict.model_json_schema()
    fields = {"request", "response", "flagged", "action", "reasoning", "mode", "error", "model", "usage"}
    assert set(schema["properties"]) == fields | {"unsupported_quotes"}
    assert {
        name: set(schema["$defs"][name]["properties"]) for name in ("Judgement", "VerdictError", "ModelInfo", "Usage")
    } == {
        "Judgement": {"label", "score"},
        "VerdictError": {"code", "message"},
        "ModelInfo": {"name", "revision", "transcribes"},
        "Usage": {"prompt_tokens", "cached_tokens", "completion_tokens", "seconds"},
    }
    assert schema["$defs"]["Label"]["enum"] == ["harmful", "unharmful", "error", "not_applicable"]
    assert schema["properties"]["action"]["enum"] == ["allow", "block"]
    assert schema["properties"]["mode"]["enum"] == ["slow", "fast", "hybrid"] == list(MODES)
    assert schema["additionalProperties"] is False


def test_records_are_frozen_and_closed() -> None:
    judged = verdict()
    records: list[BaseModel] = [judged, judged.request, judged.model, judged.usage, VerdictError(code="x", message="y")]
    for record in records:
        name = next(iter(type(record).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(record, name, None)
        with pytest.raises(ValidationError, match="extra"):
            type(record).model_validate({**record.model_dump(), "unheard_of": 1})


@pytest.mark.parametrize("score", [-0.01, 1.01, float("nan"), float("inf"), "high"])
def test_a_score_is_a_probability(score: Any) -> None:
    with pytest.raises(ValidationError):
        Judgement(label=Label.HARMFUL, score=score)


def test_usage_adds_up() -> None:
    total = Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=1, seconds=0.5) + Usage(
        prompt_tokens=2, seconds=0.25
    )
    assert total == Usage(prompt_tokens=12, cached_tokens=4, completion_tokens=1, seconds=0.75)


# --- Sample ------------------------------------------------------------------------------------------


def test_sample_becomes_an_exchange() -> None:
    row = Sample(id="1", source="s", modality="text-image", prompt="q", images=("a.png",), response="a")
    assert row.exchange() == Exchange("q", (Path("a.png"),), "a")
    assert Sample(id="2", source="s", modality="text", response="a").exchange() == Exchange(response="a")
    with pytest.raises(InputError):
        Sample(id="3", source="s", modality="text").exchange()


def test_sample_labels_are_known_or_null() -> None:
    assert Sample(id="1", source="s", modality="text", prompt="q").request_label is None
    with pytest.raises(ValidationError):
        Sample.model_validate({"id": "1", "source": "s", "modality": "text", "prompt": "q", "request_label": "safe"})
    assert Sample(id="1", source="s", modality="text").meta is not Sample(id="2", source="s", modality="text").meta
