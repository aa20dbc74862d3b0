"""A whole GRPO step (rollouts, rewards, two updates) against stock TRL with the same settings.

    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=16000000000 MALLOC_TOP_PAD_=268435456    # see docs/training.md
    python -m benchmarks.grpo_step [--steps 4] [--words 150] [--image]

The embedded guard in fp32, made-up exchanges of about `words` words, with a drawn image of 64 tokens each or without,
8 prompts x 16 completions a rollout, two updates of 64 completions, at most 64 new tokens, temperature 1.2, the same
reward. Medians of the steps after the first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, TrainerCallback
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer

from guardreasoner_vl.corpus.store import CorpusInfo, write_corpus
from guardreasoner_vl.engines.model_files import resolve_folder
from guardreasoner_vl.engines.qwen import END_OF_TEXT, END_OF_TURN, IMAGE_PAD, chat_text
from guardreasoner_vl.mining.rollout_io import rollout_request
from guardreasoner_vl.protocol import IMAGE, parse_verdict
from guardreasoner_vl.recipe import GrpoSection, Recipe
from guardreasoner_vl.rl.reward import reward
from guardreasoner_vl.sources.synthetic.phrases import phrase
from guardreasoner_vl.stages import grpo
from guardreasoner_vl.training.model_folder import load_for_training
from guardreasoner_vl.types import Sample

PROMPTS, GROUP, TOKENS = 8, 16, 64


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


class StillImages(Qwen2_5_VLProcessor):  # type: ignore[misc]
    """Qwen's processor without video support, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token, self.video_token = IMAGE_PAD, "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([IMAGE_PAD, "<|video_pad|>"])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def rows(count: int, words: int, folder: Path | None) -> list[Sample]:
    """Made-up exchanges of about that many words, each with an image in `folder`."""
    rng = random.Random(0)
    samples = []
    for number in range(count):
        phrases: list[str] = []
        while len(" ".join(phrases).split()) < words:
            phrases.append(phrase(rng, "unharmful"))
        prompt, response = ". ".join(phrases[: len(phrases) // 2]), ". ".join(phrases[len(phrases) // 2 :])
        labels: dict[str, Any] = {"request_label": "unharmful", "response_label": rng.choice(("harmful", "unharmful"))}
        images: tuple[str, ...] = ()
        if folder:
            images = (str(folder / f"{number}.png"),)
            Image.effect_noise((224, 224), rng.uniform(20, 80)).convert("RGB").save(images[0])
        samples.append(
            Sample(
                id=f"toy/{number}",
                source="toy",
                modality="text-image" if images else "text",
                prompt=prompt,
                response=response,
                images=images,
                **labels,
            )
        )
    return samples


def conversation(sample: Sample) -> list[dict[str, Any]]:
    """The row in TRL's form, with image placeholders."""
    messages = []
    for message in rollout_request(sample).messages:
        first, *rest = message.text.split(IMAGE)
        content: list[dict[str, Any]] = [{"type": "text", "text": first}]
        for text in rest:
            content += [{"type": "image"}, {"type": "text", "text": text}]
        messages.append({"role": message.role, "content": content})
    return messages


def section(steps: int) -> GrpoSection:
    return GrpoSection(
        group_size=GROUP,
        temperature=1.2,
        rollout_batch=PROMPTS,
        update_batch=PROMPTS // 2,
        max_prompt_length=900,
        max_completion_length=TOKENS,
        steps=steps,
        precision="fp32",
        save_every=1000,
        pass_tokens=1 << 20,
    )


def ours(folder: Path, samples: list[Sample], steps: int, work: Path) -> list[float]:
    """Seconds of each step."""
    write_corpus(work / "corpus", CorpusInfo(name="toy"), samples)
    seconds: list[float] = []
    grpo.run(
        Recipe(name="step", grpo=section(steps)),
        folder,
        work / "corpus",
        work / "run",
        progress=lambda step: seconds.append((step.row.rollout_seconds or 0.0) + (step.row.update_seconds or 0.0)),
    )
    return seconds


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Records when each optimizer step ended."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ended.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended.append(time.perf_counter())


def theirs(folder: Path, samples: list[Sample], steps: int, work: Path) -> list[float]:
    """Seconds of each step: a rollout and two updates."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=END_OF_TURN, pad_token=END_OF_TEXT, padding_side="left"
    )
    used = section(steps)
    by_id = {sample.id: sample for sample in samples}

    def rewards(completions: list[Any], completion_ids: list[list[int]], row: list[str], **_: Any) -> list[float]:
        end = tokenizer.eos_token_id
        totals = []
        for answer, ids, name in zip(completions, completion_ids, row, strict=True):
            text = answer if isinstance(answer, str) else answer[0]["content"]
            parsed = parse_verdict(text, True, True, "stop" if end in ids else "length")
            length = len(tokenizer(parsed.reasoning)["input_ids"]) if parsed.reasoning else 0
            totals.append(reward(parsed, by_id[name], length, TOKENS, used.reward).total)
        return totals

    config = GRPOConfig(
        output_dir=str(work / "trl"),
        loss_type="grpo",
        beta=0.0,
        scale_rewards="group",
        temperature=used.temperature,
        num_generations=GROUP,
        per_device_train_batch_size=PROMPTS * GROUP // 2,
        steps_per_generation=2,
        gradient_accumulation_steps=1,
        max_completion_length=TOKENS,
        max_steps=2 * steps,
        learning_rate=used.learning_rate,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    columns: dict[str, list[Any]] = {"row": [sample.id for sample in samples]}
    processing: Any = tokenizer
    if samples[0].images:
        shape = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        size = {"shortest_edge": shape.pop("min_pixels"), "longest_edge": shape.pop("max_pixels")}
        processing = StillImages(Qwen2VLImageProcessorPil(**shape, size=size), tokenizer, TEMPLATE)
        columns["prompt"] = [conversation(sample) for sample in samples]
        columns["images"] = [[Image.open(path) for path in sample.images] for sample in samples]
    else:
        columns["prompt"] = [chat_text(rollout_request(sample).messages) for sample in samples]
    clock = _Clock()
    trainer = GRPOTrainer(
        model=load_for_training(folder, "fp32"),
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=processing,
        callbacks=[clock],
    )
    trainer.train()
    return [clock.ended[number + 2] - clock.ended[number] for number in range(0, 2 * steps, 2)]


def elsewhere(arguments: argparse.Namespace) -> dict[str, Any]:
    """The version of TRL in another environment, and its seconds on the same rows."""
    command = [arguments.stock_python, "-m", "benchmarks.grpo_step", "--stock-only", "--model", arguments.model]
    command += ["--steps", str(arguments.steps), "--words", str(arguments.words), *["--image"] * arguments.image]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--words", type=int, default=150)
    parser.add_argument("--image", action="store_true")
    parser.add_argument(
        "--stock-python", metavar="PYTHON", help="run TRL with this interpreter, where another version is installed"
    )
    parser.add_argument("--stock-only", action="store_true", help="run TRL alone, and print its version and seconds")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = resolve_folder(arguments.model, None)
    with tempfile.TemporaryDirectory() as work:
        images = Path(work) if arguments.image else None
        samples = rows(PROMPTS * arguments.steps, arguments.words, images)
        if arguments.stock_only:
            print(json.dumps({"trl": version("trl"), "s": theirs(folder, samples, arguments.steps, Path(work))}))
            return
        stock = elsewhere(arguments) if arguments.stock_python else None  # first, while this process is small
        first = ours(folder, samples, arguments.steps, Path(work))
        second = stock["s"] if stock else theirs(folder, samples, arguments.steps, Path(work))
    medians = [statistics.median(one[1:]) for one in (first, second)]
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(
        json.dumps(
            {
                "machine": machine,
                "trl": stock["trl"] if stock else version("trl"),
                "words": arguments.words,
                "image": arguments.image,
                "ours_s": [round(one, 2) for one in first],
                "stock_s": [round(one, 2) for one in second],
                "ratio": round(medians[1] / medians[0], 2),
            }
        )
    )


if __name__ == "__main__":
    main()
