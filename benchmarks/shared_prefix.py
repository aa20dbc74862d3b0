"""The update phase of GRPO with prompt and image once per group, against stock TRL, which repeats them.

    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=16000000000 MALLOC_TOP_PAD_=268435456    # see docs/training.md
    python -m benchmarks.shared_prefix --prompt 512 --completion 64 --image --group 16 --json
    python -m benchmarks.shared_prefix --grid [--memory]
    python -m benchmarks.shared_prefix --prompt 512 --completion 250 --longest 3072 --memory --json   # one runaway

One update is forward, clipped loss and backward on recorded rollouts: the same weights, prompts, images, completions
and advantages for both, fp32. Interleaved; medians. `ratio` is TRL's time over ours, `grad_rel_diff` the norm of the
gradients' difference over TRL's norm. `--memory` also runs each arm in a process of its own and gives what
its update adds to the memory at most. The model is the embedded guard, or --model DIR.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from guardreasoner_vl.engines.model_files import resolve_folder
from guardreasoner_vl.engines.qwen import IMAGE_PAD, QwenInputs
from guardreasoner_vl.images.decode import checked_images
from guardreasoner_vl.recipe import GrpoSection
from guardreasoner_vl.rl.reward import Reward
from guardreasoner_vl.rl.shared_prefix import use_shared_prefix
from guardreasoner_vl.training.grpo.rollouts import Rollout, RolloutGroup
from guardreasoner_vl.training.grpo.trl_parity import StockGrpo, compared
from guardreasoner_vl.training.grpo.update import Passes, PolicyNetwork, accumulate
from guardreasoner_vl.training.model_folder import load_for_training
from guardreasoner_vl.types import Sample

if TYPE_CHECKING:
    from collections.abc import Callable

    from guardreasoner_vl.recipe import Precision
    from guardreasoner_vl.types import CheckedImage

Arm = Literal["ours", "stock"]
PROMPTS, COMPLETIONS, GROUPS = (128, 512, 1024), (64, 256), (4, 16)
IMAGE_SHARE = 0.4
"""Approximate share of a prompt's tokens that belong to the image."""


@dataclass(frozen=True)
class Shape:
    """The measured shape: tokens of prompt and completion, with or without an image, completions per prompt.

    With `longest` one of the completions has so many tokens.
    """

    prompt: int
    completion: int
    image: bool
    group: int
    longest: int | None = None

    @property
    def lengths(self) -> list[int]:
        return [self.longest or self.completion, *[self.completion] * (self.group - 1)]


class Bench:
    """Both arms on one shape; `folder` holds the tokenizer of `model`."""

    def __init__(self, model: Any, folder: Path, shape: Shape, output: str, precision: Precision = "fp32") -> None:
        self.model = model.train()
        use_shared_prefix(self.model)
        self.policy = PolicyNetwork(self.model)
        inputs = QwenInputs.from_folder(folder)
        self.section = GrpoSection(group_size=shape.group, precision=precision, pass_tokens=1 << 20)
        self.passes = Passes(inputs, self.section, model.device)
        self.stock = StockGrpo(self.model, folder, inputs, self.section, Path(output))
        self.groups = [_group(inputs, shape)]

    def ours(self) -> None:
        self.passes.forget()
        passes = self.passes.of(self.groups, len(self.groups[0].completions))
        accumulate(self.policy, passes, None, 0.2, self.section)
        self.model.zero_grad()

    def theirs(self) -> None:
        torch.autograd.backward(self.stock.loss(self.groups, 0.2))
        self.model.zero_grad()


def _group(inputs: QwenInputs, shape: Shape) -> RolloutGroup:
    rng = np.random.default_rng(0)
    ids = [int(token) for token in rng.integers(300, 1200, shape.prompt)]
    images, grids = _checked_image(inputs, shape, rng) if shape.image else ((), [])
    for grid in grids:
        start, pad, end = (inputs.token_id[name] for name in ("<|vision_start|>", IMAGE_PAD, "<|vision_end|>"))
        placed = [start, *[pad] * inputs.pads(grid), end]
        ids[4 : 4 + len(placed)] = placed
    none = Reward(0, 0, 0, 0, 0)
    answers = [tuple(int(token) for token in rng.integers(300, 1200, length)) for length in shape.lengths]
    return RolloutGroup(
        Sample(id="recorded", source="random", modality="text", prompt="random"),
        inputs.encoded(ids, grids),
        images,
        tuple(Rollout(answer, none) for answer in answers),
        tuple(np.linspace(-1, 1.5, shape.group)),
    )


def _checked_image(
    inputs: QwenInputs, shape: Shape, rng: np.random.Generator
) -> tuple[tuple[CheckedImage, ...], list[tuple[int, int]]]:
    side = 28 * int((IMAGE_SHARE * shape.prompt) ** 0.5)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    (image,) = checked_images(buffer.getvalue())
    return (image,), [inputs.grid(image.height, image.width)]


def measure(folder: Path, shape: Shape, repeats: int) -> dict[str, Any]:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as output:
        bench = Bench(load_for_training(folder, "fp32"), folder, shape, output)
        parity = compared(bench.model, bench.stock, bench.passes, bench.groups, bench.section)
        shared, theirs = [], []
        for _ in range(repeats):
            shared.append(_timed(bench.ours))
            theirs.append(_timed(bench.theirs))
    first, second = statistics.median(shared), statistics.median(theirs)
    return {
        **asdict(shape),
        "ours_s": round(first, 4),
        "stock_s": round(second, 4),
        "ratio": round(second / first, 3),
        "grad_rel_diff": parity.gradient,
        "logprob_diff": parity.log_probability,
    }


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def memory(arguments: argparse.Namespace, shape: Shape) -> dict[str, float]:
    """Peak MB that an update adds, each arm in a separate process."""
    megabytes = {}
    for arm in ("ours", "stock"):
        options = [f"--prompt={shape.prompt}", f"--completion={shape.completion}", f"--group={shape.group}"]
        options += ["--image"] if shape.image else []
        options += [f"--longest={shape.longest}"] if shape.longest else []
        command = [sys.executable, "-m", "benchmarks.shared_prefix", f"--model={arguments.model}", *options]
        plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        done = subprocess.run([*command, f"--arm={arm}"], capture_output=True, text=True, check=True, env=plain)
        megabytes[f"{arm}_mb"] = float(done.stdout.split()[-1])
    return megabytes


def peak(folder: Path, shape: Shape, arm: Arm) -> float:
    """Peak MB that one update of this arm adds to the process, sampled every 2 ms."""
    with tempfile.TemporaryDirectory() as output:
        bench = Bench(load_for_training(folder, "fp32"), folder, shape, output)
        work = bench.ours if arm == "ours" else bench.theirs
        before = largest = _resident()
        worker = threading.Thread(target=work)
        worker.start()
        while worker.is_alive():
            largest = max(largest, _resident())
            time.sleep(0.002)
        return (largest - before) / 1e6


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--image", action="store_true")
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--longest", type=int, help="tokens of one completion, such as a runaway's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one line for one shape")
    parser.add_argument("--grid", action="store_true", help="all shapes, as a table")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--arm", choices=("ours", "stock"), help="print this arm's peak memory alone")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = resolve_folder(arguments.model, None)
    single = Shape(arguments.prompt, arguments.completion, arguments.image, arguments.group, arguments.longest)
    if arguments.arm:
        print(peak(folder, single, arguments.arm))
        return
    shapes = [single]
    if arguments.grid:
        shapes = [Shape(*values) for values in itertools.product(PROMPTS, COMPLETIONS, (False, True), GROUPS)]
        print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, model {arguments.model}")
        print("| prompt | completion | image | G | ours s | stock TRL s | ratio | gradient apart | MB, ours / TRL |")
        print("|---|---|---|---|---|---|---|---|---|")
    for shape in shapes:
        row = measure(folder, shape, arguments.repeats)
        if arguments.memory:
            row |= memory(arguments, shape)
        print(_line(row) if arguments.grid else json.dumps(row), flush=True)


def _line(row: dict[str, Any]) -> str:
    used = f"{row['ours_mb']:.0f} / {row['stock_mb']:.0f}" if "ours_mb" in row else ""
    cells = (
        row["prompt"],
        row["completion"],
        "yes" if row["image"] else "no",
        row["group"],
        f"{row['ours_s']:.3f}",
        f"{row['stock_s']:.3f}",
        f"{row['ratio']:.2f}",
        f"{row['grad_rel_diff']:.0e}",
        used,
    )
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
