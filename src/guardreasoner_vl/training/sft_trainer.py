"""TRL's SFT trainer for rows whose loss mask and images the protocol has settled already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTConfig, SFTTrainer

from guardreasoner_vl.engines.qwen import END_OF_TEXT, END_OF_TURN, IMAGE_PAD, VISION_START
from guardreasoner_vl.images.decode import checked_images
from guardreasoner_vl.protocol import CANDIDATES
from guardreasoner_vl.rl.shared_prefix import Branch, Tree, arguments, pack, use_shared_prefix
from guardreasoner_vl.training.master_adamw import MasterAdamW
from guardreasoner_vl.training.sft_data import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from guardreasoner_vl.engines.qwen import QwenInputs
    from guardreasoner_vl.recipe import SftSection
    from guardreasoner_vl.training.sft_data import TokenRow

BLANK = 28
"""Pixels, wide and high, of the image that a batch without any gets."""

_EPOCH_STRIDE = 1_000_003  # so that seed 1 in its first epoch is not seed 0 in its second


@dataclass(frozen=True)
class Collator:
    """Packs a micro-batch into one row in which what all rows begin with, the instruction, stands once.

    A batch is what the model is called with, `labels` (1, L), and `predicts`, the places whose outputs predict the last
    tokens of the L. An all-text batch has no pixel values at all, unless `always_images`: then one more branch,
    without loss and seen by no other, holds a blank image, for where weights are sharded every rank has to call
    every layer.
    """

    inputs: QwenInputs
    always_images: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        images, grids, branches = [], [], []
        labels: list[int] = []
        shared = self._shared(rows)
        for row in rows:
            checked = [image for path in row["images"] for image in checked_images(path)]
            row_grids = [self.inputs.grid(image.height, image.width) for image in checked]
            images += [image.open() for image in checked]
            grids += row_grids
            positions = self.inputs.positions(row["input_ids"], row_grids)
            branches.append(Branch(row["input_ids"][shared:], positions[:, shared:]))
            labels += row["labels"][shared:]
        if self.always_images and not images:
            blank = Image.new("RGB", (BLANK, BLANK))
            images, grids = [blank], [self.inputs.grid(BLANK, BLANK)]
            ids = [self.inputs.token_id[IMAGE_PAD]] * self.inputs.pads(grids[0])
            branches.append(Branch(ids, shared + self.inputs.positions(ids, grids)))
            labels += [IGNORED] * len(ids)
        prefix = Branch(rows[0]["input_ids"][:shared], np.broadcast_to(np.arange(shared), (3, shared)))
        packed = pack([Tree(prefix, tuple(branches))])
        batch = {
            **arguments(packed),
            "labels": torch.tensor([[IGNORED] * shared + labels]),
            "predicts": packed.predicts,
        }
        if images:
            batch["pixel_values"] = torch.from_numpy(self.inputs.patches(images))
            batch["image_grid_thw"] = torch.from_numpy(np.array([(1, *grid) for grid in grids]))
        return batch

    def _shared(self, rows: Sequence[dict[str, Any]]) -> int:
        """How many tokens all rows begin with, before any image and any loss; one at least, as every row does."""
        start = self.inputs.token_id[VISION_START]
        count = 0
        for column in zip(*(zip(row["input_ids"][:-1], row["labels"], strict=False) for row in rows), strict=False):
            token, label = column[0]
            if len(set(column)) > 1 or token == start or label != IGNORED:
                break
            count += 1
        return count


class LengthGrouped(torch.utils.data.Sampler[int]):
    """Rows of like length together, in an order that seed and epoch alone decide.

    Transformers' own sampler draws from the global generator, so a run resumed in its second epoch would
    read the first epoch's order.
    """

    def __init__(self, lengths: list[int], together: int, seed: int, epoch: Callable[[], int]) -> None:
        self._lengths, self._together, self._seed, self._epoch = lengths, together, seed, epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + _EPOCH_STRIDE * self._epoch())
        return iter(get_length_grouped_indices(self._lengths, self._together, generator=generator))


class SupervisedOnlyTrainer(SFTTrainer):
    """TRL's trainer for packed micro-batches, with the language head run on supervised positions only.

    The loss is TRL's (mean over the batch's supervised tokens), the label words counted `label_weight` times.
    TRL's fused head reads every position, and without Triton, as on a CPU, it takes longer than the model itself.
    """

    label_weight = 1.0
    label_tokens: tuple[int, ...] = ()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        labels, predicts = inputs.pop("labels")[0], inputs.pop("predicts")
        targets = labels[len(labels) - len(predicts) :]
        supervised = targets != IGNORED
        targets, places = targets[supervised], predicts[supervised]
        # A hook, because wrappers (autocast, DDP, DeepSpeed) want the whole model called.
        hook = self.model.lm_head.register_forward_pre_hook(lambda _, hidden: (hidden[0][0, places],))
        try:
            logits = model(**inputs, use_cache=False).logits.float()
        finally:
            hook.remove()
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        labelled = torch.isin(targets, torch.tensor(self.label_tokens, device=targets.device))
        total = torch.where(labelled, self.label_weight * losses, losses).sum()
        loss = total / (max(targets.numel(), 1) if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # tokens are counted over all ranks, gradients averaged
        self._total_train_tokens += inputs["input_ids"].numel()
        right = (logits.detach().argmax(-1) == targets).float().mean() if targets.numel() else 0.0
        self._metrics["train"]["mean_token_accuracy"].append(float(right))
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return (loss, {"logits": logits}) if return_outputs else loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Checkpoints carry the released models' names of the weights, which only `from_pretrained` translates."""
        model = model or self.model
        saved = type(model).from_pretrained(resume_from_checkpoint, use_safetensors=True, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        lengths = (train_dataset or self.train_dataset)["length"]
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGrouped(list(lengths), together, self.args.seed, lambda: int(self.state.epoch or 0))


def sft_config(section: SftSection, output: Path, seed: int, use_cpu: bool) -> SFTConfig:
    """TRL's settings for the paper's loss: cross-entropy on the assistant's tokens, no packing, no truncation."""
    return SFTConfig(
        output_dir=str(output),
        num_train_epochs=section.epochs,
        learning_rate=section.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=section.warmup_steps,
        weight_decay=section.weight_decay,
        adam_beta2=section.adam_beta2,
        max_grad_norm=section.max_grad_norm,
        per_device_train_batch_size=section.batch_size,
        gradient_accumulation_steps=section.gradient_accumulation,
        bf16=section.precision == "bf16",
        gradient_checkpointing=section.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=True,  # an all-text batch leaves the vision tower without gradients
        deepspeed=section.deepspeed,
        use_cpu=use_cpu,
        seed=seed,
        data_seed=seed,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        save_steps=section.save_steps,
        save_total_limit=2,
        logging_steps=10,
        report_to=["tensorboard"],
        dataloader_pin_memory=not use_cpu,
    )


def build_trainer(
    model: Any,
    rows: Sequence[TokenRow],
    inputs: QwenInputs,
    config: SFTConfig,
    folder: Path,
    label_weight: float = 1.0,
) -> SupervisedOnlyTrainer:
    """The trainer, ready to run; `folder` holds the tokenizer. A model held in bf16 gets fp32 copies."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=END_OF_TURN, pad_token=END_OF_TEXT
    )
    dataset = Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in rows],
            "labels": [row.labels for row in rows],
            "images": [list(row.images) for row in rows],
            "length": [len(row.input_ids) for row in rows],
        }
    )
    use_shared_prefix(model)
    optimizer = None
    if model.dtype == torch.bfloat16:
        model.to(config.device)  # before its parameters are copied
        betas = (config.adam_beta1, config.adam_beta2)
        optimizer = MasterAdamW(model.parameters(), config.learning_rate, betas, config.weight_decay)
    trainer = SupervisedOnlyTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        data_collator=Collator(inputs),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        trainer.data_collator = Collator(inputs, always_images=True)
    # Qwen2.5-VL says no; but `compute_loss` does, and without it short micro-batches would weigh as much as long ones.
    trainer.model_accepts_loss_kwargs = True
    trainer.label_weight = label_weight
    trainer.label_tokens = tuple(token for word in CANDIDATES for token in inputs.tokens(word))
    return trainer
