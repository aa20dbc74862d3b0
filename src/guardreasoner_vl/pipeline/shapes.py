"""Shapes of the paper's base models, for planning on a machine without these models."""

from __future__ import annotations

from typing import Any


def _qwen_config(text: dict[str, Any]) -> dict[str, Any]:
    """The parts of `config.json` that determine the model's size; both models have the same vision tower."""
    tower = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    return {
        "text_config": text,
        "vision_config": {**tower, "out_hidden_size": text["hidden_size"]},
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


BASE_3B, BASE_7B = "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"

BASES: dict[str, dict[str, Any]] = {
    BASE_3B: _qwen_config(
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        }
    ),
    BASE_7B: _qwen_config(
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        }
    ),
}
"""By hub id: what `config.json` says of the sizes."""
