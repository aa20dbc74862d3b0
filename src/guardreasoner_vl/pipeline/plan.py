"""The plan of a run, without running it: steps, batches, commands, memory and hours (`pipeline.memory`, `.hours`)."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.corpus.store import is_corpus, read_info
from guardreasoner_vl.errors import GuardError
from guardreasoner_vl.pipeline import memory
from guardreasoner_vl.pipeline.capacity import device_of, shape_of
from guardreasoner_vl.pipeline.hours import Machine, answer_seconds, batch_seconds, sft_seconds
from guardreasoner_vl.pipeline.memory import Memory, ModelSize, Stack
from guardreasoner_vl.pipeline.run import STAGES, TRAINING
from guardreasoner_vl.pipeline.shapes import BASES
from guardreasoner_vl.rl.clipping import bound

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from guardreasoner_vl.pipeline.capacity import Device, ModelShape
    from guardreasoner_vl.recipe import GrpoSection, LoraSection, MineSection, Recipe, SftSection

GPU_MEMORY = 80
"""Memory of each GPU in GB of 10^9 bytes: a card sold as 80 GB has 85.9, of which CUDA and NCCL take the rest."""


DOES_NOT_FIT = "does not fit"
"""Words of a plan with a stage that needs more memory than the GPUs have."""

_LAUNCHER = "on one GPU set sft.deepspeed: null, or start this stage with `torchrun --nproc-per-node 1 --no-python`"


def plan_of(
    recipe: Recipe,
    path: Path,
    data: Path,
    out: Path,
    stages: Sequence[str],
    gpus: int = 0,
    gpu_memory: int = GPU_MEMORY,
    gpu: str | None = None,
) -> str:
    """The plan as text: the work of each stage in `out` with the sources in `data`, and the commands that run it.

    With `gpus` it tells whether a stage fits `gpu_memory` GB, and if not, which change of the recipe would make it fit.
    With `gpu`, a name or peaks as `pipeline.capacity.device_of` reads them, it computes hours. Raises `RecipeError` if
    the recipe trains nothing, or the GPUs cannot share a batch, `ModelError` if the start model's folder holds another
    kind of model, `InputError` for an unknown GPU, `EngineError` for one that does not hold the weights.
    """
    limit = gpu_memory * 1e9 if gpus else None
    plan = _RunPlan(recipe, out, max(1, gpus), limit, model_size(recipe), _gpu(recipe, gpu) if gpu else None)
    lines = [f"recipe {recipe.name}, seed {recipe.seed}, run folder {out}", plan.model()]
    lines += [f"{stage}: {line}" for stage in stages for line in getattr(plan, stage)()]
    return "\n".join([*lines, "", *commands(path, data, out, stages, gpus)])


def model_size(recipe: Recipe) -> ModelSize | None:
    """The model's size by its configuration; None if the model is not on this machine and not a known base."""
    config = _model_config(recipe)
    return None if config is None else size_of_config(config, recipe.lora)


def size_of_config(config: Mapping[str, Any], lora: LoraSection | None = None) -> ModelSize:
    """The size of the Qwen2.5-VL of this configuration.

    With `lora` and no adapter in the tower, the tower keeps the activations of one block at a time.
    """
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from guardreasoner_vl.training.lora import adapter_size, adapts_tower

    with torch.device("meta"):
        network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    text, vision = network.config.text_config, network.config.vision_config
    tower, decoder, embedding = network.model.visual, network.model.language_model, network.get_input_embeddings()
    tied = network.lm_head.weight is embedding.weight
    blocks = 1 if lora and not adapts_tower(lora) else vision.depth
    alone = [*tower.blocks, *decoder.layers, *([] if tied else [embedding])]
    return ModelSize(
        _parameters(network),
        _parameters(decoder.layers[0]),
        _parameters(network) - sum(map(_parameters, alone)),
        Stack(
            text.num_hidden_layers,
            text.hidden_size,
            text.intermediate_size,
            text.num_key_value_heads * text.hidden_size // text.num_attention_heads,
        ),
        Stack(blocks, vision.hidden_size, vision.intermediate_size, vision.hidden_size),
        text.vocab_size,
        adapter_size(network, lora) if lora else 0,
    )


def commands(path: Path, data: Path, out: Path, stages: Sequence[str], gpus: int) -> list[str]:
    """Shell commands to copy: one process, or `accelerate launch` for the stages that train on several GPUs."""
    lines = []
    runs: list[list[str]] = []
    for stage in (name for name in STAGES if name in stages):
        same_run = runs and stage not in TRAINING and runs[-1][-1] not in TRAINING
        (runs[-1].append(stage) if same_run else runs.append([stage]))
    for run in runs if gpus > 1 else [[stage for part in runs for stage in part]]:
        words = ["guardreasoner-vl", "run", _argument(path)]
        words += [] if data == Path() else ["--data", _argument(data)]
        words += ["--out", _argument(out)]
        words += [] if run == list(STAGES) else ["--stages", ",".join(run)]
        if gpus > 1 and run[0] in TRAINING:
            words = ["accelerate", "launch", "--num_processes", str(gpus), "--no_python", *words]
        lines.append(shlex.join(words))
    return lines


def _argument(path: Path) -> str:
    """The path, with a leading `./` if a command would take it for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _model_config(recipe: Recipe) -> dict[str, Any] | None:
    from transformers import AutoConfig

    from guardreasoner_vl.engines.model_files import check_folder, resolve_folder
    from guardreasoner_vl.training.small_model import text_sizes, vision_sizes

    base = recipe.base
    if base.new:
        text, vision = base.new.text, base.new.vision
        return {
            "text_config": {
                **text_sizes(text, base.new.vocab_size),
                "bos_token_id": None,
                "eos_token_id": None,
            },
            "vision_config": vision_sizes(vision, text),
            "tie_word_embeddings": True,
        }
    if base.base:
        return None
    try:
        folder = resolve_folder(str(base.path), base.revision)
    except GuardError:
        return BASES.get(str(base.path))
    check_folder(folder)
    config: dict[str, Any] = AutoConfig.from_pretrained(folder).to_dict()
    return config


@dataclass(frozen=True)
class _Gpu:
    """The kind of GPU that hours are computed for, and the model's shape there."""

    name: str
    device: Device
    shape: ModelShape
    adapters: bool

    def machine(self, count: int) -> Machine:
        return Machine(self.device, count, self.shape, self.adapters)

    def line(self, work: str, count: int, each: str, unit: str, total: str | None) -> str:
        whole = f", {total} in all" if total else ""
        machine = f"{count} x {self.name}"
        return f"{work}: {each} for {unit}{whole}, on {machine} at best; computed for typical rows, not measured"


def _gpu(recipe: Recipe, name: str) -> _Gpu | None:
    """The GPU of this name; None if the model's shape is not known."""
    device, config = device_of(name), _model_config(recipe)
    return None if config is None else _Gpu(name, device, shape_of(config), recipe.lora is not None)


@dataclass(frozen=True)
class _RunPlan:
    """The recipe and what is known about its run; one method describes each stage, by the stage's name."""

    recipe: Recipe
    out: Path
    gpus: int
    limit: float | None
    size: ModelSize | None
    gpu: _Gpu | None = None

    def model(self) -> str:
        start = self.recipe.base
        name = "new, random weights" if start.new else f"built from {start.base.path}" if start.base else start.path
        size = "not on this machine, size unknown" if self.size is None else _rounded_count(self.size.parameters)
        if self.size and self.size.adapters:
            size += f", adapters of {_rounded_count(self.size.adapters)}"
        return f"model {name}: {size}"

    def curate(self) -> list[str]:
        data = self.recipe.data
        names = [source.title for source in data.sources]
        sections = {
            "synthetic images": data.synthetic_images,
            "synthetic exchanges": data.synthetic_exchanges,
            "contrast rows": data.contrast,
        }
        synthetic = [f"{section.count:,} {name}" for name, section in sections.items() if section]
        rows = _row_count(self.out / "corpus")
        return [", ".join([*names, *synthetic]) + (f"; done, {rows:,} rows" if rows else "")]

    def synthesize(self) -> list[str]:
        section = self.recipe.synthesize
        teacher = (
            section.teacher if section.teacher == "rules" else f"{section.model} at {section.base_url or 'OpenAI'}"
        )
        limit = "" if section.max_cost is None else f", at most {section.max_cost:.2f} USD"
        return [f"{teacher}, {section.attempts} attempts a row{limit}"]

    def sft(self) -> list[str]:
        section = self.recipe.sft
        accumulated = section.accumulated(self.gpus)
        batch = section.batch_size * accumulated * self.gpus
        rows = _row_count(self.out / "corpus")
        steps = f"{int(section.epochs * rows / batch):,} steps" if rows else "steps: known once the corpus is made"
        arithmetic = f"{section.batch_size} rows x {accumulated} accumulated x {self.gpus} devices"
        return [
            f"{arithmetic} = {batch} rows a step; {section.epochs:g} epochs, {steps}",
            *([_LAUNCHER] if section.deepspeed and self.gpus == 1 else []),
            *self._sft_memory(section),
            *self._sft_hours(section, rows),
        ]

    def mine(self) -> list[str]:
        section, rows = self.recipe.mine, _row_count(self.out / "corpus")
        drawn = min(rows, section.limit or rows) if rows else section.limit
        total = f": {drawn:,} rows, {drawn * section.candidates:,} answers" if drawn else ""
        most = section.candidates * section.max_new_tokens
        line = f"{section.candidates} candidates a row{total}, at most {most:,} tokens a row; keeps {section.keep}"
        return [line, *self._mining_memory(section), *self._mining_hours(section, drawn)]

    def augment(self) -> list[str]:
        share, rows = self.recipe.augment.share, _row_count(self.out / "mine")
        joined = f": {round(rows * share / (1 - share)):,} pairs and {rows:,} hard rows" if rows else ""
        return [f"{share:.0%} of the RL set are joined pairs{joined}"]

    def grpo(self) -> list[str]:
        section, rows = self.recipe.grpo, _row_count(self.out / "augment")
        updates = section.rollout_batch // section.update_batch
        rollouts, step = section.rollout_batch * section.group_size, section.update_batch * section.group_size
        total = section.steps or (section.epochs * (rows // section.rollout_batch) if rows else None)
        steps = "rollout batches: known once the RL set is made"
        if total:
            bounds = ", ".join(
                f"B_{s} = {bound(section.clip, s, total):.4f}" for s in sorted({1, -(-total // 2), total})
            )
            steps = f"{total:,} rollout batches, {total * updates:,} updates; {bounds}"
        return [
            f"{section.rollout_batch} prompts x {section.group_size} = {rollouts:,} completions a rollout batch; "
            f"{section.update_batch} x {section.group_size} = {step:,} an update, {updates} updates a rollout batch",
            f"at most {rollouts * section.max_completion_length:,} tokens generated a rollout batch",
            steps,
            *self._grpo_memory(section),
            *self._grpo_hours(section, total),
        ]

    def evaluate(self) -> list[str]:
        section = self.recipe.evaluate
        names = ", ".join(section.benchmarks) or "the corpus's own test rows"
        return [f"{names}; mode {section.mode}"]

    def _sft_hours(self, section: SftSection, rows: int | None) -> list[str]:
        def seconds(machine: Machine, rows: float) -> float:
            return sft_seconds(machine, rows * section.epochs, section.gradient_checkpointing)

        return self._hours_of_rows("training", self.gpus, seconds, rows)

    def _mining_hours(self, section: MineSection, rows: int | None) -> list[str]:
        def seconds(machine: Machine, rows: float) -> float:
            return answer_seconds(machine, rows, section.candidates, section.max_rows)

        return self._hours_of_rows("answers", 1, seconds, rows)

    def _hours_of_rows(
        self, work: str, gpus: int, seconds: Callable[[Machine, float], float], rows: int | None
    ) -> list[str]:
        if self.gpu is None:
            return []
        machine = self.gpu.machine(gpus)
        total = duration(seconds(machine, rows)) if rows else None
        return [self.gpu.line(work, gpus, duration(seconds(machine, 1000)), "1,000 rows", total)]

    def _grpo_hours(self, section: GrpoSection, batches: int | None) -> list[str]:
        if self.gpu is None:
            return []
        answers, updates = batch_seconds(self.gpu.machine(self.gpus), section, section.rollouts.max_rows)
        each = f"{duration(answers)} of answers and {duration(updates)} of updates"
        total = duration(batches * (answers + updates)) if batches else None
        return [self.gpu.line("training", self.gpus, each, "a rollout batch", total)]

    def _sft_memory(self, section: SftSection) -> list[str]:
        size, limit, pixels = self.size, self.limit, self.recipe.base.max_pixels
        if size is None:
            return []

        def needed(section: SftSection) -> Memory:
            return memory.training_memory(lambda part: memory.of_sft(part, size, self.gpus, pixels), section, size)

        lines = [_memory_line("training", needed(section))]
        if limit is None:
            return lines
        if sum(needed(section).values()) <= limit:
            return [*lines, f"fits {_memory(limit)}"]
        remedy = memory.sft_remedy(section, lambda changed: sum(needed(changed).values()) <= limit, size, self.gpus)
        return [*lines, _too_large(limit, remedy)]

    def _mining_memory(self, section: MineSection) -> list[str]:
        size, limit = self.size, self.limit
        if size is None or section.base_url:
            return []
        needed = memory.of_mining(section, size)
        lines = [_memory_line(f"{section.max_rows} answers of the greatest length", needed)]
        if limit is None:
            return lines

        def fits(section: MineSection) -> bool:
            return sum(memory.of_mining(section, size).values()) <= limit

        if fits(section):
            return [*lines, f"fits {_memory(limit)}"]
        return [*lines, _too_large(limit, memory.mining_remedy(section, fits))]

    def _grpo_memory(self, section: GrpoSection) -> list[str]:
        size, limit, pixels = self.size, self.limit, self.recipe.base.max_pixels
        if size is None:
            return []

        def needed(section: GrpoSection) -> tuple[Memory, Memory]:
            vllm = memory.of_vllm(section, limit or GPU_MEMORY * 1e9)
            update = memory.training_memory(lambda part: memory.of_update(part, size, self.gpus, pixels), section, size)
            rows = section.rollouts.max_rows
            prompt = section.rollouts.max_tokens // rows
            rollouts = memory.training_memory(
                lambda part: memory.of_rollouts(part, size, self.gpus, rows, prompt), section, size
            )
            return update | vllm, rollouts | vllm

        def fits(section: GrpoSection) -> bool:
            if limit is None:
                return True
            vllm = sum(memory.of_vllm(section, limit).values())
            holds = section.rollouts.engine != "vllm-colocate" or vllm >= memory.vllm_needs(section, size)
            return holds and max(sum(part.values()) for part in needed(section)) <= limit

        update, rollouts = needed(section)
        by_vllm = section.rollouts.engine != "transformers"
        work = "rollouts by vLLM" if by_vllm else f"rollouts, {section.rollouts.max_rows} of the greatest length"
        lines = [_memory_line("an update", update), _memory_line(work, rollouts)]
        if by_vllm:
            lines.append(f"vLLM needs {_memory(memory.vllm_needs(section, size))} at least, more for answers at once")
        if limit is None:
            return lines
        if fits(section):
            return [*lines, f"fits {_memory(limit)}"]
        return [*lines, _too_large(limit, memory.grpo_remedy(section, fits, size, self.gpus))]


def _memory_line(work: str, parts: Memory) -> str:
    shares = ", ".join(f"{name} {_memory(amount)}" for name, amount in parts.items())
    return f"{work}: about {_memory(sum(parts.values()))} a GPU ({shares})"


def _too_large(limit: float, remedy: str | None) -> str:
    """The line of a stage that does not fit; no other line contains `DOES_NOT_FIT`."""
    change = f"set {remedy}" if remedy else "plan for more GPUs or for more memory, no key of the recipe is enough"
    return f"{DOES_NOT_FIT} {_memory(limit)}: {change}"


def duration(seconds: float) -> str:
    """Seconds in words, with two or three digits."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _row_count(folder: Path) -> int | None:
    return read_info(folder).rows if is_corpus(folder) else None


def _memory(amount: float) -> str:
    return f"{amount / 1e9:.1f} GB" if amount >= 1e9 else f"{amount / 1e6:.0f} MB"


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _rounded_count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B parameters" if parameters >= 1e8 else f"{parameters / 1e6:.1f} M parameters"
