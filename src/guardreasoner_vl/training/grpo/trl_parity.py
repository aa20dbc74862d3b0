"""Stock TRL on recorded rollouts: what this project's update is held against, in tests, benchmarks and before a run.

TRL repeats prompt and images for every completion; log-probabilities, loss and gradients must be the same.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from guardreasoner_vl.corpus.store import read_split
from guardreasoner_vl.engines.qwen import END_OF_TEXT, END_OF_TURN, IMAGE_PAD, QwenInputs
from guardreasoner_vl.engines.transformers_engine import TransformersEngine
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.rl.shared_prefix import use_shared_prefix
from guardreasoner_vl.training.grpo.rollouts import fitting, roll_out
from guardreasoner_vl.training.grpo.update import Passes, accumulate, old_log_probabilities
from guardreasoner_vl.training.model_folder import load_for_training
from guardreasoner_vl.types import Modality, ModelInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.recipe import GrpoSection, Recipe
    from guardreasoner_vl.training.grpo.rollouts import Group
    from guardreasoner_vl.types import Sample

TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "bf16-weights": 5e-2}
"""Largest relative difference of gradients that `verify` lets through, by precision."""

_ROWS, _COMPLETIONS = 2, 4


@dataclass(frozen=True)
class Parity:
    """Differences from stock TRL: the largest of a log-probability, of the loss, of the gradient (relative norm)."""

    rows: int
    log_probability: float
    loss: float
    gradient: float

    def told(self) -> str:
        return (
            f"beside stock TRL on {self.rows} rows: log-probabilities within {self.log_probability:.1e}, loss within "
            f"{self.loss:.1e}, gradient within {self.gradient:.1e} of its norm"
        )


class StockGrpo:
    """TRL's trainer around a model; nothing of it is changed."""

    def __init__(self, model: Any, folder: Path, inputs: QwenInputs, section: GrpoSection, output: Path) -> None:
        self._inputs, self._section = inputs, section
        self._device = next(model.parameters()).device
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            eos_token=END_OF_TURN,
            pad_token=END_OF_TEXT,
            padding_side="left",
        )
        config = GRPOConfig(
            output_dir=str(output),
            loss_type="grpo",
            beta=0.0,
            scale_rewards="group",
            temperature=section.temperature,
            num_generations=section.group_size,
            per_device_train_batch_size=section.group_size,
            bf16=section.precision == "bf16",
            gradient_checkpointing=False,
            use_cpu=self._device.type == "cpu",
            report_to=[],
        )
        self._trainer = GRPOTrainer(
            model=model,
            reward_funcs=_no_reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["unused"] * section.group_size}),
            processing_class=tokenizer,
        )
        self._trainer.current_gradient_accumulation_steps = 1
        self._model = model

    def log_probabilities(self, groups: Sequence[Group]) -> list[torch.Tensor]:
        """One tensor (tokens,) for each completion, groups in order."""
        batch = self.batch(groups)
        ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), dim=1)
        mask = torch.cat((batch["prompt_mask"], batch["completion_mask"]), dim=1)
        vision = {name: value for name, value in batch.items() if name in _VISION}
        found, *_ = self._trainer._get_per_token_logps_and_entropies(
            self._model, ids, mask, batch["completion_ids"].shape[1], **vision
        )
        return [row[own.bool()] for row, own in zip(found, batch["completion_mask"], strict=True)]

    def loss(self, groups: Sequence[Group], bound: float, old: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """TRL's loss of these groups, ready for backward; `old` as `log_probabilities` gave it."""
        batch = self.batch(groups)
        if old is not None:
            rows = torch.zeros_like(batch["completion_ids"], dtype=torch.float32)
            for number, one in enumerate(old):
                rows[number, : len(one)] = one
            batch["old_per_token_logps"] = rows
        self._trainer.epsilon_low = self._trainer.epsilon_high = bound
        loss: torch.Tensor = self._trainer._compute_loss(self._model, batch)
        return loss

    def batch(self, groups: Sequence[Group]) -> dict[str, Any]:
        """What TRL's buffer would hold: prompts padded on the left, completions on the right, all repeated."""
        pad = self._inputs.token_id[END_OF_TEXT]
        rows = [(group, place) for group in groups for place in range(len(group.completions))]
        prompts = [group.prompt.ids for group, _ in rows]
        completions = [group.completions[place].ids for group, place in rows]
        prompt_ids, prompt_mask = _padded(prompts, pad, left=True)
        completion_ids, completion_mask = _padded(completions, pad, left=False)
        batch: dict[str, Any] = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            "advantages": torch.tensor([group.advantages[place] for group, place in rows], dtype=torch.float32),
        }
        images = [image.open() for group, _ in rows for image in group.images]
        if images:
            ids = torch.cat((prompt_ids, completion_ids), dim=1)
            batch["mm_token_type_ids"] = (ids == self._inputs.token_id[IMAGE_PAD]).int()
            batch["pixel_values"] = torch.from_numpy(self._inputs.patches(images))
            batch["image_grid_thw"] = torch.tensor([(1, *grid) for group, _ in rows for grid in group.prompt.grids])
        moved = {name: value.to(self._device) for name, value in batch.items()}
        return {**moved, "num_images": [len(group.images) for group, _ in rows]} if images else moved


_VISION = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
_BOUND = 0.05
_OFF = 0.1


def compared(model: Any, stock: StockGrpo, passes: Passes, groups: Sequence[Group], section: GrpoSection) -> Parity:
    """One update of `groups`, each with signal, both ways; the old model is a little off, so that some is clipped."""
    before = [one.detach() for one in stock.log_probabilities(groups)]
    old = [one + _OFF * torch.linspace(-1, 1, len(one), device=one.device) for one in before]
    loss = stock.loss(groups, _BOUND, old)
    wanted = _gradients(model, loss)
    total = sum(len(group.completions) for group in groups)
    own = [one for group in groups for one in passes.of([group], total)]  # in the order of the completions
    ours = torch.cat(old_log_probabilities(model, own, section))
    found = accumulate(model, own, torch.split(torch.cat(old), [len(one.weights) for one in own]), _BOUND, section)
    gradients = _gradients(model)
    apart = sum(float((gradients[name] - wanted[name]).square().sum()) for name in wanted)
    whole = sum(float(value.square().sum()) for value in wanted.values())
    return Parity(
        rows=len(groups),
        log_probability=float((ours - torch.cat(before)).abs().max()),
        loss=abs(found.loss - float(loss.detach())),
        gradient=float((apart / whole) ** 0.5),
    )


def verify(recipe: Recipe, folder: Path, data: Path) -> Parity:
    """Rollouts on rows of every modality in `data`, then `compared`. Raises `DataError` if the two differ."""
    section = recipe.grpo.model_copy(update={"group_size": _COMPLETIONS})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_for_training(folder, section.precision).to(device)
    use_shared_prefix(model)
    inputs = QwenInputs.from_folder(folder)
    engine = TransformersEngine.of_network(model, inputs, ModelInfo(name=str(folder)))
    groups = [
        replace(group, advantages=tuple(np.linspace(-1, 1.5, _COMPLETIONS)))  # as if every group had signal
        for group in roll_out(_rows(data, engine, section), engine, inputs, section, f"{recipe.seed}-parity")
    ]
    with tempfile.TemporaryDirectory() as output:
        stock = StockGrpo(model, folder, inputs, section, Path(output))
        found = compared(model.train(), stock, Passes(inputs, section, device), groups, section)
    if not found.gradient <= TOLERANCES[section.precision]:
        raise DataError(f"the update is not stock TRL's ({found.told()}): do not train; check the installed versions")
    return found


def _rows(data: Path, engine: TransformersEngine, section: GrpoSection) -> list[Sample]:
    """`_ROWS` rows of each modality that fit."""
    rows, _ = fitting(read_split(data, "train"), engine, section)
    return [row for kind in get_args(Modality) for row in islice((one for one in rows if one.modality == kind), _ROWS)]


def _gradients(model: Any, loss: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Those of `loss`, or those that stand there; none stand afterwards."""
    if loss is not None:
        model.zero_grad()
        torch.autograd.backward(loss)
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found


def _padded(rows: Sequence[Sequence[int]], pad: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, both of shape (rows, longest)."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return ids, mask


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)
