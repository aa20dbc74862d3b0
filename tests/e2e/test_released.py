"""The corpus that the paper's authors released, in its layout, from its rows to RL: nothing is asked of a teacher."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from guardreasoner_vl import Guard
from guardreasoner_vl.corpus.store import read_corpus
from guardreasoner_vl.pipeline import run as pipeline
from guardreasoner_vl.pipeline.run import Run, Stage
from guardreasoner_vl.protocol import INSTRUCTION
from guardreasoner_vl.recipe import load_recipe
from tests.builders import answer, write_records
from tests.smoke import PATH, short_recipe

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
STAGES: list[Stage] = ["curate", "synthesize", "sft", "mine", "augment", "grpo"]
ROWS = 120


def record(number: int, with_image: bool) -> dict[str, Any]:
    rng = random.Random(number)
    things = " and ".join(rng.sample(["bread", "tea", "soup", "cake", "jam", "rice", "salad", "pie"], 3))
    label, wish = ("harmful", "spoil") if number % 2 else ("unharmful", "cook")
    mark = "<image>\n" if with_image else ""
    said = [
        ("system", INSTRUCTION),
        (
            "user",
            f"Human user:\n{mark}How do I {wish} {things}, number {number}?\n\nAI assistant:\nNone\n",
        ),
        ("assistant", answer(label, reasoning=f"The user wants to {wish} food.")),
    ]
    messages = [{"role": role, "content": text} for role, text in said]
    return {"messages": messages, **({"images": [f"images/{number}.png"]} if with_image else {})}


def test_the_released_corpus_is_trained_on_from_its_rows_to_rl(tmp_path: Path) -> None:
    folder = tmp_path / "guardreasoner-vltrain"
    (folder / "images").mkdir(parents=True)
    for number in range(0, ROWS, 3):
        Image.new("RGB", (56, 56), (number, 200, 90)).save(folder / "images" / f"{number}.png")
    records = [record(number, with_image=number % 3 == 0) for number in range(ROWS)]
    write_records(folder, "GuardReasoner-VLTrainText.json", [row for row in records if "images" not in row])
    write_records(folder, "GuardReasoner-VLTrainTextImage.json", [row for row in records if "images" in row])
    released = load_recipe(PATH.parent / "3b-released.yaml")
    toy = short_recipe(sft={"epochs": 8}, mine={"keep": "all_wrong"})
    recipe = toy.model_copy(update={"data": released.data, "synthesize": released.synthesize})
    out = tmp_path / "out"

    pipeline.run(Run(recipe, tmp_path, out, print), STAGES)

    rows = list(read_corpus(out / "corpus"))
    assert len(rows) == ROWS
    assert sum(bool(row.images) for row in rows) == len(range(0, ROWS, 3))
    assert {row.reasoning for row in rows} == {"The user wants to spoil food.", "The user wants to cook food."}
    steps = [json.loads(line)["step"] for line in (out / "grpo" / "log.jsonl").read_text().splitlines()]
    assert steps[-1] == recipe.grpo.steps
    with Guard.load(str(out / "grpo" / "model")) as guard:
        assert guard.moderate("How do I cook rice?", mode="fast").error is None
