"""The computed hours, by hand at round numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.pipeline.capacity import SHAPES, Device, ModelShape, device_of
from guardreasoner_vl.pipeline.hours import (
    TYPICAL,
    UTILISATION,
    Machine,
    answer_seconds,
    batch_seconds,
    group_flops,
    sft_seconds,
)
from guardreasoner_vl.pipeline.plan import duration, plan_of
from guardreasoner_vl.recipe import GrpoSection, load_recipe
from tests.smoke import PATH

SHAPE = ModelShape(
    layers=1,
    hidden=10,
    intermediate=20,
    heads=1,
    kv_heads=1,
    vocabulary=100,
    tied=True,
    vision_layers=0,
    vision_hidden=0,
    vision_intermediate=0,
)
DEVICE = Device(flops=1e9, bandwidth=1e9, memory=1e12, source="made up")
# Matrices 10 x (20 + 20) + 3 x 10 x 20 = 1,000, head 1,000. The prompt has 350 + 250 = 600 tokens and 600 x 601 / 2
# pairs; each of the 250 tokens of an answer sees 600 + 125 others on the average.
PROMPT = 2 * 1000 * 600 + 4 * 10 * 180_300
ANSWER = 250 * (2 * 2000 + 4 * 10 * 725)


def machine(count: int = 1, adapters: bool = False) -> Machine:
    return Machine(DEVICE, count, SHAPE, adapters)


def test_a_group_reads_its_prompt_once() -> None:
    assert (TYPICAL.context, TYPICAL.completion) == (600, 250)
    assert group_flops(SHAPE, 1) == PROMPT + ANSWER
    assert group_flops(SHAPE, 16) == PROMPT + 16 * ANSWER


@pytest.mark.parametrize(
    ("adapters", "checkpointing", "passes"), [(False, False, 3), (False, True, 4), (True, True, 3)]
)
def test_sft_takes_so_many_forward_passes(adapters: bool, checkpointing: bool, passes: int) -> None:
    seconds = sft_seconds(machine(4, adapters), 1000, checkpointing)

    assert UTILISATION == 0.4
    assert seconds == pytest.approx(1000 * passes * (PROMPT + ANSWER) / (0.4e9 * 4))


def test_a_rollout_batch_is_answers_and_updates() -> None:
    section = GrpoSection(rollout_batch=8, update_batch=4, group_size=2)

    answers, updates = batch_seconds(machine(2), section, 128)

    # Four groups on each GPU; the log-probabilities before the second of two updates cost half a pass.
    assert updates == pytest.approx(4 * 3.5 * (PROMPT + 2 * ANSWER) / 0.4e9)
    assert answers == pytest.approx(answer_seconds(machine(), 4, 2, 128))


def test_prompts_are_read_once_for_all_answers() -> None:
    first, second, third = (answer_seconds(machine(), 1, each, 128) for each in (1, 2, 3))

    assert third - second == pytest.approx(second - first)
    assert second < 2 * first


def test_a_gpu_that_holds_no_weights_is_refused() -> None:
    small = Machine(device_of("100,300,5"), 1, SHAPES["3b"])

    with pytest.raises(EngineError, match="more memory"):
        answer_seconds(small, 1, 1, 128)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.5, "0.5 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (9000, "2.5 h")]
)
def test_a_duration_has_a_readable_unit(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize("name", ["3b", "7b"])
def test_the_table_of_the_documents_is_computed(name: str) -> None:
    recipe = load_recipe(PATH.parent / f"{name}.yaml")
    host = Machine(device_of("h100"), 4, SHAPES[name])
    alone = Machine(device_of("h100"), 1, SHAPES[name])
    rows = 123_093
    sft = sft_seconds(host, rows * recipe.sft.epochs, recipe.sft.gradient_checkpointing)
    mining = answer_seconds(alone, rows, recipe.mine.candidates, 128)
    answers, updates = batch_seconds(host, recipe.grpo, 128)
    page = (Path(__file__).parents[2] / "docs/reproduce.md").read_text("utf-8")
    column = 2 if name == "3b" else 3

    cells = {
        line.split("|")[1].strip(): line.split("|")[column].strip()
        for line in page.splitlines()
        if line.startswith(("| hours", "| GPU hours"))
    }

    of_sft, of_mining, of_rl = 4 * sft / 3600, mining / 3600, 4 * 23 * (answers + updates) / 3600
    assert cells == {
        "hours, SFT, 4 x H100": duration(sft),
        "hours, mining, 1 x H100": duration(mining),
        "hours, RL, 23 rollout batches, 4 x H100": f"{duration(23 * answers)} + {duration(23 * updates)}",
        "GPU hours, all three": f"{of_sft + of_mining + of_rl:.1f}",
        "GPU hours, every variant of `ablate`": f"{3 * of_sft + of_mining + 6 * of_rl:.1f}",
    }


@pytest.mark.slow
def test_the_plan_says_the_hours(tmp_path: Path) -> None:
    path = PATH.parent / "3b.yaml"

    text = plan_of(load_recipe(path), path, Path(), tmp_path, ["sft", "mine", "grpo"], 4, gpu="h100")

    lines = [line for line in text.splitlines() if line.endswith("computed for typical rows, not measured")]
    assert [line.split(":")[0] for line in lines] == ["sft", "mine", "grpo"]
    assert "for 1,000 rows, on 4 x h100 at best" in lines[0]
    assert "for 1,000 rows, on 1 x h100 at best" in lines[1]
    assert "for a rollout batch, on 4 x h100 at best" in lines[2]
