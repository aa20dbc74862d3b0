"""The vision tower learns to read: targets by hand, the loss by hand, and a tower that gets better."""

from __future__ import annotations

import json
import math
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from guardreasoner_vl.engines.qwen import QwenInputs
from guardreasoner_vl.recipe import NewModel, ReadingSection, parse_recipe
from guardreasoner_vl.sources.synthetic.images import WORDS, Word, draw_words
from guardreasoner_vl.stages import sft
from guardreasoner_vl.training.reading import (
    ALPHA,
    BLANK,
    KAPPA,
    LETTERS,
    NO_LETTER,
    OTHER_LETTER,
    LetterHead,
    Shares,
    _Drawn,
    _features,
    _patches_read,
    learn_to_read,
    patch_letters,
    patch_tokens,
    reading_loss,
)
from guardreasoner_vl.training.small_model import write_new_model
from tests.training import toy

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow
SHAPE = NewModel.model_validate({**toy.SHAPE, "max_pixels": 224 * 224})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reading")
    write_new_model(path, [" how to bake a cake"] * 20, SHAPE, seed=0)
    return path


@pytest.fixture(scope="module")
def inputs(folder: Path) -> QwenInputs:
    return QwenInputs.from_folder(folder)


def loaded(folder: Path) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def page(size: tuple[int, int], *words: Word) -> Image.Image:
    image = Image.new("RGB", size)
    image.info[WORDS] = list(words)
    return image


def word(text: str, start: float, top: float, end: float, bottom: float) -> Word:
    """A word whose letters are equally wide."""
    width = (end - start) / len(text)
    return Word(text, tuple(start + at * width for at in range(len(text) + 1)), top, bottom)


@pytest.fixture(scope="module")
def tokens(inputs: QwenInputs) -> tuple[int, int, int]:
    """Those of cake, bake and a blank patch."""
    (cake,), (bake,), (blank,) = (inputs.tokens(text) for text in (" cake", " bake", BLANK))
    return cake, bake, blank


def test_a_patch_holds_the_tokens_drawn_in_it(inputs: QwenInputs, tokens: tuple[int, int, int]) -> None:
    cake, bake, blank = tokens
    image = page((112, 56), word("cake", 14, 0, 56, 28), word("bake", 56, 14, 84, 42))
    expected = [cake, cake, bake, blank, blank, blank, bake, blank]
    assert patch_tokens(image, inputs) == [{token: 1.0} for token in expected]


def test_shares_follow_the_area_and_slivers_are_blank(inputs: QwenInputs, tokens: tuple[int, int, int]) -> None:
    cake, bake, blank = tokens
    image = page((56, 56), word("cake", 0, 0, 7, 28), word("bake", 7, 0, 28, 28), word("cake", 28, 28, 56, 32))
    first, *others = patch_tokens(image, inputs)
    assert first == pytest.approx({cake: 0.25, bake: 0.75})
    assert others == [{blank: 1.0}] * 3  # 4 of 28 rows is 0.143 of the patch


def test_a_word_of_several_tokens_is_read_from_left_to_right(inputs: QwenInputs) -> None:
    space, *letters = inputs.tokens(" xyzw")
    assert len(letters) == 4  # none of them learnt
    patches = patch_tokens(page((56, 28), word("xyzw", 0, 0, 56, 28)), inputs)
    assert [list(shares) for shares in patches] == [letters[:2], letters[2:]]
    assert not any(space in shares for shares in patches)


def test_tokens_follow_the_letters_own_widths(inputs: QwenInputs) -> None:
    _, wide, narrow = inputs.tokens(" wi")
    (patch,) = patch_tokens(page((28, 28), Word("wi", (0, 21, 28), 0, 28)), inputs)
    assert patch == pytest.approx({wide: 0.75, narrow: 0.25})


def test_boxes_shrink_with_the_image(inputs: QwenInputs, tokens: tuple[int, int, int]) -> None:
    cake, *_ = tokens
    patches = patch_tokens(page((448, 448), word("cake", 0, 0, 448, 224)), inputs)
    assert len(patches) == 64
    assert [set(shares) == {cake} for shares in patches] == [True] * 32 + [False] * 32


def test_each_half_of_a_patch_holds_the_letter_that_fills_most_of_it(inputs: QwenInputs) -> None:
    image = page((56, 56), Word("Ab!", (0, 10, 28, 42), 0, 28), word("cd", 42, 28, 56, 30))
    a, b = LETTERS.index("a"), LETTERS.index("b")
    assert patch_letters(image, inputs) == [a, b, OTHER_LETTER, *[NO_LETTER] * 5]  # 10 of 14 pixels are a's


def test_the_loss_of_letters_by_hand() -> None:
    head = LetterHead(3)
    states = torch.tensor([[3.0, 0.0, 0.0]])
    assert head.loss(states, torch.tensor([0, NO_LETTER])).item() == pytest.approx(math.log(28))
    with torch.no_grad():
        head.weight[0, 0] = 2.0  # the left half's letter a; the states' root mean square is the root of 3
    left_half = -math.log(math.exp(2 * math.sqrt(3)) / (math.exp(2 * math.sqrt(3)) + 27))
    assert head.loss(states, torch.tensor([0, NO_LETTER])).item() == pytest.approx((left_half + math.log(28)) / 2)


def test_states_halfway_stand_in_the_order_of_the_features(folder: Path, inputs: QwenInputs) -> None:
    tower = loaded(folder).model.visual
    tower.blocks = tower.blocks[:1]  # so that halfway is the end, and the features are its merger's
    images = [Image.effect_noise((width, 140), 80).convert("RGB") for width in (224, 168)]
    with torch.no_grad():
        grids = torch.tensor([(1, *inputs.grid(image.height, image.width)) for image in images])
        halfway, features = _features(tower, torch.from_numpy(inputs.patches(images)), grids)
        assert torch.allclose(tower.merger(halfway.view(-1, tower.config.hidden_size)), features, atol=1e-5)


def test_the_loss_by_hand() -> None:
    embeddings = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    features = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    loss, pointed = reading_loss(features, embeddings, Shares.of([{0: 1.0}, {0: 0.5, 1: 0.5}]))
    certain = -math.log(1 / (1 + math.exp(-KAPPA)))
    unsure = 0.5 * (KAPPA + certain) + 0.5 * certain
    apart = (certain + unsure) / 2
    impure = (0 + 1 - 0.5 / math.hypot(1, 0.5)) / 2  # the second feature's tokens sum to (1, 0.5)
    long = (0 + math.log(3 / 1.5) ** 2) / 2
    assert float(loss) == pytest.approx(apart + ALPHA * impure + long, rel=1e-5)
    assert pointed.tolist() == [0, 1]


def test_a_patch_is_read_if_any_of_its_tokens_is_pointed_at() -> None:
    blank = 9
    targets = Shares.of([{0: 0.5, 1: 0.5}, {2: 1.0}, {blank: 1.0}, {0: 1.0}])
    assert _patches_read(torch.tensor([1, 0, blank, 0]), targets, blank) == (2, 3)


@pytest.mark.parametrize("pages", [0.0, 1.0])
def test_printed_pages_of_the_texts_take_their_share(
    pages: float, inputs: QwenInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guardreasoner_vl.training.reading._SNIPPETS", 0)
    section, variety = ReadingSection(images=2, batch_size=2, pages=pages), torch.ones(())
    (batch,) = _Drawn(inputs, section, ["zebra"], 0, variety)
    (zebra,) = inputs.tokens(" zebra")[-1:]
    assert (zebra in batch.shares.tokens) == bool(pages)
    assert batch.grids.prod(1).sum() == len(batch.pixels)


def test_the_tower_learns_and_nothing_else_changes(folder: Path, inputs: QwenInputs) -> None:
    model = loaded(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    section = ReadingSection(images=480, learning_rate=1e-3, batch_size=4)
    assert 0 <= learn_to_read(model, inputs, section, ["bake a cake"], seed=0) <= 1
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".visual." in name for name in changed)

    shown = [draw_words(random.Random(seed), "how to bake a cake", plain=True) for seed in range(8)]
    targets = Shares.of([shares for image in shown for shares in patch_tokens(image, inputs)])
    grids = torch.tensor([(1, *inputs.grid(image.height, image.width)) for image in shown])

    def loss(state: dict[str, torch.Tensor]) -> float:
        model.load_state_dict(state)
        with torch.no_grad():
            features = model.model.visual(torch.from_numpy(inputs.patches(shown)), grid_thw=grids).pooler_output
        return float(reading_loss(features, model.get_input_embeddings().weight.detach(), targets)[0])

    learnt = {name: value.clone() for name, value in after.items()}
    assert loss(learnt) < 0.75 * loss(before)


def test_the_stage_reads_before_it_trains_and_once_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.write_data(tmp_path / "data", toy.rows(8))
    first = toy.recipe(epochs=1)
    start = sft.run(first, tmp_path / "data", tmp_path / "first")
    content = first.model_dump(mode="json")
    content["model"] = {"path": str(start), "reading": {"images": 4, "batch_size": 2}}
    out = tmp_path / "second"
    sft.run(parse_recipe(content), tmp_path / "data", out)
    base = load_file(out / "base" / "model.safetensors")
    start_weights = load_file(start / "model.safetensors")
    changed = {name for name, value in start_weights.items() if not torch.equal(value, base[name].to(value.dtype))}
    assert changed
    assert all(name.startswith("visual.") or ".visual." in name for name in changed)
    report = json.loads((out / "reading.json").read_text())
    assert report["images"] == 4
    assert 0 <= report["patches_read_rightly"] <= 1
    tokenizers = [json.loads((folder / "tokenizer.json").read_text()) for folder in (out / "base", start)]
    assert tokenizers[0] == tokenizers[1]

    monkeypatch.setattr("guardreasoner_vl.training.reading.learn_to_read", None)  # would fail if it were called
    (out / "sft" / "model" / "model.safetensors").unlink()
    assert (sft.run(parse_recipe(content), tmp_path / "data", out) / "model.safetensors").is_file()
