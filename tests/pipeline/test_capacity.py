"""The roofline, with numbers computed by hand for a tiny shape and a tiny device."""

from __future__ import annotations

from dataclasses import replace

import pytest

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.pipeline.capacity import (
    DEVICES,
    SHAPES,
    Device,
    ModelShape,
    Work,
    capacity,
    device_of,
    gpus_for,
    prefill_flops,
    shape_of,
)

TINY = ModelShape(
    layers=2,
    hidden=8,
    intermediate=16,
    heads=4,
    kv_heads=2,
    vocabulary=10,
    tied=True,
    vision_layers=1,
    vision_hidden=4,
    vision_intermediate=8,
)
DEVICE = Device(flops=1e6, bandwidth=1e5, memory=20_000, source="made up")
IMAGE = Work(prompt=10, completion=5, image=2, cached=4)
TEXT = replace(IMAGE, image=0)
MANY = 1_000


def test_weights() -> None:
    # A layer: queries and outputs 2 x 8 x 8, keys and values 2 x 8 x 4, three matrices of 8 x 16.
    assert TINY.keys == 4
    assert TINY.matrices == 2 * (128 + 64 + 384)
    assert TINY.head == 80
    assert TINY.patch_weights == (4 * 16 + 3 * 32) + 1176 * 4
    assert TINY.merger == 16 * 16 + 16 * 8
    assert TINY.weights == 1152 + 80 + 4864 + 384
    assert replace(TINY, tied=False).weights == TINY.weights + 80
    assert TINY.kv_bytes == 2 * 2 * 4 * 2


@pytest.mark.parametrize(("name", "billions", "kv_bytes"), [("3b", 3.754, 36_864), ("7b", 8.291, 57_344)])
def test_the_papers_models(name: str, billions: float, kv_bytes: int) -> None:
    assert SHAPES[name].weights / 1e9 == pytest.approx(billions, abs=0.001)
    assert SHAPES[name].kv_bytes == kv_bytes


def test_flops_until_the_first_token() -> None:
    # 6 new tokens through 1152 weights; they attend to 5 + ... + 10 = 45 tokens, 4 x 2 x 8 each; the head once.
    assert prefill_flops(TINY, TEXT) == 2 * 1152 * 6 + 64 * 45 + 2 * 80 == 16_864
    # 8 new tokens, which attend to 5 + ... + 12 = 68, and two image tokens of four patches.
    image = 2 * 2 * (4 * 4864 + 384)
    assert prefill_flops(TINY, IMAGE) == 2 * 1152 * 8 + 64 * 68 + 2 * 80 + image == 102_304


def test_an_image_is_bound_by_prefill() -> None:
    result = capacity(TINY, DEVICE, IMAGE, 0.5, MANY)
    assert result is not None
    # 18,000 bytes, less 12,960 of weights and 4 x 32 of the prefix: 4,912 for requests of 13 x 32 bytes.
    assert result.batch == 11
    assert result.prefill == pytest.approx(102_304 / 5e5)
    # A step reads 1,232 weights of 2 bytes and 11 x 14.5 x 32 bytes of keys and values; 4 steps follow the prefill.
    assert result.decode == pytest.approx(4 * (2_464 + 5_104) / 5e4 / 11)
    assert result.per_second == pytest.approx(1 / (0.204608 + 0.05504))
    assert result.alone == pytest.approx(0.204608 + 4 * (2_464 + 464) / 5e4)
    assert (result.bound, result.saturates) == ("prefill", "arithmetic")


@pytest.mark.parametrize(
    ("device", "concurrency", "batch", "saturates"),
    [
        (DEVICE, MANY, 13, "bandwidth"),  # 13 x 12.5 x 32 = 5,200 bytes of keys and values against 2,464 of weights
        (DEVICE, 4, 4, "concurrency"),  # 1,600 bytes against 2,464
        (replace(DEVICE, memory=15_200), MANY, 1, "memory"),  # room for one request: 592 bytes
        (replace(DEVICE, memory=15_200), 1, 1, "memory"),
        (replace(DEVICE, bandwidth=1e9), MANY, 13, "arithmetic"),
    ],
)
def test_what_limits_the_answers(device: Device, concurrency: int, batch: int, saturates: str) -> None:
    result = capacity(TINY, device, replace(TEXT, completion=5), 0.5, concurrency)
    assert result is not None
    assert (result.batch, result.saturates) == (batch, saturates)


def test_a_long_answer_is_bound_by_arithmetic_if_the_bandwidth_suffices() -> None:
    work = replace(TEXT, completion=100)
    result = capacity(TINY, replace(DEVICE, bandwidth=1e9), work, 1.0, MANY)
    assert result is not None
    # Each of 99 steps: 2 x 1,232 and attention to 10 + 50 tokens, 64 each.
    assert result.decode == pytest.approx(99 * (2_464 + 64 * 60) / 1e6)
    assert (result.bound, result.saturates) == ("decode", "arithmetic")


def test_a_model_that_does_not_fit() -> None:
    assert capacity(TINY, replace(DEVICE, memory=14_000), TEXT, 0.5, MANY) is None
    assert capacity(SHAPES["7b"], Device(1e12, 1e11, 16e9, "made up"), Work(), 0.4, 256) is None


def test_gpus_for_a_day() -> None:
    # 864,000 a day are 10 a second, 15 at the peak: 7.5 GPUs that judge 2 a second.
    assert gpus_for(2.0, 864_000, 1.5) == 8
    assert gpus_for(2.0, 1, 1.0) == 1


def test_twice_the_utilisation_is_twice_the_rate() -> None:
    slow, fast = (capacity(SHAPES["3b"], DEVICES["h200"], Work(), share, 256) for share in (0.4, 0.8))
    assert slow is not None
    assert fast is not None
    assert fast.per_second == pytest.approx(2 * slow.per_second)


def test_a_shape_is_read_from_a_configuration() -> None:
    text = {
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 10,
    }
    vision = {"depth": 1, "hidden_size": 4, "intermediate_size": 8}
    assert shape_of({"text_config": text, "vision_config": vision, "tie_word_embeddings": True}) == TINY
    assert shape_of({**text, "vision_config": vision}) == replace(TINY, tied=False)
    with pytest.raises(InputError, match="no hidden_size"):
        shape_of({"text_config": text, "vision_config": {"depth": 1}})


def test_a_device_by_name_or_by_its_figures() -> None:
    assert device_of("h100") is DEVICES["h100"]
    assert device_of("121,300,24") == replace(DEVICES["l4"], source="the command line")
    for name in ("h101", "1,2", "1,2,x", "0,1,1", "nan,1,1"):
        with pytest.raises(InputError, match="is no known GPU: use l4, a10"):
            device_of(name)


def test_the_whole_prompt_cannot_be_cached() -> None:
    with pytest.raises(InputError, match="give fewer cached tokens"):
        Work(prompt=118, cached=118)
