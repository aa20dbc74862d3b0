"""Training rows per second of the SFT stage against stock TRL, on one small Qwen2.5-VL and made-up rows.

    python benchmarks/sft_speed.py [--repeats 3] [--steps 6]

Arms: TRL's trainer and collator on fp32 weights under bf16 autocast (its default way); ours, with the instruction once
in a micro-batch, no padding, and the head on supervised positions only; and ours on weights held in bf16 with fp32
copies in the optimizer (what recipes/embedded.yaml uses). The instruction takes 118 tokens, as the released
checkpoints' tokenizer cuts it. Same rows, same order. Medians of interleaved repeats.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from guardreasoner_vl.engines.qwen import END_OF_TEXT, QwenInputs
from guardreasoner_vl.images.sizes import ImageSizes
from guardreasoner_vl.protocol import INSTRUCTION
from guardreasoner_vl.recipe import NewModel, SftSection
from guardreasoner_vl.training.sft_data import IGNORED, TokenRow, target_labels, tokenise
from guardreasoner_vl.training.sft_trainer import build_trainer, sft_config
from guardreasoner_vl.training.small_model import write_new_model
from guardreasoner_vl.types import Sample

ARMS = ("TRL, autocast", "ours, autocast", "ours, bf16 weights")
INSTRUCTION_TOKENS, BATCH = 118, 24


def samples(count: int) -> list[Sample]:
    """Made-up requests of 1 to about 30 sentences."""
    sentence = "The old gardener told us how he waters the roses in the early morning. "
    return [
        Sample(
            id=str(number),
            source="made up",
            modality="text",
            prompt=f"Request {number}. " + sentence * (1 + number % 12),
            request_label="harmful" if number % 2 else "unharmful",
        )
        for number in range(count)
    ]


def pseudo_words(count: int = 30_000) -> list[str]:
    """Random words, so that the tokenizer fills its vocabulary and the language head has its real size."""
    rng = random.Random(0)
    return ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(4, 9))) for _ in range(count)]


def with_instruction(row: TokenRow, inputs: QwenInputs) -> TokenRow:
    """The row with the instruction, a single token in our own tokenizer, split into several tokens."""
    (whole,) = inputs.tokens(INSTRUCTION)
    at = row.input_ids.index(whole)
    tokens = random.Random(0).choices(range(300, 8000), k=INSTRUCTION_TOKENS)
    ids = [*row.input_ids[:at], *tokens, *row.input_ids[at + 1 :]]
    labels = [*row.labels[:at], *[IGNORED] * INSTRUCTION_TOKENS, *row.labels[at + 1 :]]
    return TokenRow(row.id, row.source, ids, labels)


def rows_per_second(arm: str, folder: Path, rows: list[TokenRow], inputs: QwenInputs, steps: int) -> float:
    """Rows per second over `steps` steps, after two warm-up steps."""
    precision: Literal["bf16", "bf16-weights"] = "bf16-weights" if arm.endswith("bf16 weights") else "bf16"
    section = SftSection(batch_size=BATCH, gradient_accumulation=1, precision=precision, learning_rate=1e-3)
    config = sft_config(section, folder / "run", seed=0, use_cpu=not torch.cuda.is_available())
    config.max_steps, config.save_strategy, config.report_to, config.disable_tqdm = steps + 2, "no", [], True
    dtype = torch.bfloat16 if precision == "bf16-weights" else torch.float32
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model", dtype=dtype)
    trainer: Any = build_trainer(model, rows, inputs, config, folder / "model")
    if arm == ARMS[0]:
        trainer.compute_loss = SFTTrainer.compute_loss.__get__(trainer)
        trainer.data_collator = DataCollatorForLanguageModeling(inputs.token_id[END_OF_TEXT])
    ended: list[float] = []
    step = trainer.training_step

    def clocked(*arguments: Any, **named: Any) -> Any:
        result = step(*arguments, **named)
        ended.append(time.perf_counter())
        return result

    trainer.training_step = clocked
    trainer.train()
    return BATCH * steps / (ended[-1] - ended[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads")
    rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        rows_of_text = samples(BATCH * (arguments.steps + 2))
        write_new_model(folder / "model", [row.prompt for row in rows_of_text] + pseudo_words(), NewModel(), seed=0)
        inputs = QwenInputs.from_folder(folder / "model")
        whole = tokenise(
            rows_of_text,
            target_labels(rows_of_text),
            inputs,
            max_length=2048,
            without_reasoning=0.4,
            teacher="rules",
            seed=0,
            sizes=ImageSizes(),
        ).rows
        rows = [with_instruction(row, inputs) for row in whole]
        for _ in range(arguments.repeats):
            for arm in ARMS:
                rates[arm].append(rows_per_second(arm, folder, rows, inputs, arguments.steps))
    medians = {arm: statistics.median(values) for arm, values in rates.items()}
    for arm, median in medians.items():
        print(f"  {arm:32} {median:8.1f} rows/s   {median / medians[ARMS[0]]:5.2f}x")


if __name__ == "__main__":
    main()
