"""Compares this project's update with stock TRL on recorded rollouts, in tests, benchmarks and before a run.

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
from guardreasoner_vl.images.sizes import ImageSizes
from guardreasoner_vl.rl.shared_prefix import use_shared_prefix
from guardreasoner_vl.training.grpo.rollouts import fitting, roll_out
from guardreasoner_vl.training.grpo.update import Passes, PolicyNetwork, accumulate, old_log_probabilities
from guardreasoner_vl.training.model_folder import load_for_training
from guardreasoner_vl.types import Modality, ModelInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.recipe import GrpoSection, Recipe
    from guardreasoner_vl.training.grpo.rollouts import RolloutGroup
    from guardreasoner_vl.types import Sample

TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "bf16-weights": 5e-2}
"""Largest relative difference of gradients that `verify` accepts, by precision."""

_ROWS, _COMPLETIONS = 2, 4


@dataclass(frozen=True)
class ParityReport:
    """Differences from stock TRL: the largest of a log-probability, the loss's, the gradient's (relative norm)."""

    rows: int
    log_probability: float
    loss: float
    gradient: float

    def summary(self) -> str:
        """The differences in one line."""
        return (
            f"compared with stock TRL on {self.rows} rows: log-probabilities differ by at most "
            f"{self.log_probability:.1e}, the loss by {self.loss:.1e}, the gradient by {self.gradient:.1e} of its norm"
        )


class StockGrpo:
    """TRL's unchanged trainer around a model."""

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

    def log_probabilities(self, groups: Sequence[RolloutGroup]) -> list[torch.Tensor]:
        """One tensor (tokens,) for each completion, groups in order."""
        batch = self.batch(groups)
        ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), dim=1)
        mask = torch.cat((batch["prompt_mask"], batch["completion_mask"]), dim=1)
        vision = {name: value for name, value in batch.items() if name in _VISION}
        logprobs, *_ = self._trainer._get_per_token_logps_and_entropies(
            self._model, ids, mask, batch["completion_ids"].shape[1], **vision
        )
        return [row[real.bool()] for row, real in zip(logprobs, batch["completion_mask"], strict=True)]

    def loss(
        self, groups: Sequence[RolloutGroup], bound: float, old: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """TRL's loss of these groups, ready for backward; `old` are log-probabilities as `log_probabilities` gives."""
        batch = self.batch(groups)
        if old is not None:
            rows = torch.zeros_like(batch["completion_ids"], dtype=torch.float32)
            for number, logprobs in enumerate(old):
                rows[number, : len(logprobs)] = logprobs
            batch["old_per_token_logps"] = rows
        self._trainer.epsilon_low = self._trainer.epsilon_high = bound
        loss: torch.Tensor = self._trainer._compute_loss(self._model, batch)
        return loss

    def batch(self, groups: Sequence[RolloutGroup]) -> dict[str, Any]:
        """The batch as in TRL's buffer: prompts padded on the left, completions on the right, prompts repeated."""
        pad = self._inputs.token_id[END_OF_TEXT]
        rows = [(group, place) for group in groups for place in range(len(group.completions))]
        prompts = [group.prompt.ids for group, _ in rows]
        completions = [group.completions[place].ids for group, place in rows]
        prompt_ids, prompt_mask = _padded_ids(prompts, pad, left_side=True)
        completion_ids, completion_mask = _padded_ids(completions, pad, left_side=False)
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


def compared(
    model: Any, stock: StockGrpo, passes: Passes, groups: Sequence[RolloutGroup], section: GrpoSection
) -> ParityReport:
    """Compute one update of `groups`, each with signal, by TRL and by `accumulate`.

    The old log-probabilities are shifted by up to `_OFF`, so that some tokens are clipped.
    """
    before = [logprobs.detach() for logprobs in stock.log_probabilities(groups)]
    old = [logprobs + _OFF * torch.linspace(-1, 1, len(logprobs), device=logprobs.device) for logprobs in before]
    loss = stock.loss(groups, _BOUND, old)
    expected = _gradients(model, loss)
    total = sum(len(group.completions) for group in groups)
    # One call for each group keeps the order of the completions.
    group_passes = [part for group in groups for part in passes.of([group], total)]
    policy = PolicyNetwork(model)
    computed = old_log_probabilities(policy, group_passes, section)
    figures = accumulate(policy, group_passes, torch.cat(old), _BOUND, section)
    gradients = _gradients(model)
    difference = sum(float((gradients[name] - expected[name]).square().sum()) for name in expected)
    whole = sum(float(value.square().sum()) for value in expected.values())
    return ParityReport(
        rows=len(groups),
        log_probability=float((computed - torch.cat(before)).abs().max()),
        loss=abs(figures.loss - float(loss.detach())),
        gradient=float((difference / whole) ** 0.5),
    )


def verify(recipe: Recipe, folder: Path, data: Path) -> ParityReport:
    """Roll out rows of every modality in `data` and compare the update. Raises `DataError` if the two differ."""
    section = recipe.grpo.model_copy(update={"group_size": _COMPLETIONS})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_for_training(folder, section.precision).to(device)
    use_shared_prefix(model)
    inputs = QwenInputs.from_folder(folder)
    engine = TransformersEngine.of_network(model, inputs, ModelInfo(name=str(folder)))
    groups = [
        replace(group, advantages=tuple(np.linspace(-1, 1.5, _COMPLETIONS)))  # as if every group had signal
        for group in roll_out(_rows_that_fit(data, engine, section), engine, inputs, section, f"{recipe.seed}-parity")
    ]
    with tempfile.TemporaryDirectory() as output:
        stock = StockGrpo(model, folder, inputs, section, Path(output))
        report = compared(model.train(), stock, Passes(inputs, section, device), groups, section)
    if not report.gradient <= TOLERANCES[section.precision]:
        raise DataError(
            f"the update differs from stock TRL's ({report.summary()}): do not train; check the installed versions"
        )
    return report


def _rows_that_fit(data: Path, engine: TransformersEngine, section: GrpoSection) -> list[Sample]:
    """`_ROWS` rows of each modality that fit."""
    context = engine.capabilities.max_context
    rows, _ = fitting(read_split(data, "train"), engine.inputs, section, context, ImageSizes())
    return [row for kind in get_args(Modality) for row in islice((one for one in rows if one.modality == kind), _ROWS)]


def _gradients(model: Any, loss: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The gradients of `loss`, or those already accumulated; they are cleared afterwards."""
    if loss is not None:
        model.zero_grad()
        torch.autograd.backward(loss)
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return gradients


def _padded_ids(rows: Sequence[Sequence[int]], pad: int, left_side: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, both of shape (rows, longest)."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if left_side else slice(len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return ids, mask


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)
