"""Settings of the stages that make a guard: SFT, hard samples, online RL, evaluation."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from guardreasoner_vl.choices import TeacherName
from guardreasoner_vl.errors import RecipeError
from guardreasoner_vl.recipe.base import Section
from guardreasoner_vl.types import Mode

Precision = Literal["bf16", "bf16-weights", "fp32"]
KeepRule = Literal["all_wrong", "mixed", "mostly_right"]
LEAST_CANDIDATES: dict[KeepRule, int] = {"all_wrong": 1, "mixed": 2, "mostly_right": 3}
"""The fewest candidates with which a rule can keep a row."""
RewardForm = Literal["paper", "bounded", "plain"]
Schedule = Literal["product", "linear", "cosine", "constant"]
RolloutEngineName = Literal["transformers", "vllm-server", "vllm-colocate"]

_PRECISION = (
    "`bf16`: autocast over fp32 weights. `bf16-weights`: weights in bf16, with fp32 copies in the optimizer (less "
    "memory, and faster on a CPU; in `sft` one device). `fp32`: no autocast."
)
_CHECKPOINTING = "Recompute activations in the backward pass: less memory, more time. The result is the same."
_FREEZE = "Leave the vision tower's weights as they are, so that a small one does not unlearn to read."
_BASE_URL = (
    "Address of a vLLM server that this stage of `run` asks, such as http://localhost:8000/v1; it is told to load the "
    "stage's model. Null: the model runs in this process."
)
_SHARD = (
    "With several processes: each holds its share of weights, gradients and AdamW's state, and gathers one layer at a "
    "time (FSDP2). With `precision: bf16` the weights are gathered in bf16."
)
_NO_SHARDED_HALVES = (
    "shard_weights holds the fp32 weights in shards: use precision bf16, which computes in bf16, or fp32"
)
_MAX_GRAD_NORM = "Gradients are scaled down to this L2 norm (paper: 1.0)."


class SftSection(Section):
    """Reasoning SFT (paper, section 3.2)."""

    epochs: float = Field(default=3, gt=0, description="Passes over the training rows; may be a fraction (paper: 3).")
    learning_rate: float = Field(
        default=5e-5, gt=0, description="Peak learning rate of AdamW, followed by cosine decay to 0 (paper: 5e-5)."
    )
    warmup_steps: int = Field(
        default=0, description="Optimizer steps of linear warm-up to the peak learning rate (paper: 0)."
    )
    weight_decay: float = Field(default=0.0, description="Decoupled weight decay of AdamW. 0: none.")
    adam_beta2: float = Field(
        default=0.999, description="Decay rate of AdamW's second moment; lower adapts faster in short runs."
    )
    max_grad_norm: float = Field(default=1.0, description=_MAX_GRAD_NORM)
    batch_size: int = Field(
        default=6, ge=1, description="Rows of one forward pass on each device (paper: 6 on each of 4 devices)."
    )
    gradient_accumulation: int = Field(
        default=8,
        ge=1,
        description="Forward passes of each device in one optimizer step. Unused with `total_batch`.",
    )
    total_batch: int | None = Field(
        default=None,
        ge=1,
        description="Rows in one optimizer step, whatever the number of devices: a multiple of `batch_size` x devices "
        "(paper: 192). Null: `batch_size` x `gradient_accumulation` x devices.",
    )
    max_length: int = Field(
        default=2048,
        ge=32,
        description="Longest row in tokens, prompt and completion together; longer rows are skipped, never cut (paper: "
        "2048).",
    )
    without_reasoning: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of rows that are trained to give the labels after an empty think, which `fast` mode needs. "
        "0: reasoning only (paper). 1: no reasoning, the paper's ablation SFT.",
    )
    label_weight: float = Field(
        default=1.0,
        ge=1,
        description="Factor on the loss of the words harmful and unharmful, about two of sixty tokens of a completion. "
        "1 is the paper's loss.",
    )
    freeze_vision: bool = Field(default=False, description=_FREEZE)
    freeze_layers: int = Field(
        default=0,
        ge=0,
        description="Leave this many first decoder layers, and the embeddings, as they are: a forward pass through "
        "them is a third of the work of training them. 0: train all (paper).",
    )
    precision: Precision = Field(default="bf16", description=f"{_PRECISION} (Paper: bf16.)")
    gradient_checkpointing: bool = Field(default=False, description=_CHECKPOINTING)
    save_steps: int = Field(
        default=500, ge=1, description="Optimizer steps between two checkpoints; the last two checkpoints are kept."
    )
    teacher: Literal["rules"] | None = Field(
        default=None,
        description="Who writes the reasoning of rows without any: `rules`, the offline teacher. Null: such rows are "
        "trained with an empty think.",
    )
    deepspeed: dict[str, Any] | None = Field(
        default=None,
        description="DeepSpeed's own configuration (paper: ZeRO stage 3, which gathers whole weights for each "
        "checkpoint). Null: without DeepSpeed.",
    )
    shard_weights: bool = Field(default=False, description=f"{_SHARD} Without `deepspeed`.")

    @property
    def zero_3(self) -> bool:
        """Whether DeepSpeed spreads the weights over the devices."""
        settings = (self.deepspeed or {}).get("zero_optimization")
        return isinstance(settings, dict) and settings.get("stage") == 3

    def accumulated(self, devices: int) -> int:
        """Forward passes of each device in one optimizer step.

        Raises `RecipeError` if the devices cannot share `total_batch`.
        """
        if self.total_batch is None:
            return self.gradient_accumulation
        passes, rest = divmod(self.total_batch, self.batch_size * devices)
        if rest:
            raise RecipeError(
                f"sft.total_batch {self.total_batch} is not a multiple of {self.batch_size} rows (sft.batch_size) on "
                f"{devices} {'device' if devices == 1 else 'devices'}: change one of them"
            )
        return passes

    @model_validator(mode="after")
    def _one_device(self) -> Self:
        if self.deepspeed and self.precision == "bf16-weights":
            raise ValueError("precision bf16-weights is for one device; use bf16 with deepspeed")
        if self.shard_weights and self.deepspeed:
            raise ValueError("shard_weights and deepspeed exclude each other; set deepspeed to null")
        if self.shard_weights and self.precision == "bf16-weights":
            raise ValueError(_NO_SHARDED_HALVES)
        return self


class SynthesizeSection(Section):
    """Who writes the corpus's reasoning (paper, section 3.1)."""

    teacher: TeacherName = Field(
        default="rules",
        description="`rules`: the offline teacher. `openai`: a model behind an OpenAI-compatible endpoint; its key is "
        "read from OPENAI_API_KEY.",
    )
    model: str = Field(
        default="gpt-4o-2024-08-06",
        description="The endpoint's model (paper: GPT-4o, gpt-4o-2024-08-06). Unused with `rules`.",
    )
    base_url: str | None = Field(
        default=None, description="Address of the endpoint, such as http://localhost:8000/v1. Null: OpenAI's."
    )
    attempts: int = Field(
        default=3,
        ge=1,
        description="Answers asked for until one passes the quality gates; after that many the row is skipped.",
    )
    votes: int = Field(
        default=3,
        ge=1,
        description="Answers that label a row without labels, by majority; without a majority the row is skipped.",
    )
    concurrency: int = Field(default=64, ge=1, description="Requests in flight at the endpoint.")
    max_cost: float | None = Field(
        default=None,
        ge=0,
        description="Most to spend on the corpus, in USD, earlier runs included; the stage stops before it would be "
        "exceeded. Null: no limit.",
    )


class BatchLimits(Section):
    """How much the engine `transformers` computes at once: smaller limits take less memory and more time."""

    max_rows: int = Field(
        default=128, ge=1, description="Answers that the engine `transformers` generates at once, at most."
    )
    max_tokens: int = Field(
        default=32_768,
        ge=1,
        description="Prompt tokens, padding included, that the engine `transformers` reads at once, at most.",
    )


class MineSection(BatchLimits):
    """Hard-sample mining (paper, section 3.3): sampled answers to each row decide whether it is kept."""

    candidates: int = Field(default=4, ge=1, description="Answers sampled for each training row (paper: 4).")
    temperature: float = Field(
        default=1.0, gt=0, description="Sampling temperature; near 0 all candidates agree (paper: 1.0)."
    )
    top_p: float = Field(
        default=0.95, gt=0, le=1, description="Nucleus sampling: probability mass that is kept (paper: 0.95). 1: all."
    )
    max_new_tokens: int = Field(
        default=4096, ge=16, description="Longest answer in tokens; a longer one counts as wrong (paper: 4096)."
    )
    keep: KeepRule = Field(
        default="all_wrong",
        description="Rows to keep: `all_wrong`, every candidate is wrong (paper); `mixed`, some are right and some are "
        "wrong; `mostly_right`, more than half are right, so that the guard confirms the label, and some are wrong.",
    )
    limit: int | None = Field(
        default=None, ge=1, description="Largest number of rows to ask about, drawn at random. Null: all."
    )
    base_url: str | None = Field(default=None, description=_BASE_URL)

    @model_validator(mode="after")
    def _can_mix(self) -> Self:
        if self.candidates < (least := LEAST_CANDIDATES[self.keep]):
            raise ValueError(f"keep: {self.keep} needs {least} candidates or more")
        return self


class AugmentSection(Section):
    """Safety-aware data concatenation (paper, section 3.3)."""

    share: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Share of the RL set that is joined pairs of hard rows (paper: 0.2). 0: no pairs.",
    )
    balanced: bool = Field(
        default=False, description="Leave pairs out until as many joined rows are harmful as unharmful."
    )


class ClipSection(Section):
    """Dynamic clipping: B_s, the bound of the ratio at rollout batch s (paper, section 3.3; `rl.clipping`)."""

    schedule: Schedule = Field(
        default="product",
        description="How the bound falls over training: `product` (paper; 0 at the end), `linear`, `cosine`, or "
        "`constant`.",
    )
    epsilon: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="The bound at the start: ratios are clipped to 1 - B_s .. 1 + B_s (paper: 0.2).",
    )
    floor: float = Field(
        default=0.0,
        ge=0,
        description="Smallest bound, at most `epsilon` (paper: 0). 0: the last updates hardly move the model.",
    )

    @model_validator(mode="after")
    def _floor_below(self) -> Self:
        if self.floor > self.epsilon:
            raise ValueError("use floor <= epsilon: the bound falls from epsilon to the floor")
        return self


class RewardSection(Section):
    """The length-aware safety reward (paper, section 3.3; `rl.reward`).

    Lengths are those of the reasoning, as a share of `max_completion_length`.
    """

    form: RewardForm = Field(
        default="paper",
        description="`paper`: the published formula. `bounded`: between -(1 + `lam`) and 0, so that length never "
        "outranks being right. `plain`: the share of right labels.",
    )
    beta: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Length from which on more reasoning does not soften the penalty of a wrong answer (paper: 1, Eco: "
        "1/6).",
    )
    min_length: float = Field(
        default=1 / 32,
        gt=0,
        description="Shortest length that counts; less than `beta`. With `paper` the lowest reward is -1 / "
        "`min_length`^2.",
    )
    lam: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="How much a short wrong answer is penalised beyond a long one, with `bounded` only. 0: length has "
        "no effect.",
    )
    token_cost: float = Field(
        default=0.0,
        ge=0,
        description="Reward that a wholly right answer loses at full length, in proportion to its length, with "
        "`bounded` only. 0: none.",
    )

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.min_length >= self.beta:
            raise ValueError("use min_length < beta: between them lengths make a difference")
        if self.token_cost and self.form != "bounded":
            raise ValueError("token_cost belongs to form: bounded; remove it or change the form")
        return self


class RolloutSection(BatchLimits):
    """What samples the answers of online RL and judges the validation rows."""

    engine: RolloutEngineName = Field(
        default="transformers",
        description="`transformers`: the network that is trained. `vllm-server`: a vLLM server, which gets the weights "
        "before each rollout batch. `vllm-colocate`: vLLM inside each process, on the GPU that it trains on.",
    )
    base_url: str | None = Field(
        default=None, description="Address of the server, such as http://localhost:8000/v1, with `vllm-server`."
    )
    gpu_memory_utilization: float = Field(
        default=0.25,
        gt=0,
        lt=1,
        description="Share of the GPU's memory that vLLM takes for weights and KV cache, with `vllm-colocate`.",
    )
    importance_cap: float | None = Field(
        default=None,
        gt=0,
        description="Truncated importance sampling with vLLM: the loss of each token is multiplied by the ratio of the "
        "trainer's to vLLM's probability of it, at most this (2 is usual). Null: no weights.",
    )

    @model_validator(mode="after")
    def _of_the_engine(self) -> Self:
        if (self.engine == "vllm-server") != (self.base_url is not None):
            raise ValueError("engine: vllm-server and base_url belong together; give both or neither")
        if self.engine == "transformers" and self.importance_cap is not None:
            raise ValueError("importance_cap is for vLLM; with engine: transformers the network itself samples")
        return self


class GrpoSection(Section):
    """Online RL: GRPO without the KL term (paper, section 3.3)."""

    group_size: int = Field(
        default=16, description="Answers sampled for each prompt; 2 at least, as they are compared (paper: 16)."
    )
    temperature: float = Field(default=1.2, gt=0, description="Sampling temperature of the rollouts (paper: 1.2).")
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Nucleus sampling of the rollouts. 1: all, which is the policy that is trained; less leaves out "
        "runaway answers, and ratios are still those of the whole vocabulary.",
    )
    rollout_batch: int = Field(
        default=512,
        ge=2,
        description="Prompts of one rollout batch; a multiple of `update_batch`, twice it at least (paper: 512).",
    )
    update_batch: int = Field(default=256, ge=1, description="Prompts of one optimizer step (paper: 256).")
    max_prompt_length: int = Field(
        default=3072, ge=32, description="Longest prompt in tokens; rows with a longer one are skipped (paper: 3072)."
    )
    max_completion_length: int = Field(
        default=3072,
        ge=16,
        description="Longest answer in tokens; a longer one is cut and counts as wrong (paper: 3072).",
    )
    epochs: int = Field(default=1, ge=1, description="Passes over the RL set, in whole rollout batches (paper: 1).")
    steps: int | None = Field(
        default=None, ge=1, description="Rollout batches to train for. Null: what `epochs` gives."
    )
    learning_rate: float = Field(default=1e-6, gt=0, description="Constant learning rate of AdamW (paper: 1e-6).")
    weight_decay: float = Field(
        default=1e-2, ge=0, description="Decoupled weight decay of AdamW (paper: 0.01). 0: none."
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description=_MAX_GRAD_NORM)
    clip: ClipSection = Field(default=ClipSection(), description="Dynamic clipping of the probability ratio.")
    reward: RewardSection = Field(default=RewardSection(), description="The reward of an answer.")
    rollouts: RolloutSection = Field(default=RolloutSection(), description="What samples the answers.")
    precision: Precision = Field(default="bf16", description=_PRECISION)
    gradient_checkpointing: bool = Field(default=False, description=_CHECKPOINTING)
    freeze_vision: bool = Field(default=False, description=_FREEZE)
    pass_tokens: int = Field(
        default=16_384,
        ge=64,
        description="Packed tokens of one forward pass, which bounds memory. The result is the same.",
    )
    shard_weights: bool = Field(
        default=False, description=f"{_SHARD} Rollouts gather all of them. The result is the same."
    )
    save_every: int = Field(default=1, ge=1, description="Rollout batches between two checkpoints.")
    evaluate_every: int | None = Field(
        default=None,
        ge=1,
        description="Rollout batches between two validations; the checkpoint with the highest F1 becomes the model. "
        "Null: no validation, the last one does.",
    )
    evaluate_rows: int = Field(default=512, ge=1, description="Validation rows to judge each time, drawn at random.")

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
        if self.shard_weights and self.precision == "bf16-weights":
            raise ValueError(_NO_SHARDED_HALVES)
        return self


class EvaluateSection(BatchLimits):
    """What the finished models are measured on."""

    benchmarks: tuple[str, ...] = Field(
        default=(),
        description="Benchmarks by name, or files below `--data`. Empty: the corpus's test rows, else its validation "
        "rows.",
    )
    mode: Mode = Field(
        default="slow",
        description="`slow`: reason first (paper). `fast`: give the verdict only. `hybrid`: reason where the fast "
        "score is in doubt.",
    )
    max_new_tokens: int = Field(
        default=4096, ge=16, description="Longest answer in tokens; a longer one counts as wrong (paper: 4096)."
    )
    limit: int | None = Field(
        default=None, ge=1, description="Rows of each benchmark to judge, the first ones. Null: all."
    )
    base_url: str | None = Field(default=None, description=_BASE_URL)
