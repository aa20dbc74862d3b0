"""Settings of a verdict: what is refused, in which words, and what is just let in."""

from __future__ import annotations

from typing import Any

import pytest

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.judging.policy import Policy


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"mode": "odd"}, "unknown mode 'odd': use one of slow, fast, hybrid"),
        ({"on_error": "odd"}, "unknown on_error 'odd': use block or allow"),
        ({"long_input": "odd"}, "unknown long_input 'odd': use refuse or windows"),
        ({"max_new_tokens": 0}, "max_new_tokens is a number of tokens: give at least 1"),
        (
            {"thresholds": (0.5,)},
            "thresholds are two: one for the request, one for the response; None leaves one out",
        ),
        ({"thresholds": (None, 1.01)}, "a threshold is a probability: give a number from 0 to 1"),
        ({"thresholds": (-0.01, None)}, "a threshold is a probability: give a number from 0 to 1"),
        ({"band": (0.6, 0.5)}, "the band is two probabilities, the lower one first"),
        ({"band": (-0.1, 0.5)}, "the band is two probabilities, the lower one first"),
        ({"band": (0.5, 1.1)}, "the band is two probabilities, the lower one first"),
        ({"window_overlap": 1.0}, "window_overlap is a share of a window: give a number from 0 to below 1"),
        ({"window_overlap": -0.1}, "window_overlap is a share of a window: give a number from 0 to below 1"),
        ({"max_windows": 0}, "max_windows is a number of windows: give at least 1"),
        ({"preset": "odd"}, "unknown preset 'odd': use strict, balanced, permissive"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as caught:
        Policy(**settings)
    assert str(caught.value) == told


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 1},
        {"thresholds": (0, 1)},
        {"thresholds": (1, 0)},
        {"band": (0, 0)},
        {"band": (1, 1)},
        {"band": (0.5, 0.5)},
        {"window_overlap": 0.0},
        {"window_overlap": 0.99},
        {"max_windows": 1},
    ],
)
def test_the_ends_are_let_in(settings: dict[str, Any]) -> None:
    policy = Policy(**settings)
    assert {name: getattr(policy, name) for name in settings} == settings


def test_what_hybrid_doubts() -> None:
    assert (Policy().doubt, Policy(band=(0.2, 0.3)).doubt) == ((0.1, 0.9), (0.2, 0.3))
