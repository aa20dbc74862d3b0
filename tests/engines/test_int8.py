"""Weights stored as int8: their error, and the files that are refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from guardreasoner_vl.engines import int8
from guardreasoner_vl.engines.int8 import INT8_WEIGHTS, METADATA, SCALE, dequantised, quantised
from guardreasoner_vl.training.compact import compact
from tests.engines.test_model_files import changed_json, refusal_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.slow
TYPES = (torch.bfloat16, torch.float16, torch.float32)
BF16_ROUNDING = 2**-8
PROJECTION = "model.layers.0.mlp.down_proj.weight"


@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    columns=st.integers(1, 80),
    exponent=st.integers(-40, 30),
    dtype=st.sampled_from(TYPES),
)
def test_a_weight_is_off_by_half_a_step_at_most(
    seed: int, rows: int, columns: int, exponent: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    sizes = torch.rand(rows, 1, dtype=torch.float64) * 10.0**exponent
    weight = (torch.randn(rows, columns, dtype=torch.float64) ** 3 * sizes).to(dtype).nan_to_num()
    weight[0] = 0
    numbers, scale = quantised(weight)
    assert (numbers.dtype, numbers.shape) == (torch.int8, weight.shape)
    assert (scale.dtype, scale.shape) == (torch.bfloat16, (rows, 1))
    assert numbers.abs().max() <= 127
    step, exact = scale.double(), weight.double()
    in_fp32, in_bf16 = (dequantised(numbers, scale, kind).double() for kind in (torch.float32, torch.bfloat16))
    within = step / 2 + exact.abs() * 1e-6  # fp32 divides and multiplies
    assert ((in_fp32 - exact).abs() <= within).all()
    assert ((in_bf16 - exact).abs() <= within + in_bf16.abs() * BF16_ROUNDING).all()
    assert (in_bf16[0] == 0).all()


def test_the_largest_weight_of_a_row_takes_the_whole_range() -> None:
    numbers, scale = quantised(torch.tensor([[0.5, -2.0, 0.0, 1.0], [3e-5, 0.0, 0.0, -1e-5]]))
    assert numbers.tolist() == [[32, -127, 0, 64], [127, 0, 0, -42]]
    assert scale.tolist() == [[0.0157470703125], [2.3655593395233154e-07]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_computed_in_fp32_for_any_number_of_rows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    numbers, scale = quantised(torch.randn(11, 300))
    expected = (numbers.double() * scale.double()).float().to(dtype)
    for at_once in (1, 300, 1300, 3300, 32768):
        monkeypatch.setattr(int8, "_AT_ONCE", at_once)
        assert torch.equal(dequantised(numbers, scale, dtype), expected)


def test_the_error_of_normal_weights_is_below_a_hundredth() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 576)
    error = (dequantised(*quantised(weight), torch.float32) - weight).norm() / weight.norm()
    assert 0.006 < error < 0.01


# --- refused files ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    compact(tiny_model, tmp_path / "int8")
    return tmp_path / "int8"


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], metadata: dict[str, str]) -> str:
    """The error for a folder whose weights were changed."""
    weights = load_file(folder / INT8_WEIGHTS)
    change(weights)
    save_file(weights, folder / INT8_WEIGHTS, metadata)
    return refusal_of(folder)


def replaced(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda weights: weights.update({name: make(weights[name]).contiguous()})


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in names:
            del weights[name]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(PROJECTION + SCALE), ("1 weights without a scale", PROJECTION, "download it again")),
        (without(PROJECTION), ("1 weights without a scale", PROJECTION)),
        (replaced(PROJECTION, torch.Tensor.bfloat16), ("1 weights without a scale", PROJECTION)),
        (replaced(PROJECTION + SCALE, torch.t), (PROJECTION, "one finite scale per row")),
        (replaced(PROJECTION + SCALE, lambda scale: scale[:-1]), (PROJECTION, "one finite scale per row")),
        (replaced(PROJECTION + SCALE, lambda scale: scale * torch.nan), (PROJECTION, "one finite scale per row")),
        (replaced(PROJECTION, torch.flatten), (PROJECTION, "one finite scale per row")),
        (without(PROJECTION, PROJECTION + SCALE), ("1 weights are missing", "down_proj", "download it again")),
        (without("model.norm.weight"), ("1 weights are missing", "norm.weight")),
        (replaced(PROJECTION, lambda numbers: numbers[:, :-1]), ("download it again",)),
    ],
)
def test_weights_that_do_not_fill_the_model_are_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], words: tuple[str, ...]
) -> None:
    said = changed(folder, change, METADATA)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"storage": "int4-groups"}, {**METADATA, "groups": "64"}])
def test_another_scheme_is_refused(folder: Path, metadata: dict[str, str]) -> None:
    assert "update guardreasoner-vl" in changed(folder, lambda _: None, metadata)


def test_a_broken_file_is_refused(folder: Path) -> None:
    whole = (folder / INT8_WEIGHTS).read_bytes()
    for content in (b"", whole[:1000], whole[:-1], b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"):
        (folder / INT8_WEIGHTS).write_bytes(content)
        assert "cannot be loaded" in refusal_of(folder)


def test_another_shape_in_the_configuration_is_refused(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text("utf-8"))["text_config"]
    changed_json(folder / "config.json", text_config=text | {"intermediate_size": 96})
    assert "download it again" in refusal_of(folder)
