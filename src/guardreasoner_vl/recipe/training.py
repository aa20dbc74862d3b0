"""Settings of the stages that make a guard: SFT, hard samples, online RL, evaluation."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from guardreasoner_vl.recipe.base import Section
from guardreasoner_vl.types import Mode

Precision = Literal["bf16", "bf16-weights", "fp32"]
KeepRule = Literal["all_wrong", "mixed"]
RewardForm = Literal["paper", "bounded", "plain"]
Schedule = Literal["product", "linear", "cosine", "constant"]


class SftSection(Section):
    """Reasoning SFT (paper, section 3.2). Lengths are tokens, prompt and completion together.

    `freeze_vision` leaves the vision tower as it is, so that a small one does not unlearn to read.
    `label_weight` multiplies the loss of the words harmful and unharmful, two of some sixty tokens of a
    completion; at 1 the loss is the paper's.
    `precision`: `bf16` is autocast over fp32 weights, `bf16-weights` holds the model in bf16 with fp32 copies
    in the optimizer (one device; faster on a CPU). `deepspeed` is DeepSpeed's own configuration.
    """

    epochs: float = Field(default=3, gt=0)
    learning_rate: float = Field(default=5e-5, gt=0)
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    batch_size: int = Field(default=6, ge=1)
    gradient_accumulation: int = Field(default=8, ge=1)
    max_length: int = Field(default=2048, ge=32)
    without_reasoning: float = Field(default=0.0, ge=0, le=1)
    label_weight: float = Field(default=1.0, ge=1)
    freeze_vision: bool = False
    precision: Precision = "bf16"
    gradient_checkpointing: bool = False
    save_steps: int = Field(default=500, ge=1)
    teacher: Literal["rules"] | None = None
    deepspeed: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_device(self) -> Self:
        if self.deepspeed and self.precision == "bf16-weights":
            raise ValueError("precision bf16-weights is for one device; use bf16 with deepspeed")
        return self


class SynthesizeSection(Section):
    """Who writes the corpus's reasoning (paper, section 3.1), and how much it may cost, in USD."""

    teacher: Literal["rules", "openai"] = "rules"
    model: str = "gpt-4o-2024-08-06"
    base_url: str | None = None
    attempts: int = Field(default=3, ge=1)
    votes: int = Field(default=3, ge=1)
    concurrency: int = Field(default=64, ge=1)
    max_cost: float | None = Field(default=None, ge=0)


class MineSection(Section):
    """Hard-sample mining (paper, section 3.3): `candidates` answers for each row of the corpus.

    A row is kept if they are `all_wrong` (the paper's rule), or `mixed`, some right and some wrong. `limit` draws so
    many rows.
    """

    candidates: int = Field(default=4, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_new_tokens: int = Field(default=4096, ge=16)
    keep: KeepRule = "all_wrong"
    limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _can_mix(self) -> Self:
        if self.keep == "mixed" and self.candidates < 2:
            raise ValueError("keep: mixed needs 2 candidates or more")
        return self


class AugmentSection(Section):
    """Safety-aware data concatenation (paper, section 3.3): `share` of the RL set are joined pairs of hard rows.

    `balanced` leaves pairs out until as many are harmful as unharmful.
    """

    share: float = Field(default=0.2, ge=0, lt=1)
    balanced: bool = False


class ClipSection(Section):
    """B_s, the ratio's bound at rollout batch s (`rl.clipping`)."""

    schedule: Schedule = "product"
    epsilon: float = Field(default=0.2, gt=0, lt=1)
    floor: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _floor_below(self) -> Self:
        if self.floor > self.epsilon:
            raise ValueError("use floor <= epsilon: the bound falls from epsilon to the floor")
        return self


class RewardSection(Section):
    """The reward's form and constants (`rl.reward`)."""

    form: RewardForm = "paper"
    beta: float = Field(default=1.0, gt=0, le=1)
    min_length: float = Field(default=1 / 32, gt=0)
    lam: float = Field(default=0.5, ge=0, le=1)
    token_cost: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.min_length >= self.beta:
            raise ValueError("use min_length < beta: between them lengths make a difference")
        if self.token_cost and self.form != "bounded":
            raise ValueError("token_cost belongs to form: bounded; remove it or change the form")
        return self


class GrpoSection(Section):
    """Online RL (paper, section 3.3). `rollout_batch` and `update_batch` count prompts, lengths are tokens.

    `steps` bounds the rollout batches (default: `epochs` over the data). `pass_tokens` bounds one forward pass, in
    packed tokens. `save_every` and `evaluate_every` count rollout batches; the best checkpoint is the one with the
    highest F1 on `evaluate_rows` validation rows.
    """

    group_size: int = 16
    temperature: float = Field(default=1.2, gt=0)
    rollout_batch: int = Field(default=512, ge=2)
    update_batch: int = Field(default=256, ge=1)
    max_prompt_length: int = Field(default=3072, ge=32)
    max_completion_length: int = Field(default=3072, ge=16)
    epochs: int = Field(default=1, ge=1)
    steps: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    clip: ClipSection = ClipSection()
    reward: RewardSection = RewardSection()
    precision: Precision = "bf16"
    gradient_checkpointing: bool = False
    freeze_vision: bool = False
    pass_tokens: int = Field(default=16_384, ge=64)
    save_every: int = Field(default=1, ge=1)
    evaluate_every: int | None = Field(default=None, ge=1)
    evaluate_rows: int = Field(default=512, ge=1)

    @model_validator(mode="after")
    def _updates(self) -> Self:
        if self.group_size < 2:
            raise ValueError("group_size must be 2 or more: an advantage compares the answers of a group")
        if self.rollout_batch % self.update_batch:
            raise ValueError("rollout_batch must be a multiple of update_batch")
        if self.rollout_batch < 2 * self.update_batch:
            raise ValueError(
                "use rollout_batch >= 2 x update_batch: with one update the ratio is 1, and clipping cannot act"
            )
        return self


class EvaluateSection(Section):
    """What a finished run is measured on: benchmarks by name or file below the data; without any, its own test rows.

    `limit` takes so many rows of each.
    """

    benchmarks: tuple[str, ...] = ()
    mode: Mode = "slow"
    max_new_tokens: int = Field(default=4096, ge=16)
    limit: int | None = Field(default=None, ge=1)
