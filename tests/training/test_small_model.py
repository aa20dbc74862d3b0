"""The small model's folder: its vocabulary, its shape, and that others can open it."""

from __future__ import annotations

import json
import unicodedata
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from guardreasoner_vl.engines.qwen import QwenInputs, chat_text
from guardreasoner_vl.errors import RecipeError
from guardreasoner_vl.protocol import CANDIDATES, FAST_PREFIX, INSTRUCTION, Message
from guardreasoner_vl.recipe import NewModel, TextShape
from guardreasoner_vl.training.model_folder import load_for_training
from guardreasoner_vl.training.small_model import build_tokenizer, small_config, write_new_model
from tests.training import toy

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

pytestmark = pytest.mark.slow
TEXTS = [f"{row['prompt']} {row.get('response', '')}" for row in toy.rows(40)] + ["unharmful harmful harmful"] * 9
SHAPE = NewModel.model_validate(toy.SHAPE)
CONTROL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    write_new_model(path, TEXTS, SHAPE, seed=0)
    return path


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def test_vocabulary_has_the_size_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 300
    assert sorted(tokenizer.get_vocab().values()) == list(range(300))


def test_vocabulary_is_smaller_where_the_texts_give_no_more(tokenizer: Tokenizer) -> None:
    small = build_tokenizer(["a"], 4000)
    assert small.get_vocab_size() < 300
    assert small_config(SHAPE.text, SHAPE, small).get_text_config().vocab_size == small.get_vocab_size()


def test_control_tokens_are_one_id_each(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    numbers = [vocabulary[token] for token in CONTROL]
    assert len(set(numbers)) == len(CONTROL)
    for token, number in zip(CONTROL, numbers, strict=True):
        assert ids(tokenizer, f"a{token}b")[1:-1] == [number]
        assert tokenizer.decode([number]) == ""
    for plain in ("<tool_call>", "</tool_call>"):
        assert ids(tokenizer, plain) == [tokenizer.token_to_id(plain)]
        assert tokenizer.decode(ids(tokenizer, plain)) == plain


def test_the_instruction_is_one_token(tokenizer: Tokenizer) -> None:
    chat = ids(tokenizer, chat_text((Message("system", INSTRUCTION),)))
    assert tokenizer.token_to_id(INSTRUCTION) in chat
    assert len(ids(tokenizer, INSTRUCTION)) == 1


def test_candidates_differ_at_their_first_tokens(tokenizer: Tokenizer) -> None:
    with_prefix = [ids(tokenizer, FAST_PREFIX + word) for word in CANDIDATES]
    prefix = ids(tokenizer, FAST_PREFIX)
    assert len(prefix) == 2
    assert [row[:2] for row in with_prefix] == [prefix, prefix]
    assert with_prefix[0][2] != with_prefix[1][2]


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(alphabet="<>|/\n thinkresulthuman:A\u0301é한글👩\u200d👩"))
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    back = tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False)
    assert back == unicodedata.normalize("NFC", text)


def test_the_wires_pieces_come_back_as_they_were(tokenizer: Tokenizer) -> None:
    text = f"{INSTRUCTION}Human user:\nx\n\nAI assistant:\nNone\n{FAST_PREFIX} harmful\nResponse: None\n</result>"
    assert tokenizer.decode(ids(tokenizer, text)) == text


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_mrope_sections_fill_half_a_head(tokenizer: Tokenizer, heads: int) -> None:
    text = {**toy.SHAPE["text"], "hidden_size": 64, "heads": heads, "kv_heads": heads}
    config = small_config(TextShape.model_validate(text), SHAPE, tokenizer).get_text_config()
    sections = config.rope_parameters["mrope_section"]
    assert sum(sections) == 64 // heads // 2
    assert all(section > 0 for section in sections)


def test_text_does_not_depend_on_the_mrope_section(tmp_path: Path) -> None:
    logits = []
    half = SHAPE.text.hidden_size // SHAPE.text.heads // 2
    for section in (None, (0, 2, half - 2)):
        folder = tmp_path / str(section)
        write_new_model(folder, TEXTS, SHAPE.model_copy(update={"mrope_section": section}), seed=0)
        model = load_for_training(folder, "fp32")
        with torch.no_grad():
            logits.append(model(input_ids=torch.arange(100, 140)[None]).logits)
    assert torch.equal(*logits)


def test_an_mrope_section_that_is_not_half_a_head_is_refused(tokenizer: Tokenizer) -> None:
    wrong = SHAPE.model_copy(update={"mrope_section": (1, 1, 1)})
    with pytest.raises(RecipeError, match=r"mrope_section is \[1, 1, 1\]: its numbers must sum to"):
        small_config(wrong.text, wrong, tokenizer)


def test_transformers_opens_the_folder(folder: Path) -> None:
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.model_max_length == 512
    folder_inputs = QwenInputs.from_folder(folder)
    messages = (Message("system", INSTRUCTION), Message("user", "Human user:\nhi\n\nAI assistant:\nNone\n"))
    chat = [{"role": message.role, "content": message.text} for message in messages]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == chat_text(messages)
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoded == folder_inputs.tokens(chat_text(messages))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, use_safetensors=True)
    config = model.config
    assert config.text_config.vocab_size == len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    assert config.image_token_id == folder_inputs.token_id["<|image_pad|>"]
    assert config.vision_start_token_id == folder_inputs.token_id["<|vision_start|>"]
    assert config.text_config.eos_token_id == folder_inputs.token_id["<|im_end|>"]
    assert model.generation_config.eos_token_id == folder_inputs.token_id["<|im_end|>"]
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert folder_inputs.budget.max_pixels == 84 * 84


def test_weights_are_safetensors_and_tied_ones_stand_once(folder: Path) -> None:
    assert not list(folder.glob("*.bin"))
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    assert names
    assert sum("embed_tokens" in name or "lm_head" in name for name in names) == 1


def test_the_same_seed_gives_the_same_folder(folder: Path, tmp_path: Path) -> None:
    write_new_model(tmp_path / "again", TEXTS, SHAPE, seed=0)
    write_new_model(tmp_path / "other", TEXTS, SHAPE, seed=1)
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    other = (tmp_path / "other" / "model.safetensors").read_bytes()
    assert other != (folder / "model.safetensors").read_bytes()


def test_settings_are_those_of_qwen(folder: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert (settings["patch_size"], settings["merge_size"], settings["temporal_patch_size"]) == (14, 2, 2)
    assert settings["image_mean"] == [0.48145466, 0.4578275, 0.40821073]
    assert settings["image_std"] == [0.26862954, 0.26130258, 0.27577711]
