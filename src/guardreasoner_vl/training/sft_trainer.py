"""TRL's SFT trainer for rows that are already tokenised, with their loss mask and images."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import rewrite_logs
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTConfig, SFTTrainer

from guardreasoner_vl.engines.adapter import WEIGHTS as ADAPTER_WEIGHTS
from guardreasoner_vl.engines.adapter import load_adapter
from guardreasoner_vl.engines.qwen import END_OF_TEXT, END_OF_TURN, IMAGE_PAD, VISION_START
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.images.decode import checked_images
from guardreasoner_vl.protocol import CANDIDATES
from guardreasoner_vl.rl.shared_prefix import Branch, Tree, arguments, pack, use_shared_prefix
from guardreasoner_vl.training.blank import BLANK, blank_branch, blank_image
from guardreasoner_vl.training.launch import PATIENCE, process_count, shards_weights
from guardreasoner_vl.training.master_adamw import MasterAdamW
from guardreasoner_vl.training.sft_data import IGNORED
from guardreasoner_vl.training.vision_attention import use_one_call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from guardreasoner_vl.engines.qwen import QwenInputs
    from guardreasoner_vl.recipe import SftSection
    from guardreasoner_vl.training.sft_data import TokenRow
    from guardreasoner_vl.training.trackers import LearningCurves

_WORKERS = 4  # processes that make micro-batches while a GPU computes; on a CPU they would take its cores
_SHARDING: dict[str, Any] = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "reshard_after_forward": True,
    "state_dict_type": "SHARDED_STATE_DICT",
    "cpu_ram_efficient_loading": False,
}
_EPOCH_STRIDE = 1_000_003  # so that seed 1 in its first epoch differs from seed 0 in its second


@dataclass(frozen=True)
class Collator:
    """Packs a micro-batch into one row of L tokens in which the rows' common prefix, the instruction, stands once.

    A batch holds the model's arguments, `labels` (1, L), and `predicts` (T,), the positions whose outputs predict the
    last T tokens. An all-text batch has no pixel values, unless `always_images`: then one more branch, without loss and
    invisible to the others, holds a blank image, because with sharded weights every rank must call every layer.
    """

    inputs: QwenInputs
    always_images: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Pack rows of `build_trainer`'s data set. Raises `DataError` if an image has changed since it was counted."""
        images, grids, branches = [], [], []
        labels: list[int] = []
        shared = self._shared(rows)
        for row in rows:
            checked = [image for path in row["image_paths"] for image in checked_images(path)]
            row_grids = [self.inputs.grid(image.height, image.width) for image in checked]
            if row["input_ids"].count(self.inputs.token_id[IMAGE_PAD]) != sum(map(self.inputs.pads, row_grids)):
                names = ", ".join(Path(path).name for path in row["image_paths"])
                raise DataError(f"{names} changed since its tokens were counted: restore it; the same command resumes")
            images += [image.open() for image in checked]
            grids += row_grids
            positions = self.inputs.positions(row["input_ids"], row_grids)
            branches.append(Branch(row["input_ids"][shared:], positions[:, shared:]))
            labels += row["labels"][shared:]
        if self.always_images and not images:
            images, grids = [blank_image()], [self.inputs.grid(BLANK, BLANK)]
            branches.append(blank_branch(self.inputs, shared))
            labels += [IGNORED] * len(branches[-1].ids)
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
        """The length of the rows' common prefix, before any image and any loss; at least one token."""
        start = self.inputs.token_id[VISION_START]
        count = 0
        for column in zip(*(zip(row["input_ids"][:-1], row["labels"], strict=False) for row in rows), strict=False):
            token, label = column[0]
            if len(set(column)) > 1 or token == start or label != IGNORED:
                break
            count += 1
        return count


class LengthGrouped(torch.utils.data.Sampler[int]):
    """Samples rows of similar length together, in an order that depends on seed and epoch alone.

    Transformers' own sampler draws from the global generator, so a run resumed in its second epoch would
    read the first epoch's order.
    """

    def __init__(self, lengths: list[int], group_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self._lengths, self._group_size, self._seed, self._epoch = lengths, group_size, seed, epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + _EPOCH_STRIDE * self._epoch())
        return iter(get_length_grouped_indices(self._lengths, self._group_size, generator=generator))


class SupervisedOnlyTrainer(SFTTrainer):
    """TRL's trainer for packed micro-batches, with the language head run on supervised positions only.

    The loss is TRL's (mean over the batch's supervised tokens), with label words weighted `label_weight` times.
    TRL's fused head computes every position; without Triton, as on a CPU, it takes longer than the model itself.
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
        """The loss of a micro-batch; with `return_outputs` also the logits (supervised tokens, vocabulary).

        `num_items_in_batch` is the number of supervised tokens of the whole batch; None: that of the micro-batch.
        """
        inputs = dict(inputs)
        labels, predicts = inputs.pop("labels")[0], inputs.pop("predicts")
        targets = labels[len(labels) - len(predicts) :]
        supervised = targets != IGNORED
        targets, places = targets[supervised], predicts[supervised]
        # A hook, because wrappers (autocast, DDP, DeepSpeed) require that the whole model is called.
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
        """Load by `from_pretrained`: checkpoints use the released models' weight names, which it alone translates.

        A checkpoint of a run with sharded weights is in shards, which accelerate loads. Raises `DataError` if only one
        of checkpoint and run has sharded weights, or if the checkpoint cannot be read.
        """
        sharded = any(Path(resume_from_checkpoint).glob(f"{FSDP_MODEL_NAME}*"))
        if sharded != self.is_fsdp_enabled:
            raise DataError(
                f"{resume_from_checkpoint} was written with{'' if sharded else 'out'} sharded weights: "
                f"set sft.shard_weights: {str(sharded).lower()} to resume"
            )
        model = model or self.model
        with _readable(resume_from_checkpoint):
            if sharded:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            elif Path(resume_from_checkpoint, ADAPTER_WEIGHTS).is_file():
                load_adapter(model, Path(resume_from_checkpoint))
            else:
                saved = type(model).from_pretrained(resume_from_checkpoint, use_safetensors=True, dtype=model.dtype)
                model.load_state_dict(saved.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint:
            with _readable(checkpoint):
                super()._load_optimizer_and_scheduler(checkpoint)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        lengths = (train_dataset or self.train_dataset)["length"]
        # The rows of a whole step: their order must not depend on how many processes share it.
        group_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGrouped(list(lengths), group_size, self.args.seed, lambda: int(self.state.epoch or 0))


@contextmanager
def _readable(checkpoint: str) -> Iterator[None]:
    """Convert the errors of a broken checkpoint to `DataError`."""
    try:
        yield
    except (OSError, EOFError, LookupError, UnpicklingError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):  # not of the file
            raise
        raise DataError(
            f"{checkpoint} cannot be read: remove it, then run the same command to resume from the checkpoint before "
            "it, or from the start"
        ) from error


class StepReporter(TrainerCallback):
    """Calls `progress` with the optimizer steps done and their total, on the main process."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self._progress = progress

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Report the step that has ended."""
        if state.is_world_process_zero:
            self._progress(state.global_step, state.max_steps)


class PlainInputs(TrainerCallback):
    """Ends backward passes at the first trained layer, so that they skip a frozen vision tower, for example.

    Gradient checkpointing makes the outputs of the embeddings require gradients, which only its reentrant kind needs
    and which would extend backward passes through all frozen layers.
    """

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, model: Any = None, **_: Any) -> None:
        """Let the outputs of the embeddings require no gradients."""
        model.disable_input_require_grads()


class CurveReporter(TrainerCallback):
    """Reports the trainer's figures to the trackers; the callbacks of `report_to` would repeat steps after a resume."""

    def __init__(self, curves: LearningCurves) -> None:
        self._curves = curves

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Report the figures of a step."""
        self._curves.log(rewrite_logs(logs), state.global_step)


def sft_config(section: SftSection, output: Path, seed: int, use_cpu: bool, show_bar: bool = True) -> SFTConfig:
    """TRL's settings for the paper's loss: cross-entropy on the assistant's tokens, no packing, no truncation.

    `show_bar` shows the trainer's progress bar if stderr is a terminal. Raises `RecipeError` if the launch's processes
    cannot share a batch.
    """
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
        gradient_accumulation_steps=section.accumulated(process_count()),
        bf16=section.precision == "bf16",
        gradient_checkpointing=section.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=True,  # an all-text batch leaves the vision tower without gradients
        ddp_timeout=int(PATIENCE.total_seconds()),
        deepspeed=deepspeed_settings(section),
        # A launch with FSDP by accelerate's configuration has its settings in the environment.
        fsdp=section.shard_weights and process_count() > 1,
        fsdp_config=dict(_SHARDING),
        # Otherwise every rank would hold the whole gradient until the last of the accumulated passes.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": shards_weights(section)}},
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
        report_to=[],  # see `CurveReporter`
        disable_tqdm=not (show_bar and sys.stderr.isatty()),
        dataloader_pin_memory=not use_cpu,
        dataloader_num_workers=0 if use_cpu else _WORKERS,
    )


def deepspeed_settings(section: SftSection) -> dict[str, Any] | None:
    """DeepSpeed's configuration; ZeRO stage 3 gets the key without which no folder would hold whole weights."""
    if section.deepspeed is None or not section.zero_3:
        return section.deepspeed
    gathering = {"stage3_gather_16bit_weights_on_model_save": True}
    return {**section.deepspeed, "zero_optimization": {**section.deepspeed["zero_optimization"], **gathering}}


def build_trainer(
    model: Any,
    rows: Sequence[TokenRow],
    inputs: QwenInputs,
    config: SFTConfig,
    folder: Path,
    label_weight: float = 1.0,
) -> SupervisedOnlyTrainer:
    """The trainer, ready to run; `folder` holds the tokenizer.

    Trainable weights held in bf16 get fp32 copies; DeepSpeed has its own.
    """
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=END_OF_TURN, pad_token=END_OF_TEXT
    )
    dataset = Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in rows],
            "labels": [row.labels for row in rows],
            "image_paths": [list(row.images) for row in rows],
            "length": [len(row.input_ids) for row in rows],
        }
    )
    use_shared_prefix(model)
    if config.device.type != "cpu":
        use_one_call(model.model.visual)
    optimizer = None
    trainable = (parameter for parameter in model.parameters() if parameter.requires_grad)
    if not config.deepspeed and any(parameter.dtype == torch.bfloat16 for parameter in trainable):
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
    trainer.add_callback(PlainInputs)
    trainer.remove_callback(PrinterCallback)  # without a bar it would print every log to stdout
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        trainer.data_collator = Collator(inputs, always_images=True)
    # Qwen2.5-VL does not accept `num_items_in_batch`, but `compute_loss` does; without it short micro-batches would
    # weigh as much as long ones.
    trainer.model_accepts_loss_kwargs = True
    trainer.label_weight = label_weight
    trainer.label_tokens = tuple(token for word in CANDIDATES for token in inputs.tokens(word))
    return trainer
