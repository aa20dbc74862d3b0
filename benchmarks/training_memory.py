"""Memory of training beside what `--plan` computes, on the CPU: bytes of the tensors that live at once.

    python -m benchmarks.training_memory

Each arm makes two optimizer steps of a small model from random weights, in passes as large as the recipe allows, and
counts the bytes of all tensors that live, by their storages. What a kernel allocates and frees within one call is not
seen, nor what CUDA's allocator adds. Sharded arms are rank 0 of four whose collectives are torch's `fake` ones: they
move nothing, and allocate what real ones do.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from guardreasoner_vl.engines.decoding import Decoder
from guardreasoner_vl.engines.qwen import Encoded
from guardreasoner_vl.pipeline import memory
from guardreasoner_vl.pipeline.memory import ANSWER
from guardreasoner_vl.pipeline.plan import size_of_config
from guardreasoner_vl.recipe import GrpoSection, LoraSection, MineSection, SftSection
from guardreasoner_vl.recipe.model import TOKEN_PIXELS
from guardreasoner_vl.rl.shared_prefix import Branch, Tree, arguments, completion, pack, use_shared_prefix
from guardreasoner_vl.training.grpo.optimizer import ShardedAdamW
from guardreasoner_vl.training.grpo.ranks import DistributedContext
from guardreasoner_vl.training.grpo.sharding import FullyShardedAdamW, shard
from guardreasoner_vl.training.grpo.update import Pass, PolicyNetwork, accumulate
from guardreasoner_vl.training.lora import add_adapters
from guardreasoner_vl.training.sft_data import IGNORED
from guardreasoner_vl.training.sft_trainer import SupervisedOnlyTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch._C._distributed_c10d import GradBucket

    from guardreasoner_vl.rl.shared_prefix import Packed

PROMPT = 100
IMAGE_TOKEN, IMAGE_SIDE = 5, 8  # of merged patches: 64 tokens
CONFIG: dict[str, Any] = {
    "text_config": {
        "hidden_size": 256,
        "intermediate_size": 1376,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "vocab_size": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    },
    "vision_config": {"depth": 4, "hidden_size": 160, "intermediate_size": 428, "num_heads": 4, "out_hidden_size": 256},
    "tie_word_embeddings": True,
    "image_token_id": IMAGE_TOKEN,
}
"""3B's proportions at about a four hundredth of its size."""


ANSWERING: dict[str, Any] = {**CONFIG, "text_config": {**CONFIG["text_config"], "num_key_value_heads": 2}}
"""The same for rollouts: a single head of keys would be repeated as a view, without memory."""


@dataclass(frozen=True)
class Arm:
    """One setting: a stage's section, and the number of GPUs."""

    name: str
    section: SftSection | MineSection | GrpoSection
    gpus: int = 1
    answers: int = 0  # of rollouts; without any the arm is an update
    lora: LoraSection | None = None


@dataclass(frozen=True)
class Figures:
    """Bytes of one GPU: planned, measured at most, and measured between two updates."""

    planned: float
    measured: int
    resident: int


def _sft(**keys: Any) -> SftSection:
    return SftSection(batch_size=2, max_length=320, precision="fp32", **keys)


def _grpo(precision: Any = "fp32", **keys: Any) -> GrpoSection:
    return GrpoSection(group_size=2, pass_tokens=600, precision=precision, **keys)


_LORA = LoraSection(rank=8, alpha=16)
_ROLLOUTS = GrpoSection(precision="fp32", max_completion_length=150)
_MINING = MineSection(max_rows=32, max_tokens=32 * PROMPT, max_new_tokens=150)
ARMS = (
    Arm("SFT", _sft()),
    Arm("SFT, checkpointing", _sft(gradient_checkpointing=True)),
    Arm("SFT, several GPUs", _sft(), 4),
    Arm("SFT, LoRA", _sft(), lora=_LORA),
    Arm("SFT, LoRA, checkpointing", _sft(gradient_checkpointing=True), lora=_LORA),
    Arm("RL", _grpo()),
    Arm("RL, checkpointing", _grpo(gradient_checkpointing=True)),
    Arm("RL, bf16-weights", _grpo("bf16-weights", gradient_checkpointing=True)),
    Arm("RL, bf16", _grpo("bf16", gradient_checkpointing=True)),
    Arm("RL, sharded", _grpo(gradient_checkpointing=True, shard_weights=True), 4),
    Arm("RL, sharded, bf16", _grpo("bf16", gradient_checkpointing=True, shard_weights=True), 4),
    Arm("RL, LoRA, checkpointing", _grpo(gradient_checkpointing=True), lora=_LORA),
    Arm("rollouts", _ROLLOUTS, answers=32),
    Arm("mining", _MINING, answers=32),
)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators return, until they are freed or resized."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes = WeakIdKeyDictionary(ref_type=weakref.ref)
        self._resizing: Any = None

    def __enter__(self) -> LiveBytes:
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> None:
            original(storage, size)
            if storage in self._sizes:
                self._add(storage.nbytes() - self._sizes[storage][0])
                self._sizes[storage][0] = storage.nbytes()

        self._resizing = patch.object(torch.UntypedStorage, "resize_", resize)
        self._resizing.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._resizing.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what it returns."""
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                local = leaf.to_local() if isinstance(leaf, DTensor) else leaf
                if local.device.type == "cpu":
                    self._count(local.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._sizes:
            size = self._sizes[storage] = [storage.nbytes()]
            self._add(size[0])
            weakref.finalize(storage, lambda: self._add(-size[0]))

    def _add(self, change: int) -> None:
        self.live += change
        self.peak = max(self.peak, self.live)


def measure(arm: Arm) -> Figures:
    """The arm's planned and measured memory."""
    config = ANSWERING if arm.answers else CONFIG
    size, pixels = size_of_config(config, arm.lora), IMAGE_SIDE**2 * TOKEN_PIXELS
    with LiveBytes() as tracker, _ranks(arm.gpus) as ranks:
        network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).train()
        network.config.use_cache = False
        use_shared_prefix(network)
        if arm.lora:
            add_adapters(network, arm.lora, "fp32")
        if not isinstance(arm.section, MineSection) and arm.section.gradient_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        if isinstance(arm.section, MineSection):
            planned = memory.of_mining(arm.section, size)
            step = _answers(network.to(torch.bfloat16), arm.section.max_new_tokens, arm.answers)
        elif isinstance(arm.section, SftSection):
            planned = memory.training_memory(
                lambda part: memory.of_sft(part, size, arm.gpus, pixels), arm.section, size
            )
            step = _sft_step(network, arm.section, arm.gpus)
        elif arm.answers:
            planned = memory.of_rollouts(arm.section, size, arm.gpus, arm.answers, PROMPT)
            step = _rollouts(network, arm.section, ranks, arm.answers)
        else:
            planned = memory.training_memory(
                lambda part: memory.of_update(part, size, arm.gpus, pixels), arm.section, size
            )
            step = _update(network, arm.section, ranks)
        step()  # makes the optimizer's state
        resident = tracker.live
        tracker.peak = 0
        step()
    return Figures(sum(planned.values()), tracker.peak, resident)


def _sft_step(network: Any, section: SftSection, gpus: int) -> Any:
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    called = network
    if gpus > 1:
        called = DistributedDataParallel(network)
        called.register_comm_hook(None, lambda _, bucket: _reduced(bucket))
    trainer: Any = SimpleNamespace(
        model=network,
        label_tokens=(),
        label_weight=1.0,
        args=SimpleNamespace(average_tokens_across_devices=False),
        _total_train_tokens=0,
        _metrics={"train": {"mean_token_accuracy": []}},
    )
    packed = _packed(section.batch_size, section.max_length)
    labels = torch.full((1, packed.ids.shape[1]), IGNORED)
    labels[0, -len(packed.targets) :] = packed.targets

    def step() -> None:
        for _ in range(2):
            batch = {**arguments(packed), **_image(), "labels": labels, "predicts": packed.predicts}
            loss = SupervisedOnlyTrainer.compute_loss(trainer, called, batch, num_items_in_batch=len(packed.targets))
            torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _reduced(bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The bucket's gradients as they are: the fake collectives answer nothing that DDP takes."""
    future = torch.futures.Future[torch.Tensor]()
    future.set_result(bucket.buffer())
    return future


def _update(network: Any, section: GrpoSection, ranks: DistributedContext) -> Any:
    if section.precision == "bf16-weights":
        network.to(torch.bfloat16)
    policy = PolicyNetwork(network)
    if section.shard_weights:
        whole_copy = shard(policy, section, ranks)
        assert not any(parameter.numel() for parameter in whole_copy.network.parameters())
    optimizer = (FullyShardedAdamW if section.shard_weights else ShardedAdamW)(network, section, ranks)

    def step() -> None:
        packed = _packed(section.group_size, section.pass_tokens // section.group_size)
        weights = torch.full((len(packed.targets),), 1 / len(packed.targets))
        part = Pass(packed, _image(), torch.ones_like(weights), weights)
        accumulate(policy, [part, part], None, 0.2, section)
        optimizer.sum_gradients()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _rollouts(network: Any, section: GrpoSection, ranks: DistributedContext, answers: int) -> Any:
    """Decodes prompts until all answers are as long as the limit, beside the optimizer's state."""
    optimizer = ShardedAdamW(network, section, ranks)
    optimizer.sum_gradients()
    optimizer.step()
    answer = _answers(network, section.max_completion_length, answers)

    def step() -> None:
        optimizer.zero_grad()
        answer()

    return step


def _answers(network: Any, length: int, answers: int) -> Any:
    """Decodes answers to two prompts of unequal length, which need a mask, until all of them have `length` tokens."""
    inputs: Any = SimpleNamespace(token_id={"<|endoftext|>": 0})
    decoder = Decoder(network.eval(), inputs)
    prompts = [
        Encoded([7] * tokens, [], torch.arange(tokens).expand(3, -1).numpy()) for tokens in (PROMPT, PROMPT // 2)
    ]

    def step() -> None:
        batch = decoder.prefill(prompts, [])
        batch.keep_rows(torch.arange(answers) % len(prompts))
        for _ in range(length):
            decoder.extend(batch, [[11]] * answers)

    return step


def _packed(rows: int, length: int) -> Packed:
    """One prompt with the image, and the rows' answers: `rows` x `length` tokens in all."""
    prompt = rows * (length - ANSWER)
    ids = [IMAGE_TOKEN] * IMAGE_SIDE**2 + [7] * (prompt - IMAGE_SIDE**2)
    positions = torch.arange(prompt).expand(3, -1).numpy()
    answers = tuple(completion([11] * ANSWER, prompt) for _ in range(rows))
    return pack([Tree(Branch(ids, positions), answers)])


def _image() -> dict[str, torch.Tensor]:
    side = 2 * IMAGE_SIDE
    return {
        "pixel_values": torch.zeros(side * side, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


@contextmanager
def _ranks(count: int) -> Iterator[DistributedContext]:
    if count == 1:
        yield DistributedContext()
        return
    torch.distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield DistributedContext(0, count)
    finally:
        torch.distributed.destroy_process_group()


def main() -> None:
    """Print one line for each arm."""
    print(f"{'arm':22} {'planned':>9} {'measured':>9} {'ratio':>6} {'between updates':>16}")
    for arm in ARMS:
        figures = measure(arm)
        planned, measured, resident = (value / 1e6 for value in (figures.planned, figures.measured, figures.resident))
        print(f"{arm.name:22} {planned:6.1f} MB {measured:6.1f} MB {planned / measured:6.2f} {resident:13.1f} MB")


if __name__ == "__main__":
    main()
