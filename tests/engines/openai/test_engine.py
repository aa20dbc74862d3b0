"""The OpenAI-compatible engine against a stub of vLLM: the requests that it sends, and every fault."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import math
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.engines.base import Capabilities
from guardreasoner_vl.engines.label_scores import read_labels
from guardreasoner_vl.engines.openai import http as openai_http
from guardreasoner_vl.engines.openai.completion import read_completion
from guardreasoner_vl.engines.openai.engine import OpenAIEngine
from guardreasoner_vl.errors import EngineError, GuardError, ModelError
from guardreasoner_vl.images.geometry import PixelBudget
from guardreasoner_vl.judging.policy import FAULTS_OF_THE_GUARD
from guardreasoner_vl.protocol import CANDIDATES, FAST_PREFIX, IMAGE, RESPONSE_FIELD, Message
from guardreasoner_vl.types.exchange import REASONING
from tests.engines.conformance import SLOTS, Pieces, asked, timeless, with_image
from tests.engines.openai.stub_server import Fault, StubServer

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = "sk-canary-key"
NEUTRAL = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""What a request says beside temperature and top_p to change nothing."""
SECRET = "canary-content"


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_http, "BACKOFF_SECONDS", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server() -> Iterator[StubServer]:
    with StubServer(api_key=KEY) as server:
        yield server


@pytest.fixture
def engine(server: StubServer) -> Iterator[OpenAIEngine]:
    engine = OpenAIEngine(base_url=server.url, api_key=KEY, timeout=0.8, retries=2, max_concurrency=4).connect()
    server.forget()
    yield engine
    engine.close()


def parts_of(payload: dict[str, Any]) -> list[dict[str, Any]]:
    contents = [message["content"] for message in payload["messages"]]
    return [part for content in contents if isinstance(content, list) for part in content]


# What goes out


def test_images_stand_where_their_placeholders_stood(server: StubServer, engine: OpenAIEngine) -> None:
    with_images = with_image(asked())
    message = Message("user", f"before {IMAGE}{IMAGE} after")
    request = replace(with_images, messages=(message,), images=with_images.images * 2, pixels=PixelBudget(3136, 50176))
    (result,) = engine.generate([request])
    assert result.error is None
    (payload,) = server.payloads
    assert [part["type"] for part in parts_of(payload)] == ["text", "image_url", "image_url", "text"]
    assert [part["text"] for part in parts_of(payload) if part["type"] == "text"] == ["before ", " after"]
    for part in parts_of(payload)[1:3]:
        kind, _, data = part["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == with_images.images[0].png
    assert payload["mm_processor_kwargs"] == {"min_pixels": 3136, "max_pixels": 50176}


def test_generation_settings_go_out(server: StubServer, engine: OpenAIEngine) -> None:
    engine.generate([replace(asked(), temperature=0.7, top_p=0.9, seed=5, max_new_tokens=7), asked()])
    warm, greedy = sorted(server.payloads, key=lambda payload: float(payload["max_tokens"]))
    assert {name: warm[name] for name in ("temperature", "top_p", "seed", "max_tokens", "model")} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 5,
        "max_tokens": 7,
        "model": "stub-vl",
    }
    assert greedy["temperature"] == 0.0
    assert not {"seed", "logprobs", "mm_processor_kwargs", "continue_final_message", "stop"} & set(greedy)
    assert all(isinstance(message["content"], str) for message in greedy["messages"])


def test_sampling_that_changes_nothing_goes_out_too(server: StubServer, engine: OpenAIEngine) -> None:
    scored = engine.score([asked(forced_prefix=FAST_PREFIX)], SLOTS, CANDIDATES)
    engine.generate([asked()])
    assert not scored[0].error
    for payload in server.payloads:
        assert payload.items() >= {"temperature": 0.0, "top_p": 1.0, **NEUTRAL}.items()


def test_greedy_means_greedy_whatever_the_model_s_own_settings_say() -> None:
    with StubServer(penalty=1.05) as server:
        engine = OpenAIEngine(base_url=server.url).connect()
        (result,) = engine.generate([replace(asked(), max_new_tokens=100)])
        engine.close()
    assert "Request: unharmful" in result.text


@pytest.mark.parametrize("sampling", ["refused", "ignored", "honoured"])
def test_a_server_that_may_sample_otherwise_is_logged(sampling: Any, caplog: pytest.LogCaptureFixture) -> None:
    with StubServer(sampling=sampling) as server:
        engine = OpenAIEngine(base_url=server.url).connect()
        server.forget()
        (result,) = engine.generate([asked()])
        engine.close()
    assert result.error is None
    refused = {"top_k", "repetition_penalty"} if sampling == "refused" else set()
    assert set(NEUTRAL) & set(server.payloads[0]) == set(NEUTRAL) - refused
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (sampling != "honoured")
    assert all("--generation-config vllm" in line for line in lines)


def test_the_answer_is_begun_with_the_forced_prefix(server: StubServer, engine: OpenAIEngine) -> None:
    (result,) = engine.generate([asked(forced_prefix=FAST_PREFIX)])
    assert result.text == FAST_PREFIX + " unharmful\nResponse: None\n</result>"
    (payload,) = server.payloads
    assert payload["messages"][-1] == {"role": "assistant", "content": FAST_PREFIX}
    assert payload["continue_final_message"] is True
    assert payload["add_generation_prompt"] is False


def test_extra_body_wins(server: StubServer) -> None:
    engine = OpenAIEngine(base_url=server.url, api_key=KEY, extra_body={"top_k": 1, "max_tokens": 3}).connect()
    server.forget()
    engine.generate([asked()])
    engine.close()
    assert (server.payloads[0]["top_k"], server.payloads[0]["max_tokens"]) == (1, 3)


def test_only_so_many_at_once_and_in_order(server: StubServer, engine: OpenAIEngine) -> None:
    server.brain = lambda messages, begun: messages[-1]["content"].split("\n")[1]
    server.delay = 0.02
    results = engine.generate([asked(f"question {number}") for number in range(12)])
    assert [result.text for result in results] == [f"question {number}" for number in range(12)]
    assert 1 < server.most_in_flight <= 4


# What comes back


def test_usage_and_shared_time(engine: OpenAIEngine) -> None:
    first, second = engine.generate([asked(), asked()])
    assert first.usage.cached_tokens == 2
    assert first.usage.completion_tokens > 10
    assert first.usage.seconds == second.usage.seconds > 0.0


def test_label_logprobs_after_reasoning(server: StubServer, engine: OpenAIEngine) -> None:
    request = replace(asked(), label_fields=("Request:", "Response:"), candidates=CANDIDATES, max_new_tokens=100)
    (result,) = engine.generate([request])
    assert (server.payloads[0]["logprobs"], server.payloads[0]["top_logprobs"]) == (True, 20)
    assert result.finish_reason == "stop"
    # The response's label is "None", which no candidate begins.
    assert set(result.label_logprobs) == {"Request:"}
    assert [math.exp(share) for share in result.label_logprobs["Request:"]] == pytest.approx([0.1, 0.75])


def test_a_cut_answer_ends_for_length(engine: OpenAIEngine) -> None:
    (result,) = engine.generate([replace(asked(), max_new_tokens=5)])
    assert (result.finish_reason, result.error, result.usage.completion_tokens) == ("length", None, 5)


def test_score_appends_the_chosen_candidate(server: StubServer, engine: OpenAIEngine) -> None:
    (result,) = engine.score([asked(forced_prefix=FAST_PREFIX)], SLOTS, CANDIDATES)
    assert result.chosen == (1, 1)
    assert [math.exp(share) for share in result.logprobs[0]] == pytest.approx([0.1, 0.75])
    assert [payload["messages"][-1]["content"] for payload in server.payloads] == [
        FAST_PREFIX,
        FAST_PREFIX + " unharmful" + RESPONSE_FIELD,
    ]
    assert [payload["max_tokens"] for payload in server.payloads] == [1, 1]
    assert result.usage.completion_tokens == 2


def test_no_score_where_no_label_is_likely(server: StubServer, engine: OpenAIEngine) -> None:
    server.brain = lambda messages, begun: " maybe"
    (result,) = engine.score([asked(forced_prefix=FAST_PREFIX)], SLOTS, CANDIDATES)
    assert result.error == "none of the model's likeliest next tokens starts a label: use mode 'slow' with this model"
    assert (result.chosen, result.error_code) == ((), "no_score")


def test_text_that_is_no_unicode_harms_no_one(engine: OpenAIEngine) -> None:
    odd = replace(asked(), messages=(Message("user", "\ud800"),))
    _, good = engine.generate([odd, asked()])
    assert good.error is None


# Faults: each is the result of its request, and says nothing of the content

SCORED = replace(asked(SECRET, forced_prefix=FAST_PREFIX), label_fields=("Request:",), candidates=CANDIDATES)
FAULTS: list[tuple[Fault, str, str]] = [
    ("http_413", "input_too_long", "takes no request of this size (HTTP 413)"),
    ("http_500", "engine", "answered HTTP 500: see the server's log"),
    ("rate_limit", "engine", "answered HTTP 429: lower max_concurrency"),
    ("hang", "timeout", "did not answer within 0.8 s"),
    ("drip", "timeout", "did not answer within 0.8 s"),
    ("empty", "engine", "malformed (not JSON)"),
    ("not_json", "engine", "malformed (not JSON)"),
    ("no_choices", "engine", "malformed (choices)"),
    ("drop", "engine", "cannot reach http://127.0.0.1:"),
    ("no_finish", "engine", "finish reason None"),
    ("filtered", "refused", "finish reason 'content_filter'"),
]


@pytest.mark.slow
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(("fault", "code", "text"), FAULTS, ids=[fault for fault, *_ in FAULTS])
def test_a_fault_is_one_request_s_result(
    server: StubServer, engine: OpenAIEngine, fault: Fault, code: str, text: str, watched: bool
) -> None:
    if watched and fault == "no_choices":
        text = "finish reason None"  # pieces without a choice are usual
    server.inject(fault, marker=SECRET)
    bad, good = engine.generate([replace(SCORED, listener=Pieces() if watched else None), asked()])
    (unscored,) = engine.score([SCORED], SLOTS, CANDIDATES) if code != "timeout" else (None,)
    assert good.error is None
    assert bad.finish_reason == "error"
    assert bad.error_code == code
    assert text in (bad.error or "")
    for leak in (SECRET, KEY, "secret content"):
        assert leak not in repr(bad)
    if unscored is not None and not watched:
        assert (unscored.error, unscored.error_code, unscored.logprobs) == (bad.error, code, ())


def test_a_request_that_the_server_refuses_is_no_fault_of_the_guard(server: StubServer, engine: OpenAIEngine) -> None:
    server.images = False
    (result,) = engine.generate([with_image(asked())])
    assert (result.error_code, (result.error or "").partition(": ")[2]) == ("refused", "see the server's log")
    assert "HTTP 400" in (result.error or "")
    assert "refused" not in FAULTS_OF_THE_GUARD


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("fault", ["http_500", "drop"])
def test_what_may_pass_is_tried_again(server: StubServer, engine: OpenAIEngine, fault: Fault, watched: bool) -> None:
    server.inject(fault, times=2)
    listener = Pieces() if watched else None
    (result,) = engine.generate([replace(asked(), listener=listener)])
    assert result.error is None
    assert len(server.payloads) == 3
    if listener:
        assert "".join(listener.heard) == result.text
        assert listener.begun == {"http_500": 1, "drop": 3}[fault]


def test_tries_end(server: StubServer, engine: OpenAIEngine) -> None:
    server.inject("http_500")
    engine.generate([asked()])
    assert len(server.payloads) == 3


def test_malformed_answers_are_not_tried_again(server: StubServer, engine: OpenAIEngine) -> None:
    server.inject("not_json")
    engine.generate([asked()])
    assert len(server.payloads) == 1


@pytest.mark.slow
def test_retry_after_is_honoured(server: StubServer) -> None:
    engine = OpenAIEngine(base_url=server.url, api_key=KEY, timeout=5.0).connect()
    server.inject("rate_limit", times=1)
    started = time.monotonic()
    (result,) = engine.generate([asked()])
    engine.close()
    assert result.error is None
    assert 0.95 < time.monotonic() - started < 2.0


@pytest.mark.parametrize("retry_after", ["30", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_no_wait_that_the_deadline_would_cut(server: StubServer, engine: OpenAIEngine, retry_after: str) -> None:
    server.retry_after = retry_after
    server.inject("rate_limit")
    started = time.monotonic()
    (result,) = engine.generate([asked()])
    assert "HTTP 429" in (result.error or "")
    assert time.monotonic() - started < 0.5


def test_an_unreadable_retry_after_is_passed_over(server: StubServer, engine: OpenAIEngine) -> None:
    server.retry_after = "soon"
    server.inject("rate_limit", times=1)
    (result,) = engine.generate([asked()])
    assert result.error is None


def test_too_long_is_refused_not_cut(server: StubServer, engine: OpenAIEngine) -> None:
    long, good = engine.generate([asked(f"{SECRET} " * 5000), asked()])
    assert (long.finish_reason, long.error_code) == ("error", "input_too_long")
    assert SECRET not in repr(long)
    assert good.error is None


def test_a_key_that_stops_working(server: StubServer, engine: OpenAIEngine) -> None:
    server.api_key = "another"
    (result,) = engine.generate([asked()])
    assert result.error_code == "auth"
    assert "set OPENAI_API_KEY" in (result.error or "")
    assert KEY not in repr(result)


@pytest.mark.parametrize("field", REASONING)
def test_reasoning_that_the_server_cuts_out_is_said(
    monkeypatch: pytest.MonkeyPatch, engine: OpenAIEngine, field: str
) -> None:
    message = {"content": "<result>", field: "because"}

    async def answer(*_: object) -> bytes:
        return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()

    monkeypatch.setattr(openai_http.HttpClient, "post", answer)
    (result,) = engine.generate([asked()])
    assert "without --reasoning-parser" in (result.error or "")


@pytest.mark.parametrize("watched", [False, True])
def test_a_label_is_kept_without_its_score(server: StubServer, engine: OpenAIEngine, watched: bool) -> None:
    server.inject("nan")
    request = replace(asked(), label_fields=("Request:",), candidates=CANDIDATES, max_new_tokens=100)
    (result,) = engine.generate([replace(request, listener=Pieces() if watched else None)])
    assert (result.error, "Request: unharmful" in result.text) == (None, True)
    assert [math.exp(share) for share in result.label_logprobs["Request:"]] == pytest.approx([0.1, 0.75])


LABEL: list[dict[str, Any]] = [
    {"token": "<result>\nRequest:", "logprob": -0.1, "top_logprobs": []},
    {"token": " unharmful", "logprob": -0.1, "top_logprobs": [{"token": " unharmful", "logprob": -0.1}]},
    {"token": "\n</result>", "logprob": -0.1, "top_logprobs": []},
]
ODD_LOGPROBS: list[tuple[Any, bool]] = [
    (LABEL, True),
    (None, False),
    ([], False),
    ({"token": 1}, False),
    ([LABEL[0], {**LABEL[1], "top_logprobs": None}, LABEL[2]], False),
    ([LABEL[0], {**LABEL[1], "logprob": None}, LABEL[2]], True),
    *(
        ([LABEL[0], {**LABEL[1], "top_logprobs": [*LABEL[1]["top_logprobs"], {"token": " harmful", "logprob": odd}]},
          LABEL[2]], scored)
        for odd, scored in [
            (-math.inf, True), (math.nan, False), (None, False), (math.inf, False), (1e300, False), (10**400, False),
            ("-1", False), (True, False),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("content", "scored"), ODD_LOGPROBS)
@pytest.mark.parametrize("body", [{}, {"usage": None}, {"usage": {"prompt_tokens": None}}, {"usage": [1]}])
def test_scores_are_optional_and_never_no_number(content: Any, scored: bool, body: dict[str, Any]) -> None:
    text = "".join(token["token"] for token in LABEL)
    choice = {"message": {"content": text}, "finish_reason": "stop", "logprobs": {"content": content}}
    completion = read_completion(json.dumps({"choices": [choice], **body}).encode())
    assert completion.text == text
    labels = read_labels("", text, completion.tokens(), ("Request:",), CANDIDATES)
    assert bool(labels) == scored
    for shares in labels.values():
        assert all(share <= 0.0 for share in shares)
    assert completion.used(0.0).completion_tokens == 0


# Who watches: the answer comes in pieces


def test_a_streamed_answer_is_the_same_answer_token_by_token(server: StubServer, engine: OpenAIEngine) -> None:
    request = replace(asked(), label_fields=("Request:", "Response:"), candidates=CANDIDATES, max_new_tokens=100)
    listener = Pieces()
    (watched,) = engine.generate([replace(request, listener=listener)])
    (whole,) = engine.generate([request])
    assert timeless([watched]) == timeless([whole])
    assert watched.usage.model_copy(update={"seconds": 0.0}) == whole.usage.model_copy(update={"seconds": 0.0})
    assert len(listener.heard) > 10
    assert [payload.get("stream") for payload in server.payloads] == [True, None]


def test_a_server_that_answers_whole_is_heard_whole(server: StubServer, engine: OpenAIEngine) -> None:
    server.streams = False
    listener = Pieces()
    (result,) = engine.generate([replace(asked(), listener=listener)])
    assert listener.heard == [result.text]
    assert result.finish_reason == "stop" or result.usage.completion_tokens == 24


def test_unicode_s_own_line_ends_stay_inside_of_their_piece(server: StubServer, engine: OpenAIEngine) -> None:
    server.brain = lambda messages, begun: "one\u2028two\x85three\x0bfour"
    (result,) = engine.generate([replace(asked(), listener=Pieces())])
    assert result.text == "one\u2028two\x85three\x0bfour"


def test_a_cancelled_answer_closes_the_connection(server: StubServer, engine: OpenAIEngine) -> None:
    (result,) = engine.generate([replace(asked(), listener=Pieces(most=3))])
    assert (result.finish_reason, result.error_code) == ("error", "cancelled")
    assert len(server.payloads) == 1


def test_a_server_that_breaks_off_says_nothing_of_the_content(server: StubServer, engine: OpenAIEngine) -> None:
    server.inject("broken_off")
    (result,) = engine.generate([replace(asked(SECRET), listener=Pieces())])
    assert result.error == "the server interrupted the answer: see the server's log"


# Loops, threads, cancelling, closing


async def test_cancelling_hangs_up(server: StubServer, engine: OpenAIEngine) -> None:
    server.inject("hang")
    task = asyncio.create_task(engine.agenerate(asked()))
    while not server.payloads:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.disconnected.wait, 0.5)


def test_closing_ends_what_is_in_flight(server: StubServer, engine: OpenAIEngine) -> None:
    server.inject("hang")
    closer = threading.Timer(0.1, engine.close)
    closer.start()
    results = engine.generate([asked()] * 8)
    closer.join()
    message = "the engine was closed before the answer came: open a new one, send it again"
    assert {result.error for result in results} == {message}
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.generate([asked()])


@pytest.mark.parametrize("fault", ["broken_off", "not_json", "drop", "no_choices"])
def test_a_stream_that_ended_in_an_error_leaves_nothing_pending(
    server: StubServer, fault: Fault, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[dict[str, Any]] = []
    new_loop = asyncio.new_event_loop

    def watched_loop() -> asyncio.AbstractEventLoop:
        loop = new_loop()
        loop.set_exception_handler(lambda _, context: lost.append(context))
        return loop

    monkeypatch.setattr(asyncio, "new_event_loop", watched_loop)
    for most in (None, 3):
        engine = OpenAIEngine(base_url=server.url, api_key=KEY, retries=0).connect()
        if most is None:
            server.inject(fault, SECRET)
        engine.generate([replace(asked(SECRET if most is None else "hello"), listener=Pieces(most))] * 4)
        engine.close()
        gc.collect()
    assert lost == []
    assert "Task was destroyed" not in caplog.text


def test_closing_an_engine_that_never_ran() -> None:
    engine = OpenAIEngine(base_url="http://127.0.0.1:1/v1")
    engine.close()
    engine.close()


# Connecting


def connect_error(**options: Any) -> GuardError:
    with pytest.raises(GuardError) as raised:
        OpenAIEngine(**options).connect()
    assert "\n" not in str(raised.value)
    return raised.value


def test_finds_the_model_and_what_the_server_can_do(engine: OpenAIEngine) -> None:
    assert engine.model.name == "stub-vl"
    assert engine.capabilities == Capabilities(True, True, True, True, 4096)


@pytest.mark.parametrize(
    ("options", "lacking"),
    [
        ({"images": False}, {"images"}),
        ({"logprobs": False}, {"scores"}),
        ({"continues": "refused"}, {"forced_prefix"}),
        ({"continues": "ignored"}, {"forced_prefix"}),
    ],
    ids=["text model", "no logprobs", "refuses to continue", "ignores continuing"],
)
def test_declares_what_the_server_lacks(options: dict[str, Any], lacking: set[str]) -> None:
    with StubServer(**options) as server:
        engine = OpenAIEngine(base_url=server.url).connect()
        declared = engine.capabilities
        (score,) = engine.score([asked(forced_prefix=FAST_PREFIX)], SLOTS, CANDIDATES)
        engine.close()
    assert {name for name in ("images", "scores", "forced_prefix") if not getattr(declared, name)} == lacking
    if "scores" in lacking:
        assert "returns no log-probabilities" in (score.error or "")


def test_an_engine_that_is_not_connected_is_an_error(server: StubServer) -> None:
    engine = OpenAIEngine(base_url=server.url, api_key=KEY)
    with pytest.raises(EngineError, match="not connected"):
        assert engine.capabilities
    with pytest.raises(EngineError, match="not connected"):
        assert engine.model
    (result,) = engine.generate([asked()])
    assert "not connected" in (result.error or "")
    engine.probe()
    assert engine.generate([asked()])[0].error is None
    engine.close()


def test_the_key_comes_from_the_environment(server: StubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    OpenAIEngine(base_url=server.url.removesuffix("/v1")).connect().close()


def test_a_wrong_key_is_said_in_one_line(server: StubServer) -> None:
    error = connect_error(base_url=server.url, api_key="sk-wrong")
    assert isinstance(error, EngineError)
    assert error.code == "auth"
    assert "sk-wrong" not in str(error)


def test_an_unknown_model_names_those_served(server: StubServer) -> None:
    server.models = ("first", "second")
    error = connect_error(base_url=server.url, api_key=KEY, model="third")
    assert isinstance(error, ModelError)
    assert str(error).endswith("does not serve third: choose one of its models (first, second)")


def test_the_wanted_model_is_used(server: StubServer) -> None:
    server.models = ("first", "second")
    engine = OpenAIEngine(base_url=server.url, api_key=KEY, model="second").connect()
    assert engine.model.name == "second"
    engine.close()


def test_an_unreachable_server_names_the_remedy() -> None:
    error = connect_error(base_url="http://user:password@127.0.0.1:9/v1", retries=1)
    assert str(error) == ("cannot reach http://127.0.0.1:9 (ConnectError): check the address and that the server runs")


@pytest.mark.parametrize("base_url", ["localhost:8000", "", "ftp://host/v1", "http://", "http://[::1"])
def test_a_base_url_that_is_none(base_url: str) -> None:
    with pytest.raises(EngineError, match="base_url is not a web address"):
        OpenAIEngine(base_url=base_url)


@pytest.mark.parametrize("key", ["sk-\u2026", "sk-a\r\nX: y"])
def test_a_key_that_no_header_can_carry(key: str) -> None:
    with pytest.raises(EngineError, match="the API key contains characters") as raised:
        OpenAIEngine(base_url="http://localhost/v1", api_key=key)
    assert "sk-" not in str(raised.value)
