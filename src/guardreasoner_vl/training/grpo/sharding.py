"""Sharded weights for GRPO: each rank holds its share of weights, gradients and AdamW's state (FSDP2).

A forward pass gathers the weights of one layer at a time and frees them afterwards. All ranks must therefore make the
same number of passes and call every layer in each (`update.Passes`). Generation cannot, as answers differ in length:
rollouts run on an unsharded copy of the network in the computing precision, which holds weights only meanwhile.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from guardreasoner_vl.training.grpo.optimizer import BETAS, MOMENTS, by_decay
from guardreasoner_vl.training.master_adamw import decayed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guardreasoner_vl.recipe import GrpoSection
    from guardreasoner_vl.training.grpo.ranks import DistributedContext
    from guardreasoner_vl.training.grpo.update import PolicyNetwork


class WholeCopy:
    """An unsharded copy of the network `model`, which holds weights only inside `filled`."""

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._source, self._dtype = model, dtype
        # `deepcopy` takes these empty tensors for its copies of the weights: tied weights stay tied, no memory is used.
        empty = {
            id(parameter): torch.nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
            for parameter in model.parameters()
        }
        self.network = copy.deepcopy(model, empty).to(device)

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Lend the copy the present weights, gathered from all ranks; every rank must call it."""
        targets = list(self.network.parameters())
        for target, parameter in zip(targets, self._source.parameters(), strict=True):
            target.data = gather_whole(parameter.detach().to(self._dtype))
        try:
            yield
        finally:
            for target in targets:
                target.data = target.new_empty(0)


def shard(policy: PolicyNetwork, section: GrpoSection, ranks: DistributedContext) -> WholeCopy:
    """Shard the policy's network in place and move it to this rank's device; returns its copy for rollouts.

    Layers are gathered one by one, the weights before and after them once in each pass.
    """
    network = policy.network
    computing = torch.bfloat16 if section.precision == "bf16" else torch.float32
    whole_copy = WholeCopy(network, computing, ranks.device)
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    # Gradients are summed in fp32. Inputs are not cast: the tower's rotary embeddings are fp32 with any weights.
    numbers = MixedPrecisionPolicy(computing, torch.float32, cast_forward_inputs=False)
    units = [*network.model.visual.blocks, *network.model.language_model.layers]
    if network.lm_head.weight is not network.get_input_embeddings().weight:
        units.append(network.get_input_embeddings())
    for unit in (*units, policy):
        fully_shard(unit, mesh=mesh, mp_policy=numbers)
    return whole_copy


def drop_gathered(policy: PolicyNetwork) -> None:
    """Free the weights that a forward pass without a backward pass leaves gathered; nothing to do without sharding.

    Otherwise the next passes would compute with them even if a step has changed the shares since.
    """
    if isinstance(policy, FSDPModule):
        policy.reshard()


class FullyShardedAdamW:
    """AdamW on this rank's shares of all trainable parameters; `whole_state` has the form of `ShardedAdamW`'s.

    Every rank must call each method.
    """

    def __init__(self, model: Any, section: GrpoSection, ranks: DistributedContext) -> None:
        self._ranks = ranks
        self._parameters = by_decay(model)
        groups = decayed(self._parameters, section.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=section.learning_rate, betas=BETAS, fused=True)

    def zero_grad(self) -> None:
        """Drop the gradients of all parameters."""
        self._optimizer.zero_grad()

    def sum_gradients(self) -> None:
        """Turn the means over the ranks, which FSDP computes, into sums; a parameter without a gradient gets zeros."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.mul_(self._ranks.count)

    def step(self) -> None:
        """Update all parameters."""
        self._optimizer.step()

    def whole_state(self) -> dict[str, Any]:
        """The state of all parameters after a step, in main memory on the main rank; an empty one elsewhere."""
        states = {}
        for place, parameter in enumerate(self._parameters):
            state = self._optimizer.state[parameter]
            tensors = {name: gather_whole(state[name]) for name in MOMENTS}
            if self._ranks.main:
                states[place] = {name: tensor.cpu() for name, tensor in tensors.items()}
        return {"state": states} if self._ranks.main else {}

    def restore(self, stored: dict[str, Any]) -> None:
        """Load this rank's shares of a `whole_state`."""
        content = self._optimizer.state_dict()
        content["state"] = {
            place: {"step": state["step"], **{name: shard_like(state[name], parameter) for name in MOMENTS[1:]}}
            for (place, state), parameter in zip(stored["state"].items(), self._parameters, strict=True)
        }
        self._optimizer.load_state_dict(content)


def gather_whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered from the ranks if it is sharded; every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The whole tensor as it is, or sharded as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def trained_weights(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The names and weights that are trained; the frozen ones equal the start model's."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def whole_weights(model: Any, ranks: DistributedContext) -> dict[str, torch.Tensor]:
    """The trained weights by name in main memory on the main rank; none elsewhere. Every rank must call it."""
    weights = {}
    for name, parameter in trained_weights(model):
        tensor = gather_whole(parameter.detach())
        if ranks.main:
            weights[name] = tensor.contiguous().cpu()
    return weights
