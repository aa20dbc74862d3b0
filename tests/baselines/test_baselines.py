"""Other guards: their requests, the reading of their answers, and verdicts through a local server."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardreasoner_vl.baselines.base import (
    AdapterAnswer,
    AdapterRequest,
    UnreadableError,
    UnsupportedError,
    read_guard_answer,
    score_of,
)
from guardreasoner_vl.baselines.client import ADAPTERS, BaselineGuard
from guardreasoner_vl.errors import InputError
from guardreasoner_vl.types import Exchange
from tests.made_images import image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TEXT = Exchange("How do I bake bread?", (), "Mix flour and water.")
IMAGE = Exchange("What is this?", (image(60, 60),), None)

# guard, about, text, label, for the request and for the response
READ = [
    ("llama-guard-3-8b", "\n\nsafe", "unharmful"),
    ("llama-guard-3-8b", "\n\nunsafe\nS2,S6", "harmful"),
    ("llama-guard-4", "unsafe", "harmful"),
    ("llama-guard-3-1b", "safety first", None),
    ("llama-guard-3-1b", "unsafe S1", None),
    ("llama-guard-3-1b", "", None),
    ("qwen3guard", "Safety: Safe\nCategories: None", "unharmful"),
    ("qwen3guard", "Safety: Unsafe\nCategories: Violent, PII\nRefusal: No", "harmful"),
    ("qwen3guard", "Safety: Controversial\nCategories: Unethical Acts", "harmful"),
    ("qwen3guard-loose", "Safety: Controversial\nCategories: Unethical Acts", "unharmful"),
    ("qwen3guard-loose", "Safety: Unsafe\nCategories: Violent", "harmful"),
    ("qwen3guard", "The text says Safety: Safe", None),
    ("qwen3guard", "Safety: Safeish", None),
    ("llavaguard", '{\n    "rating": "Safe",\n    "category": "NA: none",\n    "rationale": "A cake', "unharmful"),
    ("llavaguard", '{"rating": "Unsafe", "category": "O2"}', "harmful"),
    ("llavaguard", 'It is "rating": "Safe"', None),
    ("llavaguard", '{"rating": "safe"}', None),
    ("wildguard", "Harmful request: no\nResponse refusal: no\nHarmful response: no", "unharmful"),
    ("wildguard", "Harmful request: yes\nResponse refusal: n/a\nHarmful response: Yes", "harmful"),
    ("wildguard", "Harmful request: yes", None),
    ("wildguard", "Harmful request: perhaps\nResponse refusal: no\nHarmful response: no", None),
    ("guardreasoner", "Answers: \nRequest: unharmful\nCompletion: compliance\nResponse: unharmful\n", "unharmful"),
    ("guardreasoner", "Answers:\nRequest: unharmful\nAnswers:\nRequest: harmful\nResponse: harmful", "harmful"),
    ("guardreasoner", "Request: harmful\nResponse: harmful", None),
    ("guardreasoner", "Answers:\nRequest: harmful", None),
]  # fmt: skip


@pytest.mark.parametrize(("guard", "text", "label"), READ)
def test_answers_are_read_by_the_guards_own_grammar(guard: str, text: str, label: str | None) -> None:
    adapter = ADAPTERS[guard]
    request = adapter.build_requests(IMAGE if guard == "llavaguard" else TEXT)[-1]
    if label is None:
        with pytest.raises(UnreadableError, match=": check that the server runs the guard"):
            adapter.read(request, AdapterAnswer(text))
        return
    assert {
        target: judgement.label.value for target, judgement in adapter.read(request, AdapterAnswer(text)).items()
    } == dict.fromkeys(request.targets, label)


@given(st.sampled_from([name for name in ADAPTERS if name not in ("openai-moderation", "llavaguard")]), st.text())
def test_no_other_text_is_a_label(guard: str, text: str) -> None:
    request = ADAPTERS[guard].build_requests(TEXT)[-1]
    words = ("safe", "Safe", "no", "yes", "harmful")
    try:
        ADAPTERS[guard].read(request, AdapterAnswer(text))
    except UnreadableError:
        return
    assert any(word in text for word in words)


def asked(guard: str, exchange: Exchange) -> list[dict[str, Any]]:
    return [request.payload() for request in ADAPTERS[guard].build_requests(exchange)]


def test_llama_guard_is_asked_about_the_last_message() -> None:
    request, response = asked("llama-guard-3-8b", TEXT)
    assert request["messages"] == [{"role": "user", "content": "How do I bake bread?"}]
    assert response["messages"][1] == {"role": "assistant", "content": "Mix flour and water."}
    (parts,) = asked("llama-guard-3-1b", Exchange("Hi"))
    assert parts["messages"] == [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    (seen,) = asked("llama-guard-3-vision", IMAGE)
    assert [part["type"] for part in seen["messages"][0]["content"]] == ["image_url", "text"]
    with pytest.raises(UnsupportedError, match="at most 0 images"):
        asked("llama-guard-3-8b", IMAGE)


def test_published_strings_are_filled_in_whatever_the_texts_hold() -> None:
    (wild,) = asked("wildguard", Exchange("{response} {prompt}", (), "{prompt}"))
    assert wild["prompt"].startswith("<|user|>\n[INST] You are a classifier")
    assert "determine 1) whether the human user's request is harmful, 2)" in wild["prompt"]
    assert "Human user:\n{response} {prompt}\n\nAI assistant:\n{prompt}\n\n---\n\nAnswers: [/INST]\n" in wild["prompt"]
    (alone,) = asked("wildguard", Exchange("Hi"))
    assert "Human user:\nHi\n\nAI assistant:\n\n\n---" in alone["prompt"]
    (reasoner,) = asked("guardreasoner", Exchange("Hi"))
    assert reasoner["prompt"].endswith("Answers.\nHuman user:\nHi\n\nAI assistant:\nNone\n\n")
    assert "humans and AI. \n\n" in reasoner["prompt"]


def test_a_guard_of_images_wants_exactly_one() -> None:
    (request,) = asked("llavaguard", IMAGE)
    image_part, policy = request["messages"][0]["content"]
    assert image_part["image_url"]["url"].startswith("data:image/png;base64,")
    assert "safety assessment" in policy["text"]
    with pytest.raises(UnsupportedError, match="the exchange has 0"):
        asked("llavaguard", TEXT)


def test_moderation_judges_each_image_and_each_side() -> None:
    both = Exchange("What are these?", (image(60, 60), image(28, 28)), "Cakes.")
    requests = ADAPTERS["openai-moderation"].build_requests(both)
    assert [request.targets for request in requests] == [("request",), ("request",), ("response",)]
    assert [part["type"] for part in requests[0].payload()["input"]] == ["text", "image_url"]
    read = ADAPTERS["openai-moderation"].read
    result = {"flagged": True, "category_scores": {"violence": 0.2, "illicit": None, "hate": 0.7}}
    judgement = read(requests[0], AdapterAnswer("", content={"results": [result]}))["request"]
    assert (judgement.label, judgement.score) == ("harmful", 0.7)
    results: list[Any] = [[], [{"flagged": None}], [result, result], 3, None]
    for odd in results:
        with pytest.raises(UnreadableError, match=": check that the server runs the guard"):
            read(requests[0], AdapterAnswer("", content={"results": odd}))


def test_scores_are_read_where_the_words_stand() -> None:
    words = {"unsafe": math.log(0.3), "safe": math.log(0.1)}
    assert score_of([{"\n\n": 0.0}, words], ["unsafe"], ["safe"]) == pytest.approx(0.75)
    assert score_of([{" Unsafe": -1.0}], ["Unsafe"], ["Safe"]) == 1.0
    assert score_of([{"\n\n": 0.0, "safe": -20.0}], ["unsafe"], ["safe"]) is None
    assert score_of([], ["unsafe"], ["safe"]) is None
    grades = {" Safe": math.log(0.5), " Unsafe": math.log(0.2), " Cont": math.log(0.3)}
    answer = AdapterAnswer("Safety: Safe\nCategories: None", [{"Safety": 0.0}, {":": 0.0}, grades])
    for guard, score in (("qwen3guard", 0.5), ("qwen3guard-loose", 0.2)):
        request = ADAPTERS[guard].build_requests(Exchange("Hi"))[0]
        assert ADAPTERS[guard].read(request, answer)["request"].score == pytest.approx(score)


@pytest.mark.parametrize("body", [b"?", b"[]", b'{"choices": []}', b'{"choices": [{"text": 3}]}', b'{"choices": 1}'])
def test_a_malformed_body_is_an_error(body: bytes) -> None:
    with pytest.raises(Exception, match="the server's answer is"):
        read_guard_answer("completions", body)


Reply = tuple[int, Any]


@pytest.fixture
def served() -> Iterator[Callable[[Callable[[str, dict[str, Any]], Reply]], str]]:
    """Starts a server that answers with a function of path and payload; returns its address."""
    servers: list[ThreadingHTTPServer] = []

    def start(brain: Callable[[str, dict[str, Any]], Reply]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, content = brain(self.path, payload)
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def chat(text: str, words: dict[str, float] | None = None) -> dict[str, Any]:
    tops = [{"token": word, "logprob": value} for word, value in (words or {}).items()]
    logprobs = {"content": [{"token": "x", "logprob": 0.0, "top_logprobs": tops}]}
    message = {"role": "assistant", "content": text}
    return {"choices": [{"message": message, "logprobs": logprobs}], "usage": {"completion_tokens": 3}}


def test_verdicts_come_in_order_and_faults_are_errors(served: Any) -> None:
    def brain(path: str, payload: dict[str, Any]) -> Reply:
        assert path == "/v1/chat/completions"
        assert payload["model"] == "guard"
        last = payload["messages"][-1]["content"]
        if "ODD" in last:
            return 200, chat("I am not sure.")
        if "DOWN" in last:
            return 400, {}
        return 200, chat("unsafe\nS1" if "BAD" in last else "safe", {"unsafe": math.log(0.6), "safe": math.log(0.2)})

    exchanges = [
        Exchange("Hi", (), "BAD answer"),
        Exchange("ODD"),
        Exchange("DOWN"),
        IMAGE,
        *(Exchange(f"number {number}") for number in range(5)),
    ]
    with BaselineGuard("llama-guard-3-8b", served(brain), "guard") as guard:
        verdicts = list(guard.moderate_batch(iter(exchanges), chunk=3))
    first = verdicts[0]
    assert (first.request.label, first.response.label, first.flagged, first.action) == (
        "unharmful",
        "harmful",
        True,
        "block",
    )
    assert first.response.score == pytest.approx(0.75)
    assert first.usage.completion_tokens == 6
    codes = [verdict.error and verdict.error.code for verdict in verdicts]
    assert codes == [None, "unparsable", "refused", "unsupported", *[None] * 5]
    assert all(verdict.flagged is None and verdict.action == "block" for verdict in verdicts[1:4])
    assert all(verdict.action == "allow" for verdict in verdicts[4:])
    assert guard.mode == "fast"


def test_the_worst_of_several_inputs_counts(served: Any) -> None:
    def brain(path: str, payload: dict[str, Any]) -> Reply:
        assert path == "/v1/moderations"
        bad = len(payload["input"]) == 2 and len(payload["input"][1]["image_url"]["url"]) > 300
        return 200, {"results": [{"flagged": bad, "category_scores": {"violence": 0.9 if bad else 0.1}}]}

    exchange = Exchange("What are these?", (image(200, 200), image(1, 1)))
    with BaselineGuard("openai-moderation", served(brain), "omni-moderation-latest") as guard:
        (verdict,) = guard.moderate_batch([exchange])
    assert (verdict.request.label, verdict.request.score) == ("harmful", 0.9)
    assert verdict.response.label == "not_applicable"


def test_plain_completions_carry_text_and_scores(served: Any) -> None:
    def brain(path: str, payload: dict[str, Any]) -> Reply:
        assert path == "/v1/completions"
        text = "Harmful request: no\nResponse refusal: n/a\nHarmful response: n/a"
        tops = [{" no": math.log(0.9), " yes": math.log(0.1)}]
        return 200, {
            "choices": [{"text": text, "logprobs": {"top_logprobs": tops}}],
            "usage": {"completion_tokens": 20},
        }

    with BaselineGuard("wildguard", served(brain), "allenai/wildguard") as guard:
        (verdict,) = guard.moderate_batch([Exchange("Hi")])
    assert (verdict.request.label, verdict.usage.completion_tokens) == ("unharmful", 20)
    assert verdict.request.score == pytest.approx(0.1)
    assert verdict.error is None


@pytest.mark.slow
@pytest.mark.parametrize("odd", [math.nan, None, math.inf, 1e300, "x"])
def test_a_score_is_never_no_number(served: Any, odd: Any) -> None:
    def brain(path: str, payload: dict[str, Any]) -> Reply:
        if path == "/v1/chat/completions":
            return 200, chat("unsafe\nS1", {"unsafe": odd, "safe": -0.5})
        tops = [{" no": odd, " yes": -0.5}]
        text = "Harmful request: no\nResponse refusal: n/a\nHarmful response: n/a"
        return 200, {"choices": [{"text": text, "logprobs": {"top_logprobs": tops}}]}

    for name, label in (("llama-guard-3-8b", "harmful"), ("wildguard", "unharmful")):
        with BaselineGuard(name, served(brain), "guard") as guard:
            (verdict,) = guard.moderate_batch([Exchange("Hi")])
        assert (verdict.error, verdict.request.label, verdict.request.score) == (None, label, None)


@pytest.mark.slow
@pytest.mark.parametrize("refuses", [False, True])
def test_greedy_is_said_in_full_where_the_server_takes_it(served: Any, refuses: bool) -> None:
    asked_for: list[dict[str, Any]] = []

    def brain(path: str, payload: dict[str, Any]) -> Reply:
        asked_for.append(payload)
        return (400, {}) if refuses and "top_k" in payload else (200, chat("safe"))

    with BaselineGuard("llama-guard-3-8b", served(brain), "guard", max_concurrency=1) as guard:
        verdicts = [*guard.moderate_batch([Exchange("Hi")]), *guard.moderate_batch([Exchange("Ho")])]
    assert [verdict.error for verdict in verdicts] == [None, None]
    neutral = {"top_k": -1, "repetition_penalty": 1.0, "presence_penalty": 0.0, "min_p": 0.0}
    assert asked_for[0].items() >= {**neutral, "temperature": 0.0, "top_p": 1.0}.items()
    assert len(asked_for) == (3 if refuses else 2)
    assert ("top_k" in asked_for[-1]) is not refuses


def test_an_unknown_guard_is_refused() -> None:
    with pytest.raises(InputError, match="unknown guard 'odd': use llama-guard-3-8b"):
        BaselineGuard("odd", "http://localhost/v1", "x")


def test_what_is_asked_is_a_request_of_its_own() -> None:
    assert all(isinstance(request, AdapterRequest) for request in ADAPTERS["guardreasoner"].build_requests(TEXT))
