"""From rows to verdicts: curated, explained by a teacher, trained on by a tiny guard, which is loaded and asked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl import Exchange, Guard, Label, Verdict
from guardreasoner_vl.engines.transformers_engine import TransformersEngine
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.protocol import Reason
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.stages import curate, synthesize
from guardreasoner_vl.stages.sft import run
from guardreasoner_vl.teachers.offline import RulesTeacher
from tests.training import toy

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.types import Mode, Sample

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
ROWS = 48
TEXT = {**toy.SHAPE["text"], "hidden_size": 64, "intermediate_size": 128, "heads": 2, "kv_heads": 2}
MODES: tuple[Mode, ...] = ("fast", "slow")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a corpus of toy rows of all modalities and a few drawn images."""
    root = tmp_path_factory.mktemp("pipeline")
    data = toy.write_data(root / "data", toy.rows(ROWS))
    recipe = toy.recipe(
        {"sources": [toy.SOURCE], "synthetic_images": {"count": 8}},
        {"text": TEXT},
        epochs=45,
        batch_size=8,
        gradient_accumulation=1,
        learning_rate=5e-3,
        adam_beta2=0.98,
        warmup_steps=5,
        without_reasoning=0.4,
        max_length=500,
        save_steps=1000,
        precision="bf16-weights",
        teacher=None,
    )
    corpus = root / "corpus"
    assert curate.run(recipe, data, corpus).skipped.reasons == {}
    assert synthesize.run(corpus, RulesTeacher()).remaining == 0
    assert run(recipe, corpus, root / "out") == root / "out" / "sft" / "model"
    return root / "out"


@pytest.fixture(scope="module")
def samples(out: Path) -> list[Sample]:
    return list(read_samples(out.parent / "data" / "toy" / "train.jsonl"))


@pytest.fixture(scope="module")
def guard(out: Path) -> Guard:
    return Guard(TransformersEngine.load(str(out / "sft" / "model")), Policy(max_new_tokens=128, retry_new_tokens=128))


@pytest.fixture(scope="module")
def verdicts(guard: Guard, samples: list[Sample]) -> dict[Mode, list[Verdict]]:
    return {mode: list(guard.moderate_batch([row.exchange() for row in samples], mode=mode)) for mode in MODES}


def test_everything_was_trained_on(out: Path) -> None:
    report = json.loads((out / "sft" / "data.json").read_text())
    assert report["skipped"] == {}
    assert report["by_source"]["toy"] == ROWS
    assert 0 < report["by_source"]["drawn"] <= 8


@pytest.mark.parametrize("mode", MODES)
def test_verdicts_have_the_shape_of_their_exchanges(
    mode: Mode, samples: list[Sample], verdicts: dict[Mode, list[Verdict]]
) -> None:
    assert len(verdicts[mode]) == len(samples)
    for row, verdict in zip(samples, verdicts[mode], strict=True):
        assert verdict.mode == mode
        assert verdict.usage.prompt_tokens > 0
        if verdict.error is not None:
            assert mode == "slow"
            assert verdict.error.code in set(Reason)
            assert (verdict.request.label, verdict.response.label) == (Label.ERROR, Label.ERROR)
            assert (verdict.flagged, verdict.action) == (None, "block")
            continue
        assert verdict.request.label in (Label.HARMFUL, Label.UNHARMFUL)
        answered = verdict.response.label is not Label.NOT_APPLICABLE
        assert answered == (row.response is not None)
        assert verdict.flagged == (Label.HARMFUL in (verdict.request.label, verdict.response.label))
        assert verdict.action == ("block" if verdict.flagged else "allow")
        assert (verdict.reasoning is None) == (mode == "fast")
        assert verdict.request.score is not None
        assert 0 <= verdict.request.score <= 1


def right(samples: list[Sample], verdicts: list[Verdict], **fields: Any) -> float:
    """Share of known labels that the verdicts give, over the rows with these fields."""
    pairs = [
        (gold, judged.label.value)
        for row, verdict in zip(samples, verdicts, strict=True)
        if all(getattr(row, name) == value for name, value in fields.items())
        for gold, judged in ((row.request_label, verdict.request), (row.response_label, verdict.response))
        if gold is not None
    ]
    assert len(pairs) >= ROWS // 4
    return sum(gold == label for gold, label in pairs) / len(pairs)


@pytest.mark.parametrize("modality", ["text", "image", "text-image"])
def test_fast_mode_has_learnt_what_is_trivial(
    modality: str, samples: list[Sample], verdicts: dict[Mode, list[Verdict]]
) -> None:
    assert right(samples, verdicts["fast"], modality=modality) >= 0.9


def test_slow_mode_mostly_keeps_to_the_grammar_and_is_right(
    samples: list[Sample], verdicts: dict[Mode, list[Verdict]]
) -> None:
    covered = [verdict for verdict in verdicts["slow"] if verdict.error is None]
    assert len(covered) >= 0.8 * ROWS
    assert all("# Task 1" in (verdict.reasoning or "") for verdict in covered)
    assert right(samples, verdicts["slow"]) >= 0.7


def test_one_by_one_and_in_a_batch_agree(
    guard: Guard, samples: list[Sample], verdicts: dict[Mode, list[Verdict]]
) -> None:
    for number in (0, 3, 4, 7):
        row = samples[number]
        alone = guard.moderate(row.prompt or None, images=row.images, response=row.response, mode="fast")
        assert alone.request.label == verdicts["fast"][number].request.label
        assert alone.request.score == pytest.approx(verdicts["fast"][number].request.score, abs=0.05)


def test_a_bad_item_harms_no_other(guard: Guard, samples: list[Sample], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    items: list[Any] = [samples[0].exchange(), Exchange("look", (broken,)), {"prompt": 5}, samples[1].exchange()]
    first, bad, worse, last = guard.moderate_batch(items, mode="fast")
    assert [verdict.error.code for verdict in (bad, worse) if verdict.error] == ["invalid_image", "invalid_input"]
    assert first.error is None
    assert last.error is None


def test_the_loaded_guard_says_who_it_is(guard: Guard, out: Path) -> None:
    assert guard.model.name == str(out / "sft" / "model")
    assert guard.model.revision
