"""Label log-probabilities from tokens, computed by hand."""

from __future__ import annotations

import math

import pytest

from guardreasoner_vl.engines.label_scores import Token, compare_candidates, label_offset, likeliest, read_labels
from guardreasoner_vl.protocol import CANDIDATES, FAST_PREFIX

FIELDS = ("Request:", "Response:")


def token(text: str, **shares: float) -> Token:
    """A token and its alternatives; underscores in names are spaces."""
    return Token(text, tuple((name.replace("_", " "), math.log(share)) for name, share in shares.items()))


def spelt(*texts: str) -> list[Token]:
    return [Token(text, ((text, math.log(0.9)),)) for text in texts]


def shares(logprobs: tuple[float, ...] | None) -> tuple[float, ...]:
    assert logprobs is not None
    return tuple(math.exp(logprob) for logprob in logprobs)


def options(**likely: float) -> list[tuple[str, float]]:
    return list(token("", **likely).top)


@pytest.mark.parametrize(
    ("likely", "expected"),
    [
        ({"_harmful": 0.7, "_unh": 0.2, "_un": 0.05}, (0.7, 0.25)),
        ({"_h": 0.1, "_harmful": 0.5, "_unharmful": 0.3}, (0.6, 0.3)),
        ({"_": 0.5, "_harmful": 0.3, "_u": 0.1}, (0.3, 0.1)),
        ({"_harm": 0.4, "_None": 0.3, "_unhappy": 0.2, "_un": 0.05}, (0.4, 0.05)),
        # Missing: 0.1 is left over, but a listed token has only 0.04, so an unlisted one has no more.
        ({"_harmful": 0.86, "_None": 0.04}, (0.86, 0.04)),
        # Missing: 0.02 is left over.
        ({"_unh": 0.9, "_None": 0.08}, (0.02, 0.9)),
    ],
)
def test_compare_gives_each_token_to_the_candidate_it_begins(
    likely: dict[str, float], expected: tuple[float, float]
) -> None:
    assert shares(compare_candidates(options(**likely), CANDIDATES)) == pytest.approx(expected, abs=1e-6)


def test_compare_is_finite_where_one_token_has_everything() -> None:
    harmful, unharmful = compare_candidates([(" harmful", 0.0), (" unh", -9999.0)], CANDIDATES) or (1.0, 1.0)
    assert harmful == 0.0
    assert math.isfinite(unharmful)
    assert unharmful < -700
    assert compare_candidates([(" harmful", 0.0)], CANDIDATES) == pytest.approx((0.0, math.log(1e-6)))


def test_compare_knows_when_no_candidate_is_likely() -> None:
    assert compare_candidates(options(_None=0.9, _maybe=0.1), CANDIDATES) is None
    assert compare_candidates([("", -0.1), (" ", -1.0)], CANDIDATES) is None
    assert compare_candidates([], CANDIDATES) is None


def test_likeliest_takes_the_first_of_equals() -> None:
    assert likeliest((-2.0, -1.0, -1.0)) == 1


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("Request: a\n<result>\nRequest: b\n</result>", " b\n</result>"),
        ("<result>\nRequest: a\nRequest: b\n</result>", " b\n</result>"),
        ("<result>Request: a</result><result>Request: b", " b"),
        ("<result>\nRequest: a\n</result> Request: b", " a\n</result> Request: b"),
        ("Request: a", None),
        ("<result>\n</result>", None),
        ("", None),
    ],
)
def test_label_offset_is_in_the_last_result_block(text: str, after: str | None) -> None:
    offset = label_offset(text, "Request:")
    assert (None if offset is None else text[offset:]) == after


def test_read_labels_after_reasoning() -> None:
    tokens = [
        *spelt("<think>", "Request:", " harmful", "</think>", "<result>", "\n", "Request", ":"),
        token(" unh", _unh=0.8, _harmful=0.15),
        *spelt("arm", "ful", "\n", "Response", ":"),
        token(" harmful", _harmful=0.6, _unh=0.3),
        *spelt("\n", "</result>", "<|im_end|>"),
    ]
    generated = "".join(token.text for token in tokens[:-1])
    labels = read_labels("", generated, tokens, FIELDS, CANDIDATES)
    assert shares(labels["Request:"]) == pytest.approx((0.15, 0.8))
    assert shares(labels["Response:"]) == pytest.approx((0.6, 0.3))


def test_read_labels_after_a_forced_prefix() -> None:
    tokens = [token(" harmful", _harmful=0.6, _unh=0.3), *spelt("\n", "</result>")]
    labels = read_labels(FAST_PREFIX, " harmful\n</result>", tokens, FIELDS, CANDIDATES)
    assert set(labels) == {"Request:"}
    assert shares(labels["Request:"]) == pytest.approx((0.6, 0.3))


def test_read_labels_leaves_out_what_was_not_generated() -> None:
    prefix = FAST_PREFIX + " harmful\nResponse:"
    tokens = [token(" unh", _unh=0.8, _harmful=0.1), *spelt("arm", "ful")]
    assert set(read_labels(prefix, " unharmful", tokens, FIELDS, CANDIDATES)) == {"Response:"}


def test_read_labels_reads_to_the_first_token_that_differs() -> None:
    tokens = [
        token(" ", _=0.9, _harmful=0.1),
        token("un", un=0.6, harmful=0.4),
        *spelt("harmful"),
    ]
    labels = read_labels(FAST_PREFIX, " unharmful", tokens, FIELDS, CANDIDATES)
    assert shares(labels["Request:"]) == pytest.approx((0.4, 0.6))


def test_read_labels_inside_a_token_that_holds_the_colon() -> None:
    tokens = [*spelt("<result>", "Request"), Token(": unh", ((": unh", math.log(0.7)), (": harm", math.log(0.2))))]
    tokens += spelt("armful")
    labels = read_labels("", "<result>Request: unharmful", tokens, FIELDS, CANDIDATES)
    assert shares(labels["Request:"]) == pytest.approx((0.2, 0.7))


@pytest.mark.parametrize(
    ("generated", "tokens"),
    [
        (" unharmful", spelt("token_id:12", "token_id:13")),
        (" unharmful", spelt(" harmful")),
        (" unharmful", []),
        (" None", [token(" None", _None=0.9, _none=0.1)]),
        (" None", [Token(" None", ())]),
        ("", []),
    ],
)
def test_read_labels_gives_nothing_where_the_tokens_say_nothing(generated: str, tokens: list[Token]) -> None:
    assert read_labels(FAST_PREFIX, generated, tokens, FIELDS, CANDIDATES) == {}
