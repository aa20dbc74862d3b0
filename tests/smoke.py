"""The smoke recipe with fewer rows and steps, which runs in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.recipe import load_recipe, merged, parse_recipe

if TYPE_CHECKING:
    from guardreasoner_vl.recipe import Recipe

PATH = Path(__file__).parent.parent / "recipes" / "smoke.yaml"
SHORT: dict[str, Any] = {
    "model": {"new": {"text": {"hidden_size": 48, "intermediate_size": 96, "layers": 2, "heads": 2, "kv_heads": 2}}},
    "data": {"synthetic_exchanges": {"count": 160, "test_share": 0.2}},
    "sft": {"epochs": 24, "batch_size": 16, "learning_rate": 5e-3, "max_length": 400, "save_steps": 1000},
    "mine": {"limit": 60, "max_new_tokens": 80},
    "grpo": {
        "group_size": 4,
        "rollout_batch": 8,
        "update_batch": 4,
        "steps": 2,
        "max_completion_length": 80,
        "evaluate_every": 2,
        "evaluate_rows": 8,
    },
    "evaluate": {"limit": 12, "max_new_tokens": 80},
}


def short_recipe(**changes: Any) -> Recipe:
    """Further changes go over the shortened ones."""
    return parse_recipe(merged(merged(load_recipe(PATH).model_dump(mode="json"), SHORT), changes))
