"""Rollouts and validation: what the model saw and said is what is trained on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import ImageOps

from guardreasoner_vl.corpus.store import read_corpus
from guardreasoner_vl.engines.base import EngineResult
from guardreasoner_vl.engines.qwen import END_OF_TEXT, END_OF_TURN, QwenInputs
from guardreasoner_vl.engines.sampling import GenerationRow, Vocabulary
from guardreasoner_vl.engines.scripted import ScriptedEngine
from guardreasoner_vl.engines.transformers_engine import TransformersEngine
from guardreasoner_vl.images.decode import checked_images
from guardreasoner_vl.mining.rollout_io import rollout_request
from guardreasoner_vl.recipe import GrpoSection
from guardreasoner_vl.rl.shared_prefix import use_shared_prefix
from guardreasoner_vl.training.grpo import rollouts as grpo_rollouts
from guardreasoner_vl.training.grpo.ranks import DistributedContext
from guardreasoner_vl.training.grpo.rollouts import roll_out
from guardreasoner_vl.training.grpo.update import Passes, PolicyNetwork, old_log_probabilities
from guardreasoner_vl.training.grpo.validation import validate
from guardreasoner_vl.training.model_folder import load_for_training
from guardreasoner_vl.types import CheckedImage, ModelInfo
from tests.builders import answer
from tests.training.grpo import toy_grpo

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from guardreasoner_vl.engines.base import EngineRequest
    from guardreasoner_vl.training.grpo.rollouts import RolloutGroup
    from guardreasoner_vl.types import Sample

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
SECTION = GrpoSection(group_size=4, precision="fp32", temperature=1.2, max_completion_length=16)
RIGHT = answer("unharmful")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return list(read_corpus(toy_grpo.write_rows(tmp_path_factory.mktemp("rows"), 12)))


@pytest.fixture(scope="module")
def network(tiny_model: Path) -> Any:
    model = load_for_training(tiny_model, "fp32")
    use_shared_prefix(model)
    return model


@pytest.fixture
def engine(network: Any, inputs: QwenInputs) -> TransformersEngine:
    return TransformersEngine.of_network(network, inputs, ModelInfo(name="in memory"))


@pytest.mark.parametrize("kind", ["text", "image", "text-image"])
def test_the_update_sees_what_the_rollouts_saw(
    kind: str, network: Any, engine: TransformersEngine, inputs: QwenInputs, rows: list[Sample]
) -> None:
    """Nearly greedy answers are nearly certain to the update's model too, unless it sees other images."""
    cold = SECTION.model_copy(update={"temperature": 3e-4})
    groups = [
        replace(group, advantages=(1.0, -1.0, 1.0, -1.0))
        for group in roll_out([row for row in rows if row.modality == kind], engine, inputs, cold, "1")
    ]

    def likely(seen: Sequence[RolloutGroup]) -> torch.Tensor:
        return old_log_probabilities(PolicyNetwork(network), Passes(inputs, cold, CPU).of(seen, 8), cold).exp()

    assert likely(groups).median() > 0.99
    assert (likely(groups) > 0.3).float().mean() > 0.95  # the rest are near ties
    if kind != "text":
        other = [replace(group, images=tuple(map(inverted, group.images))) for group in groups]
        assert (likely(other) > 0.3).float().mean() < 0.8


def inverted(shown: CheckedImage) -> CheckedImage:
    (image,) = checked_images(ImageOps.invert(shown.open().copy()))
    return image


@pytest.mark.parametrize("end", [END_OF_TURN, END_OF_TEXT])
def test_a_completion_ends_with_the_token_that_was_sampled(
    end: str, inputs: QwenInputs, rows: list[Sample], tiny_model: Path
) -> None:
    row = GenerationRow(replace(rollout_request(rows[0]), ban_empty_think=False), Vocabulary(inputs), limit=9)
    for token in (40, 41, inputs.token_id[end]):
        row.add(token)
    assert (row.tokens, row.finish, row.end_id) == ([40, 41], "stop", inputs.token_id[end])
    results = [
        EngineResult("", "stop", (40, 41), row.end_id),
        EngineResult("", "length", (40, 41)),
        EngineResult("", "stop", (), row.end_id),
    ] * 4
    section = SECTION.model_copy(update={"group_size": 12})
    (group,) = roll_out(rows[:1], ScriptedEngine(results), inputs, section, "1")
    assert [one.ids for one in group.completions[:3]] == [(40, 41, row.end_id), (40, 41), (row.end_id,)]


def test_the_engine_tells_how_an_answer_ended(
    engine: TransformersEngine, inputs: QwenInputs, rows: list[Sample]
) -> None:
    """At a high temperature a random model ends its answers in either way, and some are cut."""
    request = replace(rollout_request(rows[0]), ban_empty_think=False, temperature=50.0, max_new_tokens=300)
    results = engine.generate([replace(request, seed=seed) for seed in range(24)])
    ends = {inputs.token_id[name] for name in (END_OF_TURN, END_OF_TEXT)}
    assert {result.end_id for result in results} <= {None, *ends}
    assert {result.finish_reason == "stop" for result in results} == {True, False}
    assert all((result.end_id in ends) == (result.finish_reason == "stop") for result in results)
    assert not any(ends & set(result.token_ids) for result in results)


def test_rewards_and_advantages(inputs: QwenInputs, rows: list[Sample]) -> None:
    """Right, wrong, outside the grammar, right: unharmful is the truth of the first row."""
    assert (rows[0].request_label, rows[0].response) == ("unharmful", None)
    answers = [RIGHT, RIGHT.replace("unharmful", "harmful"), "no", RIGHT]
    section = SECTION.model_copy(
        update={"reward": SECTION.reward.model_copy(update={"form": "plain"}), "max_completion_length": 64}
    )
    (group,) = roll_out(rows[:1], ScriptedEngine(answers), inputs, section, "1")
    assert [one.reward.total for one in group.completions] == [1, 0.5, 0, 1]  # nothing to judge: None is right
    assert group.has_signal
    assert sum(group.advantages) == pytest.approx(0, abs=1e-9)
    assert group.advantages[0] == group.advantages[3] > group.advantages[1] > group.advantages[2]
    (equal,) = roll_out(rows[:1], ScriptedEngine([RIGHT] * 4), inputs, section, "1")
    assert equal.advantages == (0, 0, 0, 0)
    assert not equal.has_signal


def test_answers_are_sampled_as_the_recipe_says(inputs: QwenInputs, rows: list[Sample]) -> None:
    engine = ScriptedEngine([RIGHT] * 4)
    roll_out(rows[:1], engine, inputs, SECTION.model_copy(update={"top_p": 0.9}), "1")
    drawn = {(one.temperature, one.top_p, one.max_new_tokens, one.ban_empty_think) for one in engine.requests}
    assert drawn == {(1.2, 0.9, 16, True)}
    assert len({one.seed for one in engine.requests}) == 4


def test_an_answer_depends_on_its_row_alone(engine: TransformersEngine, inputs: QwenInputs, rows: list[Sample]) -> None:
    """Whatever is asked beside it: so ranks may share a batch."""
    whole = roll_out(rows[:6], engine, inputs, SECTION, "1")
    parts = [group for start in (0, 1) for group in roll_out(rows[start:6:2], engine, inputs, SECTION, "1")]
    by_row = {group.sample.id: group.completions for group in parts}
    assert all(by_row[group.sample.id] == group.completions for group in whole)
    assert len({one.ids for group in whole for one in group.completions}) == 24
    other = roll_out(rows[:1], engine, inputs, SECTION, "2")
    assert other[0].completions != whole[0].completions


def test_rollouts_end_early_on_request(inputs: QwenInputs, rows: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo_rollouts, "AT_ONCE", 8)
    flags = iter([False, False, True])
    groups = roll_out(rows, ScriptedEngine([RIGHT] * 16), inputs, SECTION, "1", lambda: next(flags))
    assert [group.sample.id for group in groups] == [row.id for row in rows[:4]]


# --- validation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sums(DistributedContext):
    """One rank of two whose sums are written down, and replaced by those of both."""

    sums: list[list[float]] = field(default_factory=list)
    of_both: Sequence[float] = ()

    def sum(self, values: Sequence[float]) -> list[float]:
        self.sums.append(list(values))
        return list(self.of_both or values)

    def any(self, flag: bool) -> bool:
        """The other rank has no fault."""
        return flag


def said(request: EngineRequest) -> str:
    """Harmful where an image or a bomb is; bread without a label is not judged at all."""
    text = request.messages[1].text
    if "mix it" in text:
        return "I would rather bake"
    return RIGHT.replace("Request: unharmful", "Request: harmful") if "bomb" in text or request.images else RIGHT


def test_validation_counts_every_known_label(rows: list[Sample]) -> None:
    figures = validate(rows[:8], ScriptedEngine(said), 16, DistributedContext())
    # Rows 0 and 1 are right. Rows 2 (answered, yet no label of the answer) and 3 are outside the grammar, two labels
    # each, the first unharmful, the second harmful. Images are called harmful: wrong in 4 and 6, right in 5 and 7.
    harmful_found, harmful_missed, wrongly = 3, 2, 2 + 2
    assert figures.f1 == pytest.approx(2 * harmful_found / (2 * harmful_found + harmful_missed + wrongly))
    assert figures.coverage == pytest.approx(6 / 10)


def test_validation_is_shared_out(rows: list[Sample]) -> None:
    ranks = [Sums(rank, 2) for rank in range(2)]
    for context in ranks:
        validate(rows[:7], ScriptedEngine(said), 16, context)
    total = [sum(values) for values in zip(*(context.sums[0] for context in ranks), strict=True)]
    assert sum(total[:4]) == 9  # rows 2 and 3 have two labels
    alone = validate(rows[:7], ScriptedEngine(said), 16, DistributedContext())
    assert validate(rows[:7], ScriptedEngine(said), 16, Sums(0, 2, of_both=total)) == alone
    assert validate(rows[:1], ScriptedEngine(said), 16, Sums(1, 2, of_both=[1, 0, 0, 0, 0, 30])).tokens == 30


def test_nothing_found_is_an_f1_of_zero(rows: list[Sample]) -> None:
    figures = validate([rows[0]], ScriptedEngine([RIGHT]), 16, DistributedContext())
    assert (figures.f1, figures.coverage) == (0.0, 1.0)
