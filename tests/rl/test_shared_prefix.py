"""A packed row against the same sequences one by one: log-probabilities and gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from guardreasoner_vl.engines.qwen import IMAGE_PAD, QwenInputs
from guardreasoner_vl.rl import shared_prefix
from guardreasoner_vl.rl.shared_prefix import (
    Branch,
    PackedLayout,
    Tree,
    arguments,
    completion,
    log_probabilities,
    pack,
    use_shared_prefix,
)

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.engines.qwen import Encoded

pytestmark = pytest.mark.slow
SIZES = {"text": (), "image": ((84, 112),), "two images": ((56, 56), (112, 84))}


@pytest.fixture
def model(tiny_model: Path) -> Any:
    network = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
    use_shared_prefix(network)
    return network.train()


def prompt(inputs: QwenInputs, kind: str, tokens: int, seed: int = 0) -> tuple[Encoded, list[Image.Image]]:
    """Random words with the images of that kind among them."""
    rng = np.random.default_rng(seed)
    words = [int(token) for token in rng.integers(20, 250, tokens)]
    images, grids = [], []
    for width, height in SIZES[kind]:
        images.append(Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)))
        grids.append(inputs.grid(height, width))
        start, pad, end = (inputs.token_id[name] for name in ("<|vision_start|>", IMAGE_PAD, "<|vision_end|>"))
        words[3:3] = [start, *[pad] * inputs.pads(grids[-1]), end]
    images.reverse()  # each was put before the earlier one
    grids.reverse()
    return inputs.encoded(words, grids), images


def completions(lengths: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[int(token) for token in rng.integers(20, 250, length)] for length in lengths]


def tree(encoded: Encoded, answers: list[list[int]]) -> Tree:
    prefix = Branch(encoded.ids, encoded.positions)
    return Tree(prefix, tuple(completion(answer, encoded.next_position) for answer in answers))


def vision(inputs: QwenInputs, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    if not images:
        return {}
    grids = [(1, *inputs.grid(image.height, image.width)) for image in images]
    return {"pixel_values": torch.from_numpy(inputs.patches(images)), "image_grid_thw": torch.tensor(grids)}


def one_by_one(model: Any, inputs: QwenInputs, encoded: Encoded, images: Any, answers: list[list[int]]) -> torch.Tensor:
    """Each sequence for itself, its positions the model's own."""
    logprobs = []
    for answer in answers:
        ids = torch.tensor([[*encoded.ids, *answer]])
        kinds = (ids == inputs.token_id[IMAGE_PAD]).int()
        out = model(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **vision(inputs, images))
        scores = out.logits[0, len(encoded.ids) - 1 : -1].log_softmax(-1)
        logprobs.append(scores.gather(1, torch.tensor(answer)[:, None])[:, 0])
    return torch.cat(logprobs)


def gradients(model: Any, logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Those of a sum in which every token has a weight of its own."""
    model.zero_grad()
    torch.autograd.backward((logprobs * torch.linspace(-1, 1, len(logprobs))).sum())
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm."""
    assert first.keys() == second.keys()
    apart = sum(float((first[name] - second[name]).square().sum()) for name in first)
    whole = sum(float(second[name].square().sum()) for name in second)
    return float((apart / whole) ** 0.5)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("lengths", [(9, 9, 9), (1, 14, 5, 2), (7,)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probabilities_and_gradients(
    model: Any, inputs: QwenInputs, kind: str, lengths: tuple[int, ...], checkpointing: bool
) -> None:
    encoded, images = prompt(inputs, kind, 11)
    answers = completions(lengths)
    apart = one_by_one(model, inputs, encoded, images, answers)
    expected = gradients(model, apart)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    packed = log_probabilities(model, pack([tree(encoded, answers)]), vision(inputs, images))
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)
    assert apart.std() > 0.03
    assert difference(gradients(model, packed), expected) < 1e-5


def test_trees_of_all_kinds_in_one_row(model: Any, inputs: QwenInputs) -> None:
    prompts = [prompt(inputs, kind, 5 + 4 * number, number) for number, kind in enumerate(SIZES)]
    answers = [completions(lengths, number) for number, lengths in enumerate([(3, 8), (6, 6, 6), (1, 12)])]
    apart = torch.cat(
        [one_by_one(model, inputs, one, images, own) for (one, images), own in zip(prompts, answers, strict=True)]
    )
    expected = gradients(model, apart)
    trees = [tree(one, own) for (one, _), own in zip(prompts, answers, strict=True)]
    packed = pack(trees)
    assert packed.ids.shape == (1, sum(one.tokens for one in trees))
    logprobs = log_probabilities(model, packed, vision(inputs, [image for _, images in prompts for image in images]))
    torch.testing.assert_close(logprobs, apart, rtol=1e-5, atol=1e-5)
    assert difference(gradients(model, logprobs), expected) < 1e-5


def test_branches_may_hold_images(model: Any, inputs: QwenInputs) -> None:
    """Rows of SFT: the instruction stands once, what follows has images of its own."""
    whole = [prompt(inputs, kind, 16, 3) for kind in ("text", "two images", "image")]
    head = whole[0][0].ids[:3]
    rows = [[*head, *encoded.ids[3:]] for encoded, _ in whole]
    branches = []
    for ids, (encoded, _) in zip(rows, whole, strict=True):
        branches.append(Branch(ids[3:], inputs.positions(ids, encoded.grids)[:, 3:]))
    prefix = Branch(head, np.tile(np.arange(3), (3, 1)))
    images = [image for _, row_images in whole for image in row_images]
    packed = log_probabilities(model, pack([Tree(prefix, tuple(branches))]), vision(inputs, images))
    expected = []
    for ids, (_, row_images) in zip(rows, whole, strict=True):
        row = torch.tensor([ids])
        kinds = (row == inputs.token_id[IMAGE_PAD]).int()
        out = model(input_ids=row, mm_token_type_ids=kinds, use_cache=False, **vision(inputs, row_images))
        expected.append(out.logits[0, 2:-1].log_softmax(-1).gather(1, row[0, 3:, None])[:, 0])
    torch.testing.assert_close(packed, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_logits_piece_by_piece(model: Any, inputs: QwenInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, images = prompt(inputs, "image", 11)
    packed = pack([tree(encoded, completions((9, 4, 7)))])
    whole = log_probabilities(model, packed, vision(inputs, images), 1.2)
    expected = gradients(model, whole)
    rows: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, hidden: rows.append(len(hidden[0])))
    monkeypatch.setattr(shared_prefix, "MOST_LOGITS", 6 * model.config.text_config.vocab_size)
    pieces = log_probabilities(model, packed, vision(inputs, images), 1.2)
    assert rows == [6, 6, 6, 2]
    torch.testing.assert_close(pieces, whole)
    assert difference(gradients(model, pieces), expected) < 1e-6


@pytest.mark.parametrize("lengths", [(4, 4), (1, 6)])
def test_all_of_a_row_moves_to_another_device(inputs: QwenInputs, lengths: tuple[int, ...]) -> None:
    encoded, _ = prompt(inputs, "text", 8)
    packed = pack([tree(encoded, completions(lengths)), tree(encoded, completions((3,)))])
    elsewhere = torch.device("meta")
    moved, layout = packed.to(elsewhere), PackedLayout.of(packed).to(elsewhere)
    assert moved.spans == packed.spans
    for name in ("ids", "positions", "predicts", "targets"):
        before, after = getattr(packed, name), getattr(moved, name)
        assert (after.device, after.shape, after.dtype) == (elsewhere, before.shape, before.dtype)
    for group, moved_group in zip(PackedLayout.of(packed).groups, layout.groups, strict=True):
        assert (moved_group.start, moved_group.prefix) == (group.start, group.prefix)
        for before, after in zip(group.calls, moved_group.calls, strict=True):
            assert after.gather.device == after.mask.device == elsewhere
            assert (after.gather.shape, after.mask.shape) == (before.gather.shape, before.mask.shape)
            assert (after.real is None) == (before.real is None)
            if before.real is not None and after.real is not None:
                assert (after.real.device, after.real.shape) == (elsewhere, before.real.shape)
    assert (layout.groups[0].calls[0].real is None) == (len(set(lengths)) == 1)


def test_a_rows_layout_is_made_where_the_row_is(inputs: QwenInputs) -> None:
    encoded, _ = prompt(inputs, "text", 8)
    packed = pack([tree(encoded, completions((1, 6)))])
    with torch.device("meta"):  # as where the default device is another one
        layout = PackedLayout.of(packed)
    (call,) = layout.groups[0].calls
    assert call.real is not None
    assert {call.gather.device.type, call.mask.device.type, call.real.device.type} == {"cpu"}


RUNAWAY = (4, 1, 60, 5, 3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_runaway_answer_is_attended_to_in_a_call_of_its_own(
    model: Any, inputs: QwenInputs, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    encoded, images = prompt(inputs, "image", 11)
    answers = completions(RUNAWAY)
    packed = pack([tree(encoded, answers), tree(prompt(inputs, "text", 5)[0], completions((2, 6)))])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    whole = log_probabilities(model, packed, vision(inputs, images))
    expected = gradients(model, whole)
    most = 3 * 5 * (len(encoded.ids) + 5)
    monkeypatch.setattr(shared_prefix, "MOST_SCORES", most)
    first, second = PackedLayout.of(packed).groups
    assert [tuple(call.gather.shape) for call in first.calls] == [(1, 60), (2, 5), (2, 3)]
    assert all(len(call.gather) == 1 or len(call.gather) * call.mask.numel() <= most for call in first.calls)
    assert len(second.calls) == 1
    assert second.order is None
    pieces = log_probabilities(model, packed, vision(inputs, images))
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)
    assert difference(gradients(model, pieces), expected) < 1e-5


def test_an_accelerator_gets_no_mask_together_with_grouped_heads(
    inputs: QwenInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fused kernels refuse the two, and the unfused one holds all scores of all heads."""
    calls: list[tuple[bool, bool]] = []

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> torch.Tensor:
        calls.append((settings.get("attn_mask") is not None, settings["enable_gqa"]))
        return scaled_dot_product_attention(query, key, value, **settings)

    monkeypatch.setattr(shared_prefix, "scaled_dot_product_attention", spy)
    packed = pack([tree(prompt(inputs, "text", 8)[0], completions((4, 6)))])
    length = packed.ids.shape[1]
    attention = ALL_ATTENTION_FUNCTIONS[shared_prefix.NAME]
    for device, masked in (("cpu", (True, True)), ("meta", (True, False))):
        query, key = torch.zeros(1, 4, length, 8, device=device), torch.zeros(1, 2, length, 8, device=device)
        layout = PackedLayout.of(packed).to(torch.device(device))
        output, _ = attention(torch.nn.Module(), query, key, key, None, layout=layout)
        assert output.shape == (1, length, 4, 8)
        assert calls == [(False, True), masked]
        calls.clear()


def test_ordinary_attention_takes_what_it_is_given() -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    attention = ALL_ATTENTION_FUNCTIONS[shared_prefix.NAME]
    for causal in (False, True):
        output, _ = attention(torch.nn.Module(), query, key, value, None, scaling=0.3, is_causal=causal)
        expected = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=0.3)
        torch.testing.assert_close(output, expected.transpose(1, 2))


class Grouped(torch.nn.Module):
    num_key_value_groups = 2


def test_ordinary_attention_of_grouped_heads_keeps_its_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 5, 4, generator=generator)
    key, value = torch.randn(2, 1, 2, 5, 4, generator=generator)
    mask = torch.ones(5, 5, dtype=torch.bool).tril().triu(-1)[None, None]
    output, _ = ALL_ATTENTION_FUNCTIONS[shared_prefix.NAME](Grouped(), query, key, value, mask, scaling=0.3)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(output, expected.transpose(1, 2))


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (8, 4), (2, 2)])
@pytest.mark.parametrize("most", [1, 2**24])
@pytest.mark.parametrize("trees", [[(2, (2,))], [(3, (2, 2)), (2, (1, 2, 4))]])  # one with as many tokens as heads
def test_packed_attention_is_that_of_the_sequences_at_the_scale_that_is_given(
    heads: int, key_heads: int, most: int, trees: list[tuple[int, tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prefix, "MOST_SCORES", most)
    packed = pack(
        [
            Tree(completion(range(prefix), 0), tuple(completion(range(length), prefix) for length in branches))
            for prefix, branches in trees
        ]
    )
    length = packed.ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, length, 8, generator=generator)
    key, value = torch.randn(2, 1, key_heads, length, 8, generator=generator)

    def attended(places: list[int]) -> torch.Tensor:
        queries, keys, values = query[:, :, places], key[:, :, places], value[:, :, places]
        return scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=0.3, enable_gqa=True)

    expected = []
    for span in packed.spans:
        prefix = list(range(span.start, span.start + span.prefix))
        expected.append(attended(prefix))
        start = prefix[-1] + 1
        for tokens in span.branches:
            expected.append(attended([*prefix, *range(start, start + tokens)])[:, :, span.prefix :])
            start += tokens
    attention = ALL_ATTENTION_FUNCTIONS[shared_prefix.NAME]
    layout = PackedLayout.of(packed)
    output, _ = attention(torch.nn.Module(), query, key, value, None, scaling=0.3, layout=layout)
    torch.testing.assert_close(output, torch.cat(expected, dim=2).transpose(1, 2))


def test_the_policy_is_the_one_that_samples(model: Any, inputs: QwenInputs) -> None:
    encoded, _ = prompt(inputs, "text", 8)
    packed = pack([tree(encoded, completions((4, 3)))])
    warm = log_probabilities(model, packed, temperature=1.2)
    plain = model(**arguments(packed), use_cache=False).logits[0, packed.predicts]
    expected = (plain / 1.2).log_softmax(-1).gather(1, packed.targets[:, None])[:, 0]
    torch.testing.assert_close(warm, expected)


def test_ordinary_rows_read_as_before(model: Any, tiny_model: Path) -> None:
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.randint(20, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        first, second = (one(input_ids=ids, attention_mask=mask).logits for one in (model.eval(), plain.eval()))
    torch.testing.assert_close(first[mask.bool()], second[mask.bool()])


@pytest.mark.parametrize(("prefix", "branches"), [((), ((1,),)), ((1,), ()), ((1,), ((1,), ()))])
def test_a_tree_without_tokens_is_refused(prefix: tuple[int, ...], branches: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="at least one token each"):
        Tree(completion(prefix, 0), tuple(completion(branch, 1) for branch in branches))


@pytest.mark.parametrize("prefix", [100, 512, 700])
@pytest.mark.parametrize("longest", [400, 500, 750, 1000, 1500, 2000, 2500, 3072])
def test_short_answers_are_not_padded_to_a_long_one(prefix: int, longest: int) -> None:
    lengths = (*[250] * 7, longest, *[250] * 8)
    texts = [completion([1] * length, prefix) for length in lengths]
    packed = pack([Tree(completion([1] * prefix, 0), tuple(texts))])

    (group,) = PackedLayout.of(packed).groups

    computed = sum(len(call.gather) * call.mask.numel() for call in group.calls)
    assert computed <= 1.5 * sum(length * (prefix + length) for length in lengths)
    assert len(group.calls) <= 2


def test_lengths_that_are_nearly_equal_are_computed_in_one_call() -> None:
    """Scores: 2 x 120 x 220 = 52,800 padded, 120 x 220 + 100 x 200 = 46,400 in two calls, which is no gain."""
    packed = pack([Tree(completion([1] * 100, 0), (completion([1] * 100, 100), completion([1] * 120, 100)))])

    (group,) = PackedLayout.of(packed).groups

    assert [tuple(call.gather.shape) for call in group.calls] == [(2, 120)]
    assert group.order is None
