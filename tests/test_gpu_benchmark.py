"""The benchmark for one GPU, run on the CPU at its toy shape."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import SHAPES, WORK, ShapeName, measure, network_of
from benchmarks.shared_prefix import Bench

pytestmark = pytest.mark.slow


class AnyToken:
    """The token ids of any tokenizer, as `network_of` asks for them."""

    token_id = dict.fromkeys(("<|image_pad|>", "<|vision_start|>"), 7)


def test_every_part_is_measured_at_the_toy_shape() -> None:
    figures = measure("toy", torch.device("cpu"))
    section, _ = WORK["toy"]

    assert figures["sft"]["tokens"] == section.batch_size * section.max_length
    assert figures["sft"]["tokens_per_second"] == pytest.approx(figures["sft"]["tokens"] / figures["sft"]["seconds"])
    assert figures["update"]["ratio"] == pytest.approx(
        figures["update"]["stock_seconds"] / figures["update"]["ours_seconds"]
    )
    prompt, answer, group = WORK["toy"][1].prompt, WORK["toy"][1].completion, WORK["toy"][1].group
    assert figures["update"]["tokens"] == prompt + group * answer
    assert figures["update"]["tokens_per_second"] * figures["update"]["ours_seconds"] == pytest.approx(
        figures["update"]["tokens"]
    )
    assert all(math.isfinite(value) for part in ("sft", "update") for value in figures[part].values())


def test_an_arm_that_runs_out_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("as a GPU reports it")

    monkeypatch.setattr(gpu, "REPEATS", 1)
    monkeypatch.setattr(gpu, "sft", too_large)
    monkeypatch.setattr(Bench, "theirs", too_large)
    figures = measure("toy", torch.device("cpu"))
    assert figures["sft"] == {"seconds": "does not fit"}
    assert figures["update"]["stock_seconds"] == "does not fit"
    assert figures["update"]["ours_seconds"] > 0
    assert "ratio" not in figures["update"]


def test_each_part_is_written_before_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "sft", lambda *_: {"seconds": 1.0})
    monkeypatch.setattr(gpu, "update", interrupted)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert (written["shape"], written["sft"]) == ("toy", {"seconds": 1.0})
    assert "update" not in written


@pytest.mark.parametrize(("name", "checkpointing"), [("toy", False), ("3b", True), ("7b", True)])
def test_both_arms_of_the_papers_sizes_recompute(
    name: ShapeName, checkpointing: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a toy network; a bench that is not measured."""
    networks: list[Any] = []

    def bench(network: Any, *_: Any) -> Any:
        networks.append(network)
        raise torch.OutOfMemoryError

    monkeypatch.setitem(SHAPES, name, SHAPES["toy"])
    monkeypatch.setattr(gpu, "Bench", bench)
    inputs: Any = AnyToken()
    with pytest.raises(torch.OutOfMemoryError):
        gpu.update(name, tmp_path, inputs, torch.device("cpu"), None)
    (network,) = networks
    assert network.is_gradient_checkpointing == checkpointing


@pytest.mark.parametrize(("name", "billions"), [("3b", 3.75), ("7b", 8.29)])
def test_the_networks_have_the_paper_models_sizes(name: ShapeName, billions: float) -> None:
    inputs: Any = AnyToken()

    network = network_of(SHAPES[name], inputs, torch.device("meta"), torch.bfloat16)

    assert sum(parameter.numel() for parameter in network.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert network.config.vision_config.fullatt_block_indexes == [7, 15, 23, 31]
    assert network.config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
