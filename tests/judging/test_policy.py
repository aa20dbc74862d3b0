"""Policy settings: invalid values with their messages, and boundary values."""

from __future__ import annotations

from typing import Any

import pytest

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.judging.policy import Policy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "odd"}, "unknown mode 'odd': use one of slow, fast, hybrid"),
        ({"on_error": "odd"}, "unknown on_error 'odd': use block or allow"),
        ({"long_input": "odd"}, "unknown long_input 'odd': use refuse or windows"),
        ({"max_new_tokens": 0}, "max_new_tokens is a number of tokens: give at least 1"),
        (
            {"thresholds": (0.5,)},
            "thresholds must be two values, for the request and the response; use None for no threshold",
        ),
        ({"thresholds": (None, 1.01)}, "a threshold is a probability: give a number from 0 to 1"),
        ({"thresholds": (-0.01, None)}, "a threshold is a probability: give a number from 0 to 1"),
        ({"band": (0.6, 0.5)}, "the band must be two probabilities, the lower one first"),
        ({"band": (-0.1, 0.5)}, "the band must be two probabilities, the lower one first"),
        ({"band": (0.5, 1.1)}, "the band must be two probabilities, the lower one first"),
        (
            {"window_overlap": 1.0},
            "window_overlap is a fraction of a window: give a number of at least 0 and less than 1",
        ),
        (
            {"window_overlap": -0.1},
            "window_overlap is a fraction of a window: give a number of at least 0 and less than 1",
        ),
        ({"max_windows": 0}, "max_windows is a number of windows: give at least 1"),
        ({"preset": "odd"}, "unknown preset 'odd': use strict, balanced, permissive"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Policy(**settings)
    assert str(caught.value) == message


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
