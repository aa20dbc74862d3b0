"""Settings of LoRA: which layers get adapters, and of which size."""

from __future__ import annotations

from pydantic import Field

from guardreasoner_vl.recipe.base import Section


class LoraSection(Section):
    """Adapters on a frozen model in `sft` and `grpo`, instead of full fine-tuning (`training.lora`)."""

    rank: int = Field(default=16, ge=1, description="Rank of an adapter's two matrices A and B.")
    alpha: int = Field(default=32, ge=1, description="The adapter's output B A x is multiplied by `alpha` / `rank`.")
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="Linear layers that get an adapter, by the last parts of their names: those of the language model, "
        "and with a leading `visual.`, such as `visual.qkv`, those of the vision tower, which is frozen otherwise.",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of an adapter's inputs that are set to zero in SFT. RL uses none: the ratio of two "
        "probabilities would compare two networks.",
    )
