"""A guard's start made of a language model: the same logits before trimming, and what trimming keeps."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
)

from guardreasoner_vl.engines.model_files import folder_digest
from guardreasoner_vl.engines.qwen import QwenInputs
from guardreasoner_vl.errors import GuardError, ModelError
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.protocol import INSTRUCTION
from guardreasoner_vl.recipe import PretrainedBase
from guardreasoner_vl.training.pretrained_base import load_language_model, trimmed, write_pretrained
from tests.tiny_model import TEXTS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow
VOCABULARY = 420
EYES = {"hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2, "full_attention": [1]}
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_llama(folder: Path, **shape: Any) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHAT)
    wrapped.save_pretrained(folder)
    torch.manual_seed(5)
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **{**SHAPE, **shape})
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            else:
                parameter.uniform_(0.5, 1.5)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


def base(path: Path, **settings: Any) -> PretrainedBase:
    return PretrainedBase.model_validate({"path": str(path), "vision": EYES, **settings})


def text_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits.float()


def test_untrimmed_it_gives_the_logits_of_its_source(llama: Path, tmp_path: Path) -> None:
    write_pretrained(tmp_path / "guard", base(llama), seed=0)
    source = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    guard = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "guard", dtype=torch.float32)
    before = Tokenizer.from_file(str(llama / "tokenizer.json"))
    after = Tokenizer.from_file(str(tmp_path / "guard" / "tokenizer.json"))
    ids = before.encode(TEXTS[3]).ids
    assert after.encode(TEXTS[3]).ids == ids
    expected = text_logits(source, ids)
    assert torch.equal(text_logits(guard, ids)[:, : expected.shape[1]], expected)
    assert expected.std() > 0.5


def test_trimmed_it_keeps_the_first_layers_and_the_tokens_own_rows(llama: Path, tmp_path: Path) -> None:
    write_pretrained(tmp_path / "guard", base(llama, layers=2, vocab_size=380, max_positions=128), seed=0)
    source = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    guard = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "guard", dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(tmp_path / "guard" / "tokenizer.json"))
    before = Tokenizer.from_file(str(llama / "tokenizer.json")).get_vocab()
    rows, old = guard.get_input_embeddings().weight, source.get_input_embeddings().weight.detach()
    vocabulary = tokenizer.get_vocab()
    assert len(vocabulary) == len(rows) == guard.config.get_text_config().vocab_size == 380
    shared = vocabulary.keys() & before.keys()
    assert len(shared) > 300
    for token in shared:
        assert torch.equal(rows[vocabulary[token]], old[before[token]])
    text = guard.model.language_model
    assert len(text.layers) == 2
    for layer, theirs in zip(text.layers, source.model.layers, strict=False):
        assert torch.equal(layer.self_attn.k_proj.weight, theirs.self_attn.k_proj.weight)
        assert not layer.self_attn.k_proj.bias.any()
    assert torch.equal(text.norm.weight, source.model.layers[2].input_layernorm.weight)  # of the first one left out
    assert guard.config.get_text_config().max_position_embeddings == 128


def test_a_piece_of_the_wire_begins_near_the_mean_of_its_tokens(llama: Path, tmp_path: Path) -> None:
    write_pretrained(tmp_path / "guard", base(llama, vocab_size=380), seed=0)
    rows = load_language_model(str(llama)).network.get_input_embeddings().weight.detach()
    source = load_language_model(str(llama)).tokenizer
    guard = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "guard", dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(tmp_path / "guard" / "tokenizer.json"))
    noises = []
    for piece in (INSTRUCTION, "<think>\n"):
        (number,) = tokenizer.encode(piece).ids
        parts = source.encode(piece).ids
        assert len(parts) > 1
        row, mean = guard.get_input_embeddings().weight[number].detach(), rows[parts].mean(0)
        missing = rows.norm(dim=1).median() ** 2 - mean @ mean
        assert missing > 0
        torch.testing.assert_close((row - mean).norm(), missing.sqrt())
        noises.append((row - mean) / missing.sqrt())
    assert abs(float(noises[0] @ noises[1])) < 0.6


def test_a_trimmed_tokenizer_says_the_same_with_more_tokens(llama: Path) -> None:
    source = Tokenizer.from_file(str(llama / "tokenizer.json"))
    small = trimmed(source, 320)
    assert small.get_vocab_size() == 320
    assert sorted(small.get_vocab().values()) == list(range(320))
    for text in (*TEXTS, "ünïcödé \U0001f600\n\ttabs", ""):
        assert small.decode(small.encode(text).ids, skip_special_tokens=False) == text
    longer = [len(small.encode(text).ids) - len(source.encode(text).ids) for text in TEXTS]
    assert min(longer) >= 0
    assert max(longer) > 0


def test_the_same_seed_makes_the_same_folder_and_a_guard_reads_it(llama: Path, tmp_path: Path) -> None:
    settings = base(llama, layers=1, vocab_size=400)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_pretrained(tmp_path / name, settings, seed)
    first, second, third = (folder_digest(tmp_path / name) for name in "abc")
    assert first == second != third
    assert QwenInputs.from_folder(tmp_path / "a").grid(56, 56) == (4, 4)
    verdict = Guard.load(str(tmp_path / "a")).moderate("How do I bake bread?", mode="fast")
    assert verdict.error is None


@pytest.mark.parametrize(
    ("shape", "settings", "said"),
    [
        ({"tie_word_embeddings": False}, {}, "not tied"),
        ({"attention_bias": True}, {}, "biases"),
        ({"mlp_bias": True}, {}, "MLP"),
        ({"hidden_act": "gelu"}, {}, "gelu"),
        ({"head_dim": 8}, {}, "heads"),
        ({}, {"layers": 4}, "it has 3 layers"),
        ({}, {"layers": [0, 3]}, "it has 3 layers"),
        ({}, {"max_positions": 300}, "it has 256 positions"),
    ],
)
def test_what_no_guard_can_be_made_of_is_refused(
    shape: dict[str, Any], settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = write_llama(tmp_path / "llama", **shape)
    with pytest.raises(ModelError, match=said):
        write_pretrained(tmp_path / "guard", base(folder, **settings), seed=0)
    assert not (tmp_path / "guard").exists()


def test_a_vocabulary_without_room_is_refused(llama: Path) -> None:
    with pytest.raises(GuardError, match="no room"):
        trimmed(Tokenizer.from_file(str(llama / "tokenizer.json")), 260)


def test_files_that_hold_no_language_model_are_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, or so it says")
    (tmp_path / "broken.whl").write_bytes(b"no archive")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("README", "no model")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps({"model_type": "llama"}), "utf-8")
    for name in ("broken.gguf", "broken.whl", "empty.zip", "folder", "missing.gguf", "missing.whl", "missing"):
        with pytest.raises(ModelError, match=name.split(".")[0]) as caught:
            load_language_model(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    for name in ("broken.gguf", "folder"):
        with pytest.raises(
            ModelError, match="; give a GGUF file, an archive that holds one, or a complete model folder"
        ):
            load_language_model(str(tmp_path / name))


def test_the_vision_tower_may_come_from_another_model(llama: Path, tmp_path: Path) -> None:
    narrow = write_llama(tmp_path / "narrow", hidden_size=32, num_attention_heads=2, num_key_value_heads=2)
    write_pretrained(tmp_path / "first", base(narrow), seed=1)
    write_pretrained(tmp_path / "second", base(llama, vision_from=str(tmp_path / "first")), seed=2)
    first, second = (
        Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / name).model.visual.state_dict()
        for name in ("first", "second")
    )
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert set(first) - same == {"merger.mlp.2.weight", "merger.mlp.2.bias"}  # they lead to another width
    wider = {**EYES, "hidden_size": 64}
    with pytest.raises(ModelError, match=r"another width; set model\.base\.vision to its shape"):
        write_pretrained(tmp_path / "third", base(llama, vision=wider, vision_from=str(tmp_path / "first")), seed=2)


def test_the_listed_layers_are_kept(llama: Path, tmp_path: Path) -> None:
    write_pretrained(tmp_path / "guard", base(llama, layers=[0, 2]), seed=0)
    guard = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "guard").model.language_model
    source = AutoModelForCausalLM.from_pretrained(llama).model
    assert len(guard.layers) == 2
    for layer, number in zip(guard.layers, (0, 2), strict=True):
        assert torch.equal(layer.self_attn.q_proj.weight, source.layers[number].self_attn.q_proj.weight)
        assert torch.equal(layer.mlp.down_proj.weight, source.layers[number].mlp.down_proj.weight)
    assert torch.equal(guard.norm.weight, source.norm.weight)


@pytest.mark.parametrize("layers", [[], [1, 0], [1, 1]])
def test_layers_are_listed_once_each_and_ascending(llama: Path, layers: list[int]) -> None:
    with pytest.raises(ValueError, match="from the lowest to the highest"):
        base(llama, layers=layers)
