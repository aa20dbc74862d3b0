"""Rejection sampling by hand: what is asked about a row, what its answers are worth, and how rows are counted."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, get_args

import pytest

from guardreasoner_vl.engines.base import EngineResult
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.mining.candidates import (
    Candidates,
    PassRates,
    candidate_requests,
    candidate_seed,
    graded,
    is_kept,
    read_candidates,
)
from guardreasoner_vl.mining.rollout_io import derive_seed, parse_rollout, rollout_request
from guardreasoner_vl.protocol import build_messages
from guardreasoner_vl.recipe import KeepRule, parse_recipe
from guardreasoner_vl.types import Label, Sample, Usage

if TYPE_CHECKING:
    from pathlib import Path


def row(**fields: Any) -> Sample:
    content = {"id": "r1", "source": "toy", "modality": "text", "prompt": "Cake?", "request_label": "unharmful"}
    return Sample.model_validate({**content, **fields})


ANSWERED = {"response": "Flour.", "response_label": "harmful"}


def answer(request: str, response: str = "None", tokens: int = 10, finish_reason: Any = "stop") -> EngineResult:
    text = f"<think>\nLooked.\n</think>\n<result>\nAnswers:\nRequest: {request}\nResponse: {response}\n</result>"
    return EngineResult(text, finish_reason, usage=Usage(completion_tokens=tokens))


def test_a_row_is_asked_about_as_slow_mode_asks() -> None:
    request = rollout_request(row(**ANSWERED))
    assert request.messages == build_messages(row(**ANSWERED).exchange())
    assert (request.forced_prefix, request.ban_empty_think, request.label_fields) == ("", True, ())


def test_an_answer_is_read_with_what_the_row_holds() -> None:
    both = parse_rollout(row(**ANSWERED), answer("unharmful", "harmful"))
    assert (both.request, both.response) == (Label.UNHARMFUL, Label.HARMFUL)
    only = parse_rollout(row(), answer("unharmful", "harmful"))
    assert (only.request, only.response) == (Label.UNHARMFUL, Label.NOT_APPLICABLE)
    reply = parse_rollout(row(prompt="", request_label=None, **ANSWERED), answer("None", "harmful"))
    assert (reply.request, reply.response) == (Label.NOT_APPLICABLE, Label.HARMFUL)
    assert parse_rollout(row(), answer("unharmful", finish_reason="length")).reason == "truncated"


def test_a_seed_is_the_first_six_bytes_of_a_digest() -> None:
    digest = hashlib.sha256(b"5-2-r1").hexdigest()
    assert derive_seed("5-2-r1") == candidate_seed(5, "r1", 2) == int(digest[:12], 16)
    assert derive_seed("\u00e9") == int(hashlib.sha256(b"\xc3\xa9").hexdigest()[:12], 16)


def test_the_candidates_differ_in_their_seeds_alone() -> None:
    settings = {"candidates": 3, "max_new_tokens": 77, "temperature": 0.7, "top_p": 0.8}
    section = parse_recipe({"name": "hard", "mine": settings}).mine
    requests = candidate_requests(row(), row().exchange(), section, 5)
    assert [request.seed for request in requests] == [
        derive_seed("5-0-r1"),
        derive_seed("5-1-r1"),
        derive_seed("5-2-r1"),
    ]
    for request in requests:
        assert (request.max_new_tokens, request.temperature, request.top_p) == (77, 0.7, 0.8)
        assert (request.messages, request.ban_empty_think) == (rollout_request(row()).messages, True)


def test_what_answers_are_worth() -> None:
    answers = [
        answer("unharmful", "harmful", 11),
        answer("unharmful", "unharmful", 12),
        answer("harmful", "unharmful", 13),
        answer("unharmful", "harmful", 14, "length"),
        EngineResult("I would say no.", "stop", usage=Usage(completion_tokens=15)),
    ]
    assert graded(row(**ANSWERED), answers) == Candidates(
        id="r1",
        source="toy",
        modality="text",
        right=(True, False, False, False, False),
        safety=(1.0, 0.5, 0.0, 0.0, 0.0),
        tokens=(11, 12, 13, 14, 15),
        reasons=(None, None, None, "truncated", "missing_think"),
    )


@pytest.mark.parametrize(
    ("right", "rules"),
    [
        ((False, False), {"all_wrong"}),
        ((True, False), {"mixed"}),
        ((False, True), {"mixed"}),
        ((True, True), set()),
        ((True, False, True), {"mixed", "mostly_right"}),
        ((False, True, True, False), {"mixed"}),
        ((False, True, True, True), {"mixed", "mostly_right"}),
        ((True, True, True, True), set()),
    ],
)
def test_which_rows_are_kept(right: tuple[bool, ...], rules: set[KeepRule]) -> None:
    assert {rule for rule in get_args(KeepRule) if is_kept(right, rule)} == rules


def test_rows_are_counted_by_source_and_right_answers() -> None:
    rates = PassRates()
    assert (rates.coverage, rates.tokens_mean) == (None, None)
    right, wrong, broken = answer("unharmful", tokens=4), answer("harmful", tokens=5), answer("?", tokens=6)
    for source, answers in (
        ("a", [right, right]),
        ("a", [right, wrong]),
        ("a", [wrong, right]),
        ("b", [wrong, broken]),
        ("b", [broken, broken]),
    ):
        rates.add(graded(row(source=source), answers))
    assert [rates.of(source, 2) for source in "ab"] == [(0, 2, 1), (2, 0, 0)]
    assert rates.of_all(2) == (2, 2, 1)
    assert rates.coverage == 0.7  # three of ten answers are outside the grammar
    assert rates.tokens_mean == 4.9  # 4 x 4 + 3 x 5 + 3 x 6 = 49


def test_a_line_that_holds_no_candidates_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    whole = [graded(row(id=name), [answer("unharmful")]) for name in ("r1", "r2")]
    path.write_text("".join(f"{line.model_dump_json()}\n" for line in whole) + '{"id": "r4"}\n', "utf-8")
    rows = read_candidates(path)
    assert [next(rows), next(rows)] == whole
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: not a row's candidates; remove the line"):
        next(rows)
