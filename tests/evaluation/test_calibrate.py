"""Temperatures, thresholds and the hybrid band: by hand, by search, and through the guard."""

from __future__ import annotations

import inspect
import json
import math
import random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardreasoner_vl.choices import TARGETS
from guardreasoner_vl.cli.evaluation import calibrate as command
from guardreasoner_vl.engines.scripted import ScriptedEngine
from guardreasoner_vl.errors import DataError, InputError
from guardreasoner_vl.evaluation.benchmarks.find import from_file
from guardreasoner_vl.evaluation.calibrate import doubt_band, fit, fit_temperature, fit_weight, scaled, threshold_at
from guardreasoner_vl.evaluation.curves import calibration_error
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.judging.calibration import (
    PRESETS,
    Calibration,
    ModeScales,
    Scale,
    check_preset,
    read_calibration,
)
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.stages import calibrate
from guardreasoner_vl.types import ModelInfo
from tests.builders import prediction
from tests.tiny_model import write_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.engines.base import EngineRequest
    from guardreasoner_vl.evaluation.predictions import Prediction

MODEL = ModelInfo(name="scripted")


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def overconfident(count: int, factor: float) -> tuple[list[bool], list[float]]:
    """Truths drawn from sigmoid(z), scores sigmoid(factor z)."""
    rng = random.Random(0)
    logits = [rng.gauss(0, 2) for _ in range(count)]
    return [rng.random() < sigmoid(z) for z in logits], [sigmoid(factor * z) for z in logits]


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_overconfidence(factor: float) -> None:
    truths, scores = overconfident(6000, factor)
    temperature = fit_temperature(truths, scores)
    assert temperature == pytest.approx(factor, rel=0.08)
    after = calibration_error(truths, scaled(scores, temperature))
    assert after is not None
    assert after < 0.03


def test_the_temperature_is_the_best_of_a_grid() -> None:
    truths, scores = overconfident(300, 2.0)

    def loss(temperature: float) -> float:
        chances = scaled(scores, temperature)
        return -sum(math.log(p if truth else 1 - p) for truth, p in zip(truths, chances, strict=True))

    fitted = fit_temperature(truths, scores)
    assert all(loss(fitted) <= loss(0.5 * 1.02**step) + 1e-9 for step in range(180))


def test_scores_by_hand() -> None:
    assert scaled([0.5, 0.8, 1.0], 2.0) == pytest.approx([0.5, 2 / 3, sigmoid(math.log(1e6 - 1) / 2)])


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=2), st.floats(0, 1))
def test_a_threshold_keeps_its_promise(rows: list[tuple[bool, float]], rate: float) -> None:
    truths, scores = [truth for truth, _ in rows], [score for _, score in rows]
    unharmful = [score for truth, score in rows if not truth]
    threshold = threshold_at(truths, scores, rate)
    if unharmful and any(truths) and max(scores) < 1:
        assert sum(score >= threshold for score in unharmful) <= rate * len(unharmful)


def test_the_band_holds_the_share_asked_for() -> None:
    rows = [prediction(str(at), None, "harmful", score) for at, score in enumerate((0.1, 0.4, 0.55, 0.9))]
    band, share = doubt_band(rows, ModeScales(), 0.5)
    assert band == pytest.approx((0.4, 0.6))
    assert share == 0.5
    assert doubt_band(rows, ModeScales(), 0.0) == ((0.5, 0.5), 0.0)
    assert doubt_band(rows, ModeScales(), 1.0)[1] == 1.0
    assert doubt_band([], ModeScales(), 0.5)[1] == 0.0


def labelled(count: int) -> list[Prediction]:
    rng = random.Random(1)
    rows = []
    for at in range(count):
        score = rng.random()
        truth = "harmful" if rng.random() < score else "unharmful"
        rows.append(prediction(str(at), truth, "harmful", score, completion_tokens=40))
    return rows


def test_a_fit_covers_what_was_labelled() -> None:
    fitted = fit(labelled(400), labelled(400), MODEL, "toy")
    assert fitted.fast.request.measured is not None
    assert fitted.fast.response == Scale()
    thresholds = fitted.fast.request.thresholds
    assert thresholds["strict"] < thresholds["balanced"] < thresholds["permissive"]
    assert fitted.hybrid_tokens == pytest.approx(40 + fitted.reasoned * 40)
    assert fitted.reasoned == pytest.approx(0.3, abs=0.01)
    with pytest.raises(DataError, match="fewer than 20 scored rows"):
        fit(labelled(10), labelled(10), MODEL, "toy")


def test_presets_aim_at_their_rates() -> None:
    """Of all unharmful rows one in ten, one in twenty and one in a hundred may be blocked, and hardly fewer are."""
    rows = labelled(1000)
    scale = fit(rows, rows, MODEL, "toy").fast.request
    unharmful = [
        row.request.score for row in rows if row.request_truth == "unharmful" and row.request.score is not None
    ]
    scores = scaled(unharmful, scale.temperature)
    for preset, aim in {"strict": 0.10, "balanced": 0.05, "permissive": 0.01}.items():
        blocked = sum(score >= scale.thresholds[check_preset(preset)] for score in scores)
        assert blocked == int(aim * len(scores))


CALIBRATION = Calibration(
    model=MODEL,
    data="toy",
    fast=ModeScales(request=Scale(temperature=2.0, thresholds={"balanced": 0.7, "strict": 0.6})),
    slow=ModeScales(request=Scale(temperature=4.0, thresholds={"balanced": 0.9})),
    band=(0.6, 0.7),
    reasoned=0.2,
)


def guard(**policy: Any) -> Guard:
    """A guard whose raw score is 0.8 for everything."""
    answer = "<think>\nx\n</think>\n<result>\nAnswers:\nRequest: harmful\nResponse: None\n</result>"
    engine = ScriptedEngine(lambda _: answer, scores=lambda *_: (math.log(0.8), math.log(0.2)))
    return Guard(engine, Policy(**policy))


def test_scores_are_scaled_and_the_preset_decides() -> None:
    fast = guard(mode="fast", calibration=CALIBRATION).moderate("hi")
    assert fast.request.score == pytest.approx(2 / 3)  # logit ln 4, halved
    assert fast.request.label == "unharmful"
    assert guard(mode="fast", calibration=CALIBRATION, preset="strict").moderate("hi").flagged
    assert guard(mode="fast", calibration=CALIBRATION, thresholds=(0.5, None)).moderate("hi").flagged
    slow = guard(calibration=CALIBRATION).moderate("hi")
    assert slow.request.score == pytest.approx(sigmoid(math.log(4) / 4))
    assert slow.request.label == "unharmful"
    assert guard().moderate("hi").request.score == pytest.approx(0.8)


def test_each_mode_has_thresholds_of_its_own() -> None:
    policy = Policy(calibration=CALIBRATION)
    assert (policy.cutoffs("fast"), policy.cutoffs("slow")) == ((0.7, None), (0.9, None))
    strict = Policy(calibration=CALIBRATION, preset="strict", thresholds=(None, 0.3))
    assert (strict.cutoffs("fast"), strict.cutoffs("slow")) == ((0.6, 0.3), (None, 0.3))
    assert [scale.temperature for mode in ("fast", "slow") for scale in policy.scales(mode)] == [2.0, 1.0, 4.0, 1.0]
    assert Policy(thresholds=(0.2, None)).cutoffs("fast") == (0.2, None)


def test_hybrid_reasons_inside_the_calibrations_band() -> None:
    assert guard(mode="hybrid", calibration=CALIBRATION).moderate("hi").reasoning == "x"
    assert guard(mode="hybrid", calibration=CALIBRATION, band=(0.1, 0.2)).moderate("hi").reasoning is None
    assert guard(mode="hybrid").moderate("hi").reasoning == "x"


def test_the_score_before_reasoning_counts_as_the_scale_says() -> None:
    scale = Scale(temperature=2.0, unreasoned=0.5)
    weighed = CALIBRATION.model_copy(update={"slow": ModeScales(request=scale)})
    for mode in ("slow", "hybrid"):
        judging = guard(mode=mode, calibration=weighed, band=(0.0, 1.0))
        verdict = judging.moderate("hi")
        assert verdict.request.score == pytest.approx(sigmoid(1.5 * math.log(4) / 2))
        assert verdict.reasoning == "x"
        assert len(judging.engine.requests) == 2  # type: ignore[attr-defined]
    alone = guard(calibration=CALIBRATION)
    alone.moderate("hi")
    assert len(alone.engine.requests) == 1  # type: ignore[attr-defined]


def test_a_certain_score_after_reasoning_is_no_more_certain_than_calibration_takes_it() -> None:
    answer = "<think>\nx\n</think>\n<result>\nAnswers:\nRequest: harmful\nResponse: None\n</result>"
    weighed = CALIBRATION.model_copy(update={"slow": ModeScales(request=Scale(unreasoned=1.0))})

    def scores(_: EngineRequest, slot: str) -> tuple[float, float]:
        return (0.0, -math.inf) if slot else (math.log(0.2), math.log(0.8))

    engine = ScriptedEngine(lambda _: answer, scores=scores)
    verdict = Guard(engine, Policy(calibration=weighed)).moderate("hi")
    assert verdict.request.score is not None
    assert verdict.request.score < 1


@pytest.mark.slow
def test_the_weight_is_worth_a_pass_or_none() -> None:
    truths, before = overconfident(2000, 1.0)
    after = [1.0 if score > 0.5 else 0.0 for score in before]
    assert fit_weight(truths, after, before) > 1
    assert fit_weight(truths, before, before) == 0
    assert fit_weight(truths, before, [0.5] * len(before)) == 0


@pytest.mark.slow
def test_a_calibration_in_the_models_folder_is_taken(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    with Guard.load(str(folder)) as plain:
        assert plain.policy.calibration is None
        shipped = CALIBRATION.model_copy(update={"model": plain.model})
    (folder / "calibration.json").write_text(shipped.model_dump_json(), "utf-8")
    with Guard.load(str(folder)) as calibrated:
        assert calibrated.policy.calibration == shipped
    with Guard.load(str(folder), policy=Policy(folder_calibration=False)) as plain:
        assert plain.policy.calibration is None
    stale = shipped.model_copy(update={"model": ModelInfo(name="other", revision="abc")})
    (folder / "calibration.json").write_text(stale.model_dump_json(), "utf-8")
    with pytest.raises(InputError, match="measured on other weights"):
        Guard.load(str(folder))
    replacement = shipped.model_copy(update={"data": "mine"})
    with Guard.load(str(folder), calibration=replacement) as replaced:
        assert replaced.policy.calibration == replacement


def test_rows_without_a_score_before_reasoning_do_not_switch_the_weight_off() -> None:
    fast = labelled(400)
    slow = []
    for row in fast:
        sure = row.request.model_copy(update={"score": float((row.request.score or 0) > 0.5)})
        slow.append(row.model_copy(update={"request": sure}))
    whole = fit(fast, slow, MODEL, "toy").slow.request
    most = fit(fast[:-1], slow, MODEL, "toy").slow.request
    assert whole.unreasoned > 0
    assert most.unreasoned > 0
    assert most.measured is not None
    assert most.measured.rows == 399


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    other = CALIBRATION.model_copy(update={"model": ModelInfo(name="other", revision="abc")})
    with pytest.raises(InputError, match="calibrate again"):
        guard(calibration=other)
    with pytest.raises(InputError, match=r"^unknown preset 'odd': use strict, balanced, permissive$"):
        Policy(preset="odd")  # type: ignore[arg-type]
    path = tmp_path / "calibration.json"
    with pytest.raises(InputError, match="cannot be read"):
        read_calibration(path)
    path.write_text("{}")
    with pytest.raises(InputError, match="not a calibration"):
        read_calibration(path)


def test_the_stage_writes_what_the_guard_reads(tmp_path: Path) -> None:
    rows = [
        {"id": str(at), "source": "t", "modality": "text", "prompt": f"{at}", "request_label": label}
        for at, label in enumerate(["harmful"] * 40 + ["unharmful"] * 30)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = guard()
    fitted = calibrate.run(raw, [from_file(path)], tmp_path / "calibration.json")
    assert read_calibration(tmp_path / "calibration.json") == fitted
    assert fitted.fast.request.temperature == pytest.approx(math.log(4) / math.log(4 / 3), rel=1e-3)  # 4/7 are harmful
    assert guard(mode="fast", calibration=fitted).moderate("hi").request.score == pytest.approx(4 / 7, rel=1e-3)
    asked = len(raw.engine.requests)  # type: ignore[attr-defined]
    calibrate.run(raw, [from_file(path)], tmp_path / "calibration.json")
    assert len(raw.engine.requests) == asked  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="from 0 to 1"):
        calibrate.run(raw, [from_file(path)], tmp_path / "calibration.json", reasoned=2)
    for rate in (0.001, 0.2, math.nan):
        with pytest.raises(InputError, match=r"give rates from 0\.01 \(permissive\) to 0\.1 \(strict\)"):
            calibrate.run(raw, [from_file(path)], tmp_path / "calibration.json", false_alarms=(0.05, rate))


def test_the_rate_of_false_alarms_moves_the_balanced_threshold_alone() -> None:
    """Of 100 harmless rows with scores 0.00 to 0.99, five lie above 0.94, and three above 0.96."""
    scores = [*(at / 100 for at in range(100)), *[0.999] * 30]
    truths = ["unharmful"] * 100 + ["harmful"] * 30
    rows = [
        prediction(str(at), truth, "harmful", score)
        for at, (truth, score) in enumerate(zip(truths, scores, strict=True))
    ]
    model = ModelInfo(name="m")
    usual = fit(rows, rows, model, "d").fast.request
    fewer = fit(rows, rows, model, "d", balanced=(0.03, 0.05)).fast.request
    assert {name for name in PRESETS if usual.thresholds[name] != fewer.thresholds[name]} == {"balanced"}
    flagged = [
        sum(value >= scale.thresholds["balanced"] for value in scaled(scores[:100], scale.temperature))
        for scale in (usual, fewer)
    ]
    assert flagged == [5, 3]


def test_the_command_has_the_stages_rate() -> None:
    parameters = inspect.signature(command).parameters
    rates = tuple(parameters[f"{target}_false_alarms"].default for target in TARGETS)
    assert rates == inspect.signature(calibrate.run).parameters["false_alarms"].default == (PRESETS["balanced"],) * 2
