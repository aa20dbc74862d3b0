"""Training of the paper's sizes on one GPU: speed, share of its peak, and memory beside the plan; random weights.

    python -m benchmarks.gpu --shape 3b --gpu h100 --out gpu.json    # never run: it is for a GPU of 80 GB
    python -m benchmarks.gpu                                          # the toy shape, seconds on a CPU

Three parts, with bf16 weights and fp32 copies in AdamW (`precision: bf16-weights`):

- SFT: an optimizer step on rows of one length, a quarter of whose tokens are supervised;
- RL: an update of one group, prompt and image once, beside stock TRL, which repeats them (the toy shape: fp32);
- memory: the peak of PyTorch's allocator in an SFT step beside what `--plan` computes, both without the image.

All with gradient checkpointing, but for the toy shape's update. What runs out of memory "does not fit", and the rest
goes on.
`share` counts 6 FLOPs for each weight of the decoder and token, and for each weight of the head and supervised token,
over the GPU's published peak: attention, vision tower and recomputation are not counted, so it is a lower bound.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.shared_prefix import Bench, Shape
from guardreasoner_vl.engines.qwen import IMAGE_PAD, QwenInputs
from guardreasoner_vl.pipeline import memory
from guardreasoner_vl.pipeline.capacity import DEVICES, shape_of
from guardreasoner_vl.pipeline.plan import DOES_NOT_FIT, size_of_config
from guardreasoner_vl.pipeline.shapes import BASE_3B, BASE_7B, BASES
from guardreasoner_vl.recipe import NewModel, SftSection
from guardreasoner_vl.rl.shared_prefix import Branch, Tree, completion, log_probabilities, pack, use_shared_prefix
from guardreasoner_vl.training.master_adamw import MasterAdamW
from guardreasoner_vl.training.small_model import write_new_model

if TYPE_CHECKING:
    from collections.abc import Callable

Figures = dict[str, float | str]
"""Figures by name; `DOES_NOT_FIT` in place of the seconds of what ran out of the device's memory."""
ShapeName = Literal["3b", "7b", "toy"]

_TOY = {
    "text_config": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
    },
    "vision_config": {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128},
    "tie_word_embeddings": True,
}
SHAPES: dict[ShapeName, dict[str, Any]] = {"3b": BASES[BASE_3B], "7b": BASES[BASE_7B], "toy": _TOY}
WORK: dict[ShapeName, tuple[SftSection, Shape]] = {
    name: (SftSection(batch_size=6, max_length=1024, gradient_checkpointing=True), Shape(1024, 250, True, 16))
    for name in ("3b", "7b")
}
WORK["toy"] = SftSection(batch_size=2, max_length=128, gradient_checkpointing=True), Shape(64, 16, True, 4)
"""What is measured of each shape: SFT's micro-batch, and RL's group."""

REPEATS = 5
_SUPERVISED = 4  # one token in so many


def network_of(config: dict[str, Any], inputs: QwenInputs, device: torch.device, dtype: torch.dtype) -> Any:
    """A Qwen2.5-VL of these sizes with random weights, whose image tokens are those of `inputs`."""
    text = config["text_config"]
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    depth = config["vision_config"]["depth"]
    whole = {
        **config,
        "text_config": {**text, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": None},
        "vision_config": {
            **config["vision_config"],
            "fullatt_block_indexes": list(range(depth // 4 - 1, depth, max(1, depth // 4))) if depth >= 4 else [1],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
        },
        "image_token_id": inputs.token_id[IMAGE_PAD],
        "vision_start_token_id": inputs.token_id["<|vision_start|>"],
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    with torch.device(device):
        network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**whole)).to(dtype)
    network.config.use_cache = False
    return network


def fitting(work: Callable[[], Figures], name: str) -> Figures:
    """The figures of `work`, or that it, whose seconds are called `name`, does not fit the device's memory."""
    try:
        return work()
    except torch.OutOfMemoryError:
        return {name: DOES_NOT_FIT}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def timed(work: Callable[[], None], device: torch.device) -> float:
    """Median seconds of `REPEATS` calls, after one that is not counted."""
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def sft(name: ShapeName, inputs: QwenInputs, device: torch.device, peak: float | None) -> Figures:
    """Speed and memory of an optimizer step of SFT."""
    section = WORK[name][0].model_copy(update={"precision": "bf16-weights"})
    config = SHAPES[name]
    network = network_of(config, inputs, device, torch.bfloat16).train()
    use_shared_prefix(network)
    network.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = MasterAdamW(network.parameters(), 1e-5, (0.9, 0.999), 0.0)
    answer = section.max_length // _SUPERVISED
    prompt = section.max_length - answer
    generator = np.random.default_rng(0)
    rows = generator.integers(300, 1200, (section.batch_size, section.max_length)).tolist()
    positions = np.broadcast_to(np.arange(prompt), (3, prompt))
    trees = [Tree(Branch(row[:prompt], positions), (completion(row[prompt:], prompt),)) for row in rows]
    packed = pack(trees).to(device)

    def step() -> None:
        torch.autograd.backward(-log_probabilities(network, packed).mean())
        optimizer.step()
        optimizer.zero_grad()

    seconds = timed(step, device)
    tokens = section.batch_size * section.max_length
    planned = memory.of_sft(section, size_of_config(config), 1, 0)
    figures: Figures = {"seconds": seconds, "planned_gb": sum(planned.values()) / 1e9}
    if device.type == "cuda":
        figures["measured_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return {**figures, **speed(name, tokens, len(packed.targets), seconds, peak)}


def update(name: ShapeName, folder: Path, inputs: QwenInputs, device: torch.device, peak: float | None) -> Figures:
    """Speed of an update of one group by this package and by TRL, and what each adds to the memory at most.

    Tokens are those of the prompt, its image included, and of the answers, each counted once.
    """
    shape, exact = WORK[name][1], name == "toy"
    network = network_of(SHAPES[name], inputs, device, torch.float32 if exact else torch.bfloat16)
    if not exact:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    answers = sum(shape.lengths)
    tokens = shape.prompt + answers
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as output:
        bench = Bench(network, folder, shape, output, "fp32" if exact else "bf16-weights")
        for arm, work in (("ours", bench.ours), ("stock", bench.theirs)):
            figures |= fitting(partial(_arm, arm, work, device), f"{arm}_seconds")
            bench.model.zero_grad()  # of an arm that ran out of memory
    shared_prefix, stock = figures["ours_seconds"], figures["stock_seconds"]
    if isinstance(shared_prefix, float):
        figures |= speed(name, tokens, answers, shared_prefix, peak)
        if isinstance(stock, float):
            figures["ratio"] = stock / shared_prefix
    return figures


def _arm(name: str, work: Callable[[], None], device: torch.device) -> Figures:
    """One arm's seconds, and what it adds to the memory at most."""
    figures: Figures = {f"{name}_seconds": timed(work, device)}
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        figures[f"{name}_adds_gb"] = (torch.cuda.max_memory_allocated(device) - before) / 1e9
    return figures


def speed(name: ShapeName, tokens: int, supervised: int, seconds: float, peak: float | None) -> Figures:
    """Tokens a second, and the share of the GPU's `peak` in FLOP/s if that is known."""
    shape = shape_of(SHAPES[name])
    flops = 6 * (shape.matrices * tokens + shape.head * supervised)
    share = {} if peak is None else {"share": flops / seconds / peak}
    return {"tokens": tokens, "tokens_per_second": tokens / seconds, **share}


def measure(
    name: ShapeName,
    device: torch.device,
    gpu: str | None = None,
    tell: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """All parts; `gpu` names the published peak (`pipeline.capacity.DEVICES`). `tell` receives them after each one."""
    peak = DEVICES[gpu].flops if gpu else None
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    figures: dict[str, Any] = {"shape": name, "device": kind, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_new_model(folder, [str(number) for number in range(4000)], NewModel(vocab_size=2048), seed=0)
        inputs = QwenInputs.from_folder(folder)
        figures["sft"] = fitting(lambda: sft(name, inputs, device, peak), "seconds")
        tell(figures)
        figures["update"] = fitting(lambda: update(name, folder, inputs, device, peak), "ours_seconds")
        tell(figures)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="toy")
    parser.add_argument("--gpu", choices=tuple(DEVICES), help="whose published peak `share` is of")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON, too, after each part")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def write(figures: dict[str, Any]) -> None:
        if arguments.out:
            arguments.out.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")

    print(json.dumps(measure(arguments.shape, device, arguments.gpu, write), indent=2))


if __name__ == "__main__":
    main()
