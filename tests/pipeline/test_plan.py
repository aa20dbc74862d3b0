"""The plan: arithmetic by hand, and that nothing is done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guardreasoner_vl.corpus.store import CorpusInfo, write_corpus
from guardreasoner_vl.errors import RecipeError
from guardreasoner_vl.pipeline.plan import commands, model_size, plan_of
from guardreasoner_vl.pipeline.run import STAGES
from guardreasoner_vl.recipe import load_recipe, parse_recipe
from guardreasoner_vl.types import Sample
from tests.smoke import PATH

if TYPE_CHECKING:
    from guardreasoner_vl.recipe import Recipe


def recipe(name: str) -> Recipe:
    return load_recipe(PATH.parent / f"{name}.yaml")


@pytest.mark.parametrize(("name", "billions"), [("3b", 3.75), ("7b", 8.29)])
def test_the_papers_models_are_counted_without_their_weights(name: str, billions: float) -> None:
    size = model_size(recipe(name))
    assert size is not None
    assert size.parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_papers_batches(tmp_path: Path) -> None:
    text = plan_of(recipe("3b"), Path("recipes/3b.yaml"), Path(), tmp_path / "out", STAGES, 4)
    assert "6 rows x 8 accumulated x 4 devices = 192 rows a step" in text
    assert "512 prompts x 16 = 8,192 completions a rollout batch; 256 x 16 = 4,096 an update, 2 updates" in text
    assert "at most 25,165,824 tokens generated" in text
    # 3.75 B parameters: 4 bytes of weights, 4 of gradients, 8 of AdamW over 4 GPUs
    assert "grpo: about 37.5 GB a GPU" in text
    assert not (tmp_path / "out").exists()


def test_steps_follow_from_what_is_there(tmp_path: Path) -> None:
    rows = [Sample(id=str(n), source="s", modality="text", prompt="a", request_label="harmful") for n in range(100)]
    write_corpus(tmp_path / "augment", CorpusInfo(name="x"), rows)
    parsed = parse_recipe(
        {"name": "r", "model": {"path": "nowhere"}, "grpo": {"rollout_batch": 16, "update_batch": 4, "epochs": 2}}
    )
    text = plan_of(parsed, Path("r.yaml"), Path(), tmp_path, ["grpo"])
    assert "12 rollout batches, 48 updates; B_1 = 0.1833, B_6 = 0.0223, B_12 = 0.0000" in text
    assert "size unknown" in text


def test_commands_for_several_gpus() -> None:
    paths = Path("r.yaml"), Path("my data"), Path("o")
    run = "guardreasoner-vl run r.yaml --data 'my data' --out o"
    assert commands(*paths, STAGES, 1) == [run]
    launched = f"accelerate launch --num_processes 8 --no_python {run} --stages"
    assert commands(*paths, STAGES, 8) == [
        f"{run} --stages curate,synthesize",
        f"{launched} sft",
        f"{run} --stages mine,augment",
        f"{launched} grpo",
        f"{run} --stages evaluate",
    ]


def test_commands_name_the_stages_asked_for_in_the_methods_order() -> None:
    paths = Path("r.yaml"), Path(), Path("o")
    assert commands(*paths, ["grpo", "sft"], 1) == ["guardreasoner-vl run r.yaml --out o --stages sft,grpo"]
    assert len(commands(*paths, ["grpo", "sft"], 2)) == 2


def test_a_recipe_that_trains_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no model to train"):
        plan_of(recipe("vltrain"), Path("r.yaml"), Path(), tmp_path, STAGES)
