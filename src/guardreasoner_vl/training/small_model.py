"""Builds a Qwen2.5-VL small enough to ship: byte-level BPE learnt from the corpus, random weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from guardreasoner_vl.engines.qwen import END_OF_TEXT, END_OF_TURN, IMAGE_PAD
from guardreasoner_vl.errors import RecipeError
from guardreasoner_vl.protocol import INSTRUCTION

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from guardreasoner_vl.recipe import NewModel, Sight, TextShape, VisionShape

_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL = (
    END_OF_TEXT,
    "<|im_start|>",
    END_OF_TURN,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    IMAGE_PAD,
    "<|video_pad|>",
)
_PLAIN = ("<tool_call>", "</tool_call>")
_WIRE = (
    INSTRUCTION,
    "Human user:\n",
    "\n\nAI assistant:\n",
    "<think>\n",
    "\n</think>\n<result>\nAnswers:\nRequest:",
    "</think>\n<result>\nAnswers:\nRequest:",
    "\nResponse:",
    "\n</result>",
    "# Task 1\n",
    "\n# Task 2\n",
    "\n## Reasoning Step ",
    "## Reasoning Step ",
)
"""Fixed pieces of the wire format, one token each: the instruction takes one token instead of a hundred."""

_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with Qwen's word splitting, control tokens and chat format; `vocab_size` counts all."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_CONTROL) - len(_PLAIN) - len(_WIRE),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    add_wire_tokens(tokenizer)
    return tokenizer


def add_wire_tokens(tokenizer: Tokenizer) -> None:
    """Add the control tokens and one token for each fixed piece of the wire format, where they are missing."""
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _CONTROL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in (*_PLAIN, *_WIRE)])


def write_new_model(folder: Path, texts: Iterable[str], shape: NewModel, seed: int) -> None:
    """Write a complete, loadable model folder with random weights."""
    tokenizer = build_tokenizer(texts, shape.vocab_size)
    write_texts(folder, tokenizer, shape, shape.text.max_positions)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(small_config(shape.text, shape, tokenizer))
    model.save_pretrained(folder)


def write_texts(folder: Path, tokenizer: Tokenizer, sight: Sight, max_positions: int) -> None:
    """Write the configuration files of the tokenizer and the image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_config(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TURN,
            "pad_token": END_OF_TEXT,
            "model_max_length": max_positions,
            "chat_template": _CHAT_TEMPLATE,
        },
    )
    _write_config(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": sight.min_pixels,
            "max_pixels": sight.max_pixels,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )


def small_config(text: TextShape, sight: Sight, tokenizer: Tokenizer) -> Qwen2_5_VLConfig:
    """The architecture's configuration, with the tokenizer's token ids.

    Raises `RecipeError` if `sight.mrope_section` is not half a head's width together.
    """
    end, pad = tokenizer.token_to_id(END_OF_TURN), tokenizer.token_to_id(END_OF_TEXT)
    half = text.hidden_size // text.heads // 2
    side = 3 * half // 8
    section = sight.mrope_section or (half - 2 * side, side, side)
    if sum(section) != half:
        raise RecipeError(f"mrope_section is {list(section)}: its numbers must sum to {half}, half a head's width")
    vision = sight.vision
    return Qwen2_5_VLConfig(
        text_config={
            **text_sizes(text, tokenizer.get_vocab_size()),
            "max_position_embeddings": text.max_positions,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": text.rope_theta,
                "mrope_section": list(section),
            },
            "bos_token_id": pad,
            "eos_token_id": end,
            "pad_token_id": pad,
        },
        vision_config={
            **vision_sizes(vision, text),
            "fullatt_block_indexes": list(vision.full_attention),
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "in_channels": 3,
            "tokens_per_second": 2,
        },
        image_token_id=tokenizer.token_to_id(IMAGE_PAD),
        video_token_id=tokenizer.token_to_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.token_to_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.token_to_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def text_sizes(text: TextShape, vocab_size: int) -> dict[str, int]:
    """The decoder's part of the configuration that determines its number of parameters."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "tie_word_embeddings": True,
    }


def vision_sizes(vision: VisionShape, text: TextShape) -> dict[str, int]:
    """The vision tower's part of the configuration that determines its number of parameters."""
    return {
        "depth": vision.layers,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_heads": vision.heads,
        "out_hidden_size": text.hidden_size,
    }


def _write_config(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
