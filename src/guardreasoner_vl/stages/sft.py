"""Reasoning SFT, the cold start (paper, section 3.2).

    L = -E log P(R, Y | Q, X, S)

Cross-entropy on the assistant's tokens: reasoning R and labels Y, given the instruction Q, the request X
and the response S.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.errors import DataError, MissingExtraError, RecipeError
from guardreasoner_vl.images.sizes import STORE, ImageSizes
from guardreasoner_vl.recipe.run_dir import open_run_dir
from guardreasoner_vl.storage.atomic import write_json
from guardreasoner_vl.storage.resume import check_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from trl import SFTConfig

    from guardreasoner_vl.engines.qwen import QwenInputs
    from guardreasoner_vl.images.geometry import PixelBudget
    from guardreasoner_vl.recipe import ReadingSection, Recipe
    from guardreasoner_vl.sources.mixture import Mixture
    from guardreasoner_vl.sources.skipped import SkippedRows
    from guardreasoner_vl.training.sft_data import TokenRows
    from guardreasoner_vl.training.sft_trainer import SupervisedOnlyTrainer
    from guardreasoner_vl.types import Sample

_log = logging.getLogger(__name__)
_CHECKPOINT_PARTS = (
    (
        "model.safetensors",
        "model.safetensors.index.json",
        "adapter_model.safetensors",
        "pytorch_model_fsdp_0/.metadata",
    ),
    ("optimizer.pt", "global_step*", "optimizer.bin", "optimizer_0/.metadata"),  # DeepSpeed's, and FSDP's two kinds
    ("scheduler.pt",),
    ("rng_state*.pth",),
)
_TOKENIZER_TEXTS = 40_000
BEGUN_WITH = "begun_with.json"


@dataclass(frozen=True)
class SftReport:
    """The training set: rows, tokens, supervised tokens, rows by source, and skipped rows by reason."""

    rows: int
    tokens: int
    supervised_tokens: int
    by_source: dict[str, int]
    skipped: dict[str, int]


def run(recipe: Recipe, data: Path, out: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """Train and return the folder of the finished model (`out/sft/model`).

    Resumes from the last checkpoint in `out`. `data` holds the recipe's sources, or is a corpus (`curate`). `progress`
    receives the optimizer steps done and their total, and replaces the trainer's own bar on a terminal. Raises
    `RecipeError` if `out` holds another recipe, the recipe needs DeepSpeed and it is not installed or no launcher
    started this process, it leaves no layer to train, or the devices cannot share a batch, `DataError` if no row can be
    trained on, the disk is full, another process works in `out`, or the run there began with another model or other
    rows, `GuardError` if several GPUs are visible and no launcher started this process.
    """
    try:
        from guardreasoner_vl.training.launch import check_deepspeed, check_launch
        from guardreasoner_vl.training.sft_trainer import sft_config
        from guardreasoner_vl.training.trackers import check_installed
    except ImportError as error:
        raise MissingExtraError("trl", "train") from error
    check_launch()
    check_installed(recipe.tracker)
    check_deepspeed(recipe.sft)
    folder = out / "sft"
    finished = folder / "model"
    config = sft_config(recipe.sft, folder, recipe.seed, use_cpu=not _accelerator(), show_bar=progress is None)
    with ExitStack() as stack:
        with config.main_process_first(local=False):  # it writes recipe, images and base model for the others
            stack.enter_context(open_run_dir(out, recipe, "sft"))
            if (finished / "model.safetensors").is_file():
                _log.info("%s is finished already", finished)
                return finished
            folder.mkdir(exist_ok=True)
            mixture = _mixture(recipe, data, out)
            if not mixture.train:
                raise _nothing(data, mixture.skipped)
            base = _base_model(recipe, mixture.train, out / "base")
            sizes = ImageSizes(out / STORE)
            sizes.measure(path for row in mixture.train for path in row.images)
        _train(recipe, data, mixture, base, folder, config, sizes, progress)
    return finished


def _train(
    recipe: Recipe,
    data: Path,
    mixture: Mixture,
    base: Path,
    folder: Path,
    config: SFTConfig,
    sizes: ImageSizes,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Train on the mixture, resuming from the last checkpoint, and write the finished model."""
    from guardreasoner_vl.training.launch import peers_alive
    from guardreasoner_vl.training.lora import load_trainable
    from guardreasoner_vl.training.model_folder import freeze_first_layers, written
    from guardreasoner_vl.training.sft_trainer import CurveReporter, StepReporter, build_trainer
    from guardreasoner_vl.training.trackers import LearningCurves

    inputs = _inputs(recipe, base)
    rows = _token_rows(recipe, mixture.train, inputs, sizes)
    rows.skipped.merge(mixture.skipped)
    if not rows.rows:
        raise _nothing(data, rows.skipped)
    checkpoint = last_checkpoint(folder)
    if config.process_index == 0 or checkpoint:
        if not checkpoint:
            (folder / BEGUN_WITH).unlink(missing_ok=True)
        check_inputs(folder / BEGUN_WITH, "an SFT run", _begun_with(mixture.train, rows, base))
    write_json(folder / "data.json", asdict(_report(rows)))
    model = load_trainable(base, recipe, "sft")
    freeze_first_layers(model, recipe.sft.freeze_layers)
    trainer = build_trainer(model, rows.rows, inputs, config, base, recipe.sft.label_weight)
    if progress:
        trainer.add_callback(StepReporter(progress))
    with peers_alive(), written(folder), ExitStack() as stack:
        if config.process_index == 0:
            first = int(checkpoint.rpartition("-")[2]) + 1 if checkpoint else 0
            trainer.add_callback(CurveReporter(stack.enter_context(LearningCurves(recipe, "sft", folder, first))))
        trainer.train(resume_from_checkpoint=checkpoint)
        _save(trainer, recipe, base, folder / "model", inputs.budget if recipe.base.limits_pixels else None)
    trainer.accelerator.wait_for_everyone()


def _begun_with(samples: Sequence[Sample], rows: TokenRows, base: Path) -> dict[str, str]:
    """Digests that a resumed run must share: of the start model, and of the rows as read and as tokens."""
    from guardreasoner_vl.engines.model_files import folder_digest
    from guardreasoner_vl.sources.content import content_digest

    tokens = hashlib.sha256(content_digest(samples).encode())
    for row in rows.rows:
        tokens.update(json.dumps([list(row.input_ids), list(row.labels)]).encode())
    return {"weights": folder_digest(base), "rows": tokens.hexdigest()}


def _mixture(recipe: Recipe, data: Path, out: Path) -> Mixture:
    """The rows of the corpus `data`, or of the recipe's sources in the folder `data`."""
    from guardreasoner_vl.corpus.store import is_corpus, read_mixture
    from guardreasoner_vl.sources.mixture import build_mixture

    if is_corpus(data):
        mixture = read_mixture(data)
        mixture.train = [row for row in mixture.train if row.modality in recipe.data.modalities]
        return mixture
    if recipe.data.needs_curation:
        raise RecipeError(
            "data.duplicates and data.balance need a corpus: run `curate` first, then give its folder as --data"
        )
    return build_mixture(recipe.data, data, out / "data", recipe.seed)


def _nothing(data: Path, skipped: SkippedRows) -> DataError:
    return DataError(f"{data}: no row can be trained on (skipped: {skipped.reasons}); check data.sources")


def _base_model(recipe: Recipe, samples: Sequence[Sample], folder: Path) -> Path:
    """The folder of the start model; a new one is written to `folder` once and reused on resume."""
    from guardreasoner_vl.engines.model_files import resolve_folder
    from guardreasoner_vl.training.model_folder import emptied, move

    start, reading = recipe.base, recipe.base.reading
    start_folder = resolve_folder(start.path, start.revision) if start.path else None
    if start_folder and not reading:
        return start_folder
    if (folder / "model.safetensors").is_file():
        return folder
    partial = emptied(folder)
    if start.new:
        from guardreasoner_vl.training.small_model import write_new_model

        write_new_model(partial, _tokenizer_texts(samples), start.new, recipe.seed)
    if start.base:
        from guardreasoner_vl.training.pretrained_base import write_pretrained

        write_pretrained(partial, start.base, recipe.seed)
    if reading:
        texts = [sample.prompt for sample in samples if sample.prompt]
        _teach_reading(start_folder or partial, partial, recipe, reading, texts)
    move(partial, folder)
    return folder


def _inputs(recipe: Recipe, folder: Path) -> QwenInputs:
    """Tokenizer and image processor of the start model, with the recipe's limits on images."""
    from guardreasoner_vl.engines.qwen import QwenInputs
    from guardreasoner_vl.images.geometry import PixelBudget

    inputs, start = QwenInputs.from_folder(folder), recipe.base
    smallest, largest = inputs.budget.min_pixels, inputs.budget.max_pixels
    return replace(inputs, budget=PixelBudget(start.min_pixels or smallest, start.max_pixels or largest))


def _teach_reading(source: Path, partial: Path, recipe: Recipe, section: ReadingSection, texts: Sequence[str]) -> None:
    from guardreasoner_vl.training.model_folder import copy_texts, load_for_training
    from guardreasoner_vl.training.reading import learn_to_read
    from guardreasoner_vl.training.vision_attention import use_one_call

    model = load_for_training(source, recipe.sft.precision)
    if _accelerator():
        model.to("cuda")
        use_one_call(model.model.visual)
    bf16 = recipe.sft.precision == "bf16"
    read = learn_to_read(model, _inputs(recipe, source), section, texts, recipe.seed, autocast=bf16)
    write_json(partial.parent / "reading.json", {"images": section.images, "patches_read_rightly": read})
    model.save_pretrained(partial)
    copy_texts(source, partial)


def _tokenizer_texts(samples: Sequence[Sample]) -> list[str]:
    from guardreasoner_vl.protocol import TargetLabel
    from guardreasoner_vl.teachers.rules import explain

    step = max(1, len(samples) // _TOKENIZER_TEXTS)
    texts = []
    for sample in samples[::step]:
        reasoning = explain(
            sample, TargetLabel(sample.request_label or "None"), TargetLabel(sample.response_label or "None")
        )
        texts += [sample.prompt, sample.response or "", "".join(span.text for span in reasoning)]
    return texts


def _token_rows(recipe: Recipe, samples: Sequence[Sample], inputs: Any, sizes: ImageSizes) -> TokenRows:
    from guardreasoner_vl.training.sft_data import target_labels, tokenise

    section = recipe.sft
    return tokenise(
        samples,
        target_labels(samples),
        inputs,
        max_length=section.max_length,
        without_reasoning=section.without_reasoning,
        teacher=section.teacher,
        seed=recipe.seed,
        sizes=sizes,
    )


def _report(rows: TokenRows) -> SftReport:
    sources: dict[str, int] = {}
    for row in rows.rows:
        source = row.source
        sources[source] = sources.get(source, 0) + 1
    return SftReport(
        rows=len(rows.rows),
        tokens=sum(len(row.input_ids) for row in rows.rows),
        supervised_tokens=sum(label >= 0 for row in rows.rows for label in row.labels),
        by_source=sources,
        skipped=dict(rows.skipped.reasons),
    )


def _accelerator() -> bool:
    import torch

    return torch.cuda.is_available()


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; one that a kill left incomplete is ignored."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    whole = [path for path in checkpoints if _is_whole(path)]
    return str(whole[-1]) if whole else None


def _is_whole(checkpoint: Path) -> bool:
    """Whether all parts exist and the trainer's state, which is written last, can be read."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return all(any(any(checkpoint.glob(name)) for name in names) for names in _CHECKPOINT_PARTS)


def _save(
    trainer: SupervisedOnlyTrainer, recipe: Recipe, base: Path, finished: Path, budget: PixelBudget | None
) -> None:
    """Write the finished model, and before it the adapters if there are any."""
    from guardreasoner_vl.training.lora import ADAPTER, write_and_merge
    from guardreasoner_vl.training.model_folder import write_model

    model, start = trainer.accelerator.unwrap_model(trainer.model), recipe.base
    if recipe.lora and trainer.is_world_process_zero():
        name = start.path if start.path and not start.reading else str(base)
        write_and_merge(model, name, base, finished.with_name(ADAPTER), budget)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # a collective call if weights are sharded
    if trainer.is_world_process_zero():
        write_model(model, weights, base, finished, budget)
