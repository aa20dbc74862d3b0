"""Policy settings: invalid values with their messages, and boundary values."""

from __future__ import annotations

from typing import Any

import pytest

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.images.decode import ImageLimits
from guardreasoner_vl.images.geometry import PixelBudget
from guardreasoner_vl.judging.calibration import Calibration, ModeScales, Scale
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.types import ModelInfo


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
        ({"ocr": "yes"}, "unknown ocr 'yes': use auto, always, never"),
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


def test_the_plain_policy_has_all_that_decides_a_verdict() -> None:
    calibration = Calibration(
        model=ModelInfo(name="toy"),
        data="toy",
        fast=ModeScales(request=Scale(temperature=2.0, thresholds={"balanced": 0.7})),
        slow=ModeScales(),
        band=(0.2, 0.8),
        reasoned=0.1,
    )
    policy = Policy(
        "fast",
        (None, 0.25),
        (0.3, 0.4),
        calibration,
        images=ImageLimits(max_frames=2, formats=frozenset({"PNG", "BMP", "GIF"})),
        pixels=PixelBudget(max_pixels=100_352),
    )
    identity = {"temperature": 1.0, "unreasoned": 0.0, "thresholds": {}, "measured": None}
    assert policy.as_json() == {
        "mode": "fast",
        "thresholds": (None, 0.25),
        "band": (0.3, 0.4),
        "calibration": {
            "model": {"name": "toy", "revision": None},
            "data": "toy",
            "fast": {
                "request": {**identity, "temperature": 2.0, "thresholds": {"balanced": 0.7}},
                "response": identity,
                "completion_tokens": 0.0,
            },
            "slow": {"request": identity, "response": identity, "completion_tokens": 0.0},
            "band": [0.2, 0.8],
            "reasoned": 0.1,
        },
        "preset": "balanced",
        "on_error": "block",
        "max_new_tokens": 1024,
        "retry_new_tokens": 4096,
        "long_input": "refuse",
        "window_overlap": 0.2,
        "max_windows": 128,
        "images": {
            "max_bytes": 20_000_000,
            "max_pixels": 40_000_000,
            "max_total_pixels": 100_000_000,
            "max_exchange_pixels": 200_000_000,
            "max_frames": 2,
            "formats": ["BMP", "GIF", "PNG"],
            "max_aspect": policy.images.max_aspect,
        },
        "pixels": {"min_pixels": 3136, "max_pixels": 100_352},
        "ocr": "auto",
    }
    assert Policy().as_json()["calibration"] is None


def test_where_a_calibration_comes_from_decides_no_verdict() -> None:
    assert Policy(folder_calibration=False).as_json() == Policy().as_json()
