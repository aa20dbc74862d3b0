"""The benchmark for one GPU, run on the CPU at its toy shape."""

import math
from typing import Any

import pytest
import torch

from benchmarks.gpu import SHAPES, WORK, ShapeName, measure, network_of

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


@pytest.mark.parametrize(("name", "billions"), [("3b", 3.75), ("7b", 8.29)])
def test_the_networks_have_the_paper_models_sizes(name: ShapeName, billions: float) -> None:
    inputs: Any = AnyToken()

    network = network_of(SHAPES[name], inputs, torch.device("meta"), torch.bfloat16)

    assert sum(parameter.numel() for parameter in network.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert network.config.vision_config.fullatt_block_indexes == [7, 15, 23, 31]
    assert network.config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
