"""Batches, loss and gradients of the SFT trainer beside Transformers', TRL's and a hand-written one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import SFTTrainer

from guardreasoner_vl.engines.qwen import QwenInputs, chat_text
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.images.sizes import ImageSizes
from guardreasoner_vl.protocol import build_messages
from guardreasoner_vl.recipe import SftSection
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.training.master_adamw import MasterAdamW
from guardreasoner_vl.training.sft_data import IGNORED, TokenRow, target_labels, tokenise
from guardreasoner_vl.training.sft_trainer import (
    Collator,
    LengthGrouped,
    SupervisedOnlyTrainer,
    build_trainer,
    deepspeed_settings,
    sft_config,
)
from guardreasoner_vl.training.small_model import write_new_model
from guardreasoner_vl.types import Exchange
from tests.training import toy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
NEW = toy.recipe().base.new


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder beside a folder of 16 rows: 8 with images."""
    root = tmp_path_factory.mktemp("trainer")
    toy.write_data(root, toy.rows(16))
    assert NEW is not None
    write_new_model(root / "base", [str(row["prompt"]) for row in toy.rows(16)], NEW, seed=0)
    return root


@pytest.fixture(scope="module")
def inputs(folder: Path) -> QwenInputs:
    return QwenInputs.from_folder(folder / "base")


@pytest.fixture(scope="module")
def rows(folder: Path, inputs: QwenInputs) -> list[TokenRow]:
    samples = list(read_samples(folder / "toy" / "train.jsonl"))
    token_rows = tokenise(
        samples,
        target_labels(samples),
        inputs,
        max_length=400,
        without_reasoning=0.5,
        teacher="rules",
        seed=0,
        sizes=ImageSizes(),
    )
    assert len(token_rows.rows) == 16
    return token_rows.rows


def model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    network = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "base", dtype=dtype)
    network.config.use_cache = False
    return network


def trainer(
    folder: Path,
    rows: Sequence[TokenRow],
    inputs: QwenInputs,
    out: Path,
    dtype: torch.dtype = torch.float32,
    **sft: Any,
) -> SupervisedOnlyTrainer:
    section = SftSection.model_validate({**toy.SFT, **sft})
    config = sft_config(section, out, seed=0, use_cpu=True)
    return build_trainer(model(folder, dtype), rows, inputs, config, folder / "base")


def as_dict(row: TokenRow) -> dict[str, Any]:
    return {"input_ids": row.input_ids, "labels": row.labels, "image_paths": list(row.images)}


def batch(inputs: QwenInputs, rows: Sequence[TokenRow], always_images: bool = False) -> dict[str, Any]:
    return Collator(inputs, always_images)([as_dict(row) for row in rows])


def padded(inputs: QwenInputs, rows: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
    """The same rows side by side as Transformers takes them, each whole; positions are left to the model."""
    longest, pad = max(len(row.input_ids) for row in rows), inputs.token_id["<|endoftext|>"]
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), IGNORED)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for number, row in enumerate(rows):
        count = len(row.input_ids)
        ids[number, :count], labels[number, :count] = torch.tensor(row.input_ids), torch.tensor(row.labels)
        mask[number, :count] = 1
    kinds = (ids == inputs.token_id["<|image_pad|>"]).int()
    arguments = {"input_ids": ids, "labels": labels, "attention_mask": mask, "mm_token_type_ids": kinds}
    vision = {name: value for name, value in batch(inputs, rows).items() if name in ("pixel_values", "image_grid_thw")}
    return {**arguments, **vision}


def split(rows: Sequence[TokenRow]) -> tuple[list[TokenRow], list[TokenRow]]:
    return [row for row in rows if not row.images], [row for row in rows if row.images]


# --- batches ------------------------------------------------------------------------------------------


def test_the_common_prefix_of_all_rows_is_packed_once(rows: list[TokenRow], inputs: QwenInputs) -> None:
    packed = batch(inputs, rows)
    columns = enumerate(zip(*(row.input_ids for row in rows), strict=False))
    shared = next(at for at, column in columns if len(set(column)) > 1)
    instruction = inputs.tokens(chat_text(build_messages(Exchange(prompt="x")), []).partition("Human user")[0])
    assert shared >= len(instruction) - 1
    assert packed["input_ids"][0].tolist() == [
        *rows[0].input_ids[:shared],
        *(token for row in rows for token in row.input_ids[shared:]),
    ]
    assert packed["labels"][0].tolist() == [
        *[IGNORED] * shared,
        *(label for row in rows for label in row.labels[shared:]),
    ]


def test_micro_batches_of_worker_processes_are_the_same(
    rows: list[TokenRow], inputs: QwenInputs, tmp_path: Path
) -> None:
    section = SftSection.model_validate(toy.SFT)
    assert sft_config(section, tmp_path, seed=0, use_cpu=True).dataloader_num_workers == 0
    assert sft_config(section, tmp_path, seed=0, use_cpu=False).dataloader_num_workers == 4
    content: Any = [as_dict(row) for row in rows]
    alone, shared = (
        list(DataLoader(content, batch_size=4, collate_fn=Collator(inputs), num_workers=workers)) for workers in (0, 2)
    )
    for first, second in zip(alone, shared, strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {"attention_mask", "layout"}:
            assert torch.equal(first[name], second[name]), name
        for group, other in zip(first["layout"].groups, second["layout"].groups, strict=True):
            for call, other_call in zip(group.calls, other.calls, strict=True):
                assert torch.equal(call.gather, other_call.gather)
                assert torch.equal(call.mask, other_call.mask)


def test_a_prefix_ends_before_loss_and_images(rows: list[TokenRow], inputs: QwenInputs) -> None:
    texts, images = split(rows)
    for row in (texts[0], images[0]):
        packed = batch(inputs, [row, row])
        shared = 2 * len(row.input_ids) - packed["input_ids"].numel()
        start = inputs.token_id["<|vision_start|>"]
        expected = [at for at, label in enumerate(row.labels) if label != IGNORED or row.input_ids[at] == start]
        assert shared == expected[0]
    alone = batch(inputs, texts[:1])
    assert alone["input_ids"].tolist() == [texts[0].input_ids]
    assert alone["labels"].tolist() == [texts[0].labels]


def test_positions_are_those_of_transformers(folder: Path, rows: list[TokenRow], inputs: QwenInputs) -> None:
    packed, each = batch(inputs, rows), padded(inputs, rows)
    expected, _ = model(folder).model.get_rope_index(
        each["input_ids"], each["mm_token_type_ids"], each["image_grid_thw"], attention_mask=each["attention_mask"]
    )
    shared = (sum(len(row.input_ids) for row in rows) - packed["input_ids"].numel()) // (len(rows) - 1)
    pieces = [expected[:, number, shared : len(row.input_ids)] for number, row in enumerate(rows)]
    assert torch.equal(packed["position_ids"][:, 0], torch.cat([expected[:, 0, :shared], *pieces], dim=1))


def test_images_fill_their_places(rows: list[TokenRow], inputs: QwenInputs) -> None:
    _, images = split(rows)
    packed = batch(inputs, images)
    grids = packed["image_grid_thw"]
    assert grids.shape == (len(images), 3)
    assert packed["pixel_values"].shape == (int(grids.prod(1).sum()), 3 * 2 * 14 * 14)
    pads = (packed["input_ids"] == inputs.token_id["<|image_pad|>"]).sum()
    assert int(pads) == int(grids.prod(1).sum()) // 4


def test_an_image_that_changed_since_its_tokens_were_counted(
    rows: list[TokenRow], inputs: QwenInputs, tmp_path: Path
) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "small.png")
    row = replace(split(rows)[1][0], images=(str(tmp_path / "small.png"),))
    with pytest.raises(DataError, match=r"^small\.png changed since its tokens were counted: restore it"):
        batch(inputs, [row])


def test_a_batch_of_texts_has_no_pixels(rows: list[TokenRow], inputs: QwenInputs) -> None:
    texts, _ = split(rows)
    names = {"input_ids", "labels", "attention_mask", "position_ids", "layout", "predicts"}
    assert set(batch(inputs, texts)) == names


def test_an_order_of_its_own_for_every_epoch() -> None:
    epoch = 0
    lengths = [(number * 7) % 50 for number in range(100)]
    sampler = LengthGrouped(lengths, 4, 0, lambda: epoch)
    first = list(sampler)
    torch.manual_seed(99)
    assert list(sampler) == first
    assert sorted(first) == list(range(100))
    assert len(sampler) == 100
    spread = [
        max(group) - min(group) for at in range(0, 100, 4) for group in [[lengths[i] for i in first[at : at + 4]]]
    ]
    assert sum(spread) / len(spread) < 15
    epoch = 1
    assert list(sampler) != first
    assert list(LengthGrouped(lengths, 4, 1, lambda: 0)) not in (first, list(sampler))


# --- loss and gradients -------------------------------------------------------------------------------


def gradients(built: SupervisedOnlyTrainer, compute: Any) -> tuple[float, dict[str, torch.Tensor]]:
    built.model.zero_grad()
    loss = compute()
    loss.backward()
    return float(loss.detach()), {
        name: parameter.grad.clone() for name, parameter in built.model.named_parameters() if parameter.grad is not None
    }


def assert_close(actual: torch.Tensor, other: torch.Tensor, name: str, absolute: float = 1e-5) -> None:
    assert torch.allclose(actual, other, rtol=1e-4, atol=absolute), (name, float((actual - other).abs().max()))


def by_hand(model: Any, packed: dict[str, torch.Tensor], count: int | None) -> torch.Tensor:
    """-log softmax at every supervised token, token by token, over their number."""
    fields = {name: value for name, value in packed.items() if name != "labels"}
    logprobs = model(**fields).logits.float().log_softmax(-1)
    terms = [
        -logprobs[row, at - 1, label]
        for row, labels in enumerate(packed["labels"].tolist())
        for at, label in enumerate(labels)
        if label != IGNORED
    ]
    return torch.stack(terms).sum() / (count or len(terms))


@pytest.mark.parametrize("kind", ["text", "image", "mixed"])
@pytest.mark.parametrize("items", [None, 321])
def test_loss_and_gradients_are_trls_and_the_formulas(
    kind: str, items: int | None, folder: Path, rows: list[TokenRow], inputs: QwenInputs, tmp_path: Path
) -> None:
    built = trainer(folder, rows, inputs, tmp_path)
    texts, images = split(rows)
    chosen = {"text": texts[:4], "image": images[:4], "mixed": [*texts[:2], *images[:3]]}[kind]
    values, each = batch(inputs, chosen), padded(inputs, chosen)
    count = None if items is None else torch.tensor(items)
    actual = gradients(built, lambda: built.compute_loss(built.model, dict(values), num_items_in_batch=count))
    stock = gradients(built, lambda: SFTTrainer.compute_loss(built, built.model, dict(each), num_items_in_batch=count))
    hand = gradients(built, lambda: by_hand(built.model, each, items))
    for loss, gradient in (stock, hand):
        assert actual[0] == pytest.approx(loss, abs=1e-5)
        assert actual[1].keys() == gradient.keys()
        for name, value in gradient.items():
            assert_close(actual[1][name], value, name, 1e-5)
    seen = any(name.startswith("model.visual.patch_embed") for name in actual[1])
    assert seen == (kind != "text")
    if seen:
        assert float(actual[1]["model.visual.patch_embed.proj.weight"].abs().max()) > 0


def test_label_words_count_label_weight_times(
    folder: Path, rows: list[TokenRow], inputs: QwenInputs, tmp_path: Path
) -> None:
    built = trainer(folder, rows, inputs, tmp_path)
    values = batch(inputs, rows)
    words = torch.isin(values["labels"], torch.tensor([*inputs.tokens(" harmful"), *inputs.tokens(" unharmful")]))
    assert 0 < int(words.sum()) < int((values["labels"] != IGNORED).sum())
    only_words = {**values, "labels": values["labels"].where(words, torch.tensor(IGNORED))}

    def loss(values: dict[str, torch.Tensor]) -> float:
        with torch.no_grad():
            return float(built.compute_loss(built.model, dict(values), num_items_in_batch=torch.tensor(10)))

    whole, part = loss(values), loss(only_words)
    built.label_weight = 3.0
    assert loss(values) == pytest.approx(whole + 2 * part, rel=1e-5)


def test_a_batch_without_loss_is_a_zero(folder: Path, rows: list[TokenRow], inputs: QwenInputs, tmp_path: Path) -> None:
    built = trainer(folder, rows, inputs, tmp_path)
    values = batch(inputs, rows[:2])
    values["labels"] = torch.full_like(values["labels"], IGNORED)
    loss, gradient = gradients(built, lambda: built.compute_loss(built.model, values))
    assert loss == 0
    assert all(not value.any() for value in gradient.values())


def test_the_head_sees_supervised_positions_only(
    folder: Path, rows: list[TokenRow], inputs: QwenInputs, tmp_path: Path
) -> None:
    built = trainer(folder, rows, inputs, tmp_path)
    values = batch(inputs, rows[:4])
    _, outputs = built.compute_loss(built.model, dict(values), return_outputs=True)
    assert outputs["logits"].shape[0] == int((values["labels"] != IGNORED).sum())
    fields = {name: value for name, value in values.items() if name not in ("labels", "predicts")}
    assert built.model(**fields).logits.shape[:2] == values["input_ids"].shape  # and nothing stays behind


def test_a_blank_image_changes_no_gradient(
    folder: Path, rows: list[TokenRow], inputs: QwenInputs, tmp_path: Path
) -> None:
    """Where weights are sharded every rank has to call the vision tower, whatever its rows are."""
    built = trainer(folder, rows, inputs, tmp_path)
    texts, images = split(rows)
    plain, blank = (batch(inputs, texts[:3], always) for always in (False, True))
    assert set(blank) - set(plain) == {"pixel_values", "image_grid_thw"}
    loss, expected = gradients(built, lambda: built.compute_loss(built.model, plain))
    same, computed = gradients(built, lambda: built.compute_loss(built.model, blank))
    assert same == pytest.approx(loss, abs=1e-6)
    tower = {name for name, _ in built.model.named_parameters() if name.startswith("model.visual.")}
    assert computed.keys() == expected.keys() | tower
    for name, value in computed.items():
        assert_close(value, torch.zeros_like(value) if name in tower else expected[name], name, 1e-6)
    mixed = [batch(inputs, [texts[0], images[0]], always)["pixel_values"] for always in (False, True)]
    assert torch.equal(*mixed)


@pytest.mark.parametrize(("precision", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_reaches_the_model(
    precision: str, expected: torch.dtype, folder: Path, rows: list[TokenRow], inputs: QwenInputs, tmp_path: Path
) -> None:
    seen: list[torch.dtype] = []

    class Look(TrainerCallback):  # type: ignore[misc]  # transformers has no types
        def on_step_begin(self, *args: Any, model: Any = None, **options: Any) -> None:
            layer = model.model.language_model.layers[0].mlp.gate_proj
            layer.register_forward_hook(lambda module, given, output: seen.append(output.dtype))

    built = trainer(folder, rows[:4], inputs, tmp_path, precision=precision, epochs=1)
    built.add_callback(Look())
    built.train()
    assert set(seen) == {expected}
    assert next(built.model.parameters()).dtype == torch.float32


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Keeps the gradients of every update."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **options: Any) -> None:
        self.gradients.append(
            {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        )


@pytest.mark.parametrize(("size", "accumulation"), [(4, 2), (2, 4), (1, 8), (3, 3)])
def test_accumulated_gradients_are_those_of_one_big_batch(
    size: int, accumulation: int, folder: Path, rows: list[TokenRow], inputs: QwenInputs, tmp_path: Path
) -> None:
    def update(size: int, accumulation: int) -> dict[str, torch.Tensor]:
        watch = Watch()
        built = trainer(
            folder,
            rows[:8],
            inputs,
            tmp_path / f"{size}",
            epochs=1,
            batch_size=size,
            gradient_accumulation=accumulation,
            max_grad_norm=1e9,
            save_steps=100,
        )
        built.add_callback(watch)
        built.train()
        (only,) = watch.gradients
        return only

    big, small = update(8, 1), update(size, accumulation)
    assert big.keys() == small.keys()
    for name, value in big.items():
        assert_close(small[name], value, name, 1e-6)


@pytest.mark.parametrize("kind", ["text", "image", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_batch_trains(
    kind: str, dtype: torch.dtype, folder: Path, rows: list[TokenRow], inputs: QwenInputs, tmp_path: Path
) -> None:
    texts, images = split(rows)
    chosen = {"text": texts, "image": images, "mixed": rows[2:6]}[kind][:4]
    built = trainer(folder, chosen, inputs, tmp_path, dtype, epochs=1, batch_size=4, save_steps=100)
    before = {name: value.detach().clone() for name, value in built.model.named_parameters()}
    built.train()
    moved = {name for name, value in built.model.named_parameters() if not torch.equal(value, before[name])}
    assert "model.language_model.embed_tokens.weight" in moved
    assert ("model.visual.patch_embed.proj.weight" in moved) == (kind != "text")
    assert all(torch.isfinite(value).all() for value in built.model.parameters())


def test_gradient_checkpointing_changes_nothing(
    folder: Path, rows: list[TokenRow], inputs: QwenInputs, tmp_path: Path
) -> None:
    results = []
    for checkpointing in (False, True):
        watch = Watch()
        built = trainer(folder, rows[:4], inputs, tmp_path, epochs=1, gradient_checkpointing=checkpointing)
        built.add_callback(watch)
        built.train()
        results.append(watch.gradients[0])
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert_close(results[1][name], value, name, 1e-6)


def test_zero_stage_3_writes_whole_weights() -> None:
    """Otherwise its checkpoints, and the finished folder, would have none."""
    zero: dict[str, Any] = {"stage": 3, "overlap_comm": True}
    gathering = {"stage3_gather_16bit_weights_on_model_save": True}
    for keys in ({}, {"stage3_gather_16bit_weights_on_model_save": False}):
        section = SftSection(deepspeed={"bf16": {}, "zero_optimization": {**zero, **keys}})
        assert deepspeed_settings(section) == {"bf16": {}, "zero_optimization": {**zero, **gathering}}
    unchanged: tuple[dict[str, Any] | None, ...] = (None, {"bf16": {}}, {"zero_optimization": {"stage": 2}})
    for others in unchanged:
        assert deepspeed_settings(SftSection(deepspeed=others)) == others


def test_deepspeed_keeps_the_fp32_copies_itself(
    folder: Path, rows: list[TokenRow], inputs: QwenInputs, tmp_path: Path
) -> None:
    """It holds weights in bf16, under ZeRO stage 3 as empty tensors, of which copies would be empty too."""
    for settings, copies in ((None, True), ({"zero_optimization": {"stage": 3}}, False)):
        config = sft_config(SftSection.model_validate(toy.SFT), tmp_path, seed=0, use_cpu=True)
        config.deepspeed = settings  # DeepSpeed itself is not needed to build a trainer
        built = build_trainer(model(folder, torch.bfloat16), rows[:4], inputs, config, folder / "base")
        assert isinstance(built.optimizer, MasterAdamW) == copies
