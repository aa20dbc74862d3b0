"""AdamW for GRPO, with its state sharded over the ranks (ZeRO-1).

Each rank updates its share of the parameters and sends them to the others. Checkpoints hold the whole state, so that a
run can resume with another number of ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from guardreasoner_vl.training.master_adamw import MASTERS, MasterAdamW, decayed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.recipe import GrpoSection
    from guardreasoner_vl.training.grpo.ranks import DistributedContext

BETAS = (0.9, 0.999)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_MASTER = "master"


class ShardedAdamW:
    """AdamW over the trainable parameters of `model`; weight decay applies to matrices only.

    Every rank must call each method. With precision `bf16-weights` the state includes fp32 copies of the weights.
    """

    def __init__(self, model: Any, section: GrpoSection, ranks: DistributedContext) -> None:
        self._ranks = ranks
        self._parameters = by_decay(model)
        self._owners = balanced_owners([parameter.numel() for parameter in self._parameters], ranks.count)
        self._shard = [place for place, owner in enumerate(self._owners) if owner == ranks.rank]
        shard = [self._parameters[place] for place in self._shard]
        self._optimizer: torch.optim.AdamW
        self._updated: Sequence[torch.Tensor]
        self._with_masters = section.precision == "bf16-weights"
        if self._with_masters:
            of_masters = MasterAdamW(shard, section.learning_rate, BETAS, section.weight_decay)
            self._optimizer, self._updated = of_masters, of_masters.masters
        else:
            groups = decayed(shard, section.weight_decay)
            self._optimizer = torch.optim.AdamW(groups, lr=section.learning_rate, betas=BETAS, fused=True)
            self._updated = shard

    def zero_grad(self) -> None:
        """Drop the gradients of all parameters."""
        for parameter in self._parameters:
            parameter.grad = None

    def sum_gradients(self) -> None:
        """Sum the gradients over the ranks."""
        self._ranks.sum_gradients(self._parameters)

    def step(self) -> None:
        """Update all parameters; their gradients must be equal on all ranks."""
        self._optimizer.step()
        for parameter, owner in zip(self._parameters, self._owners, strict=True):
            self._ranks.broadcast(parameter.detach(), owner)

    def whole_state(self) -> dict[str, Any]:
        """The state of all parameters after a step, in main memory on the main rank; an empty one elsewhere.

        Ranks send it tensor by tensor, so that a device holds at most one tensor beside its shard.
        """
        updated = dict(zip(self._shard, self._updated, strict=True))
        whole = {}
        for place, parameter in enumerate(self._parameters):
            state: dict[str, torch.Tensor] = {}
            if place in updated:
                state = {**self._optimizer.state[updated[place]], _MASTER: updated[place]}
            shapes: dict[str, Sequence[int]] = {name: () if name == "step" else parameter.shape for name in MOMENTS}
            if self._with_masters:
                shapes[_MASTER] = parameter.shape
            whole[place] = {name: self._sent(state.get(name), shape, place) for name, shape in shapes.items()}
        return {"state": whole} if self._ranks.main else {}

    def restore(self, stored: dict[str, Any]) -> None:
        """Load this rank's share of a `whole_state`."""
        states = [stored["state"][place] for place in self._shard]
        content = self._optimizer.state_dict()
        content["state"] = {number: {name: state[name] for name in MOMENTS} for number, state in enumerate(states)}
        if self._with_masters:
            content[MASTERS] = [state[_MASTER] for state in states]
        self._optimizer.load_state_dict(content)

    def _sent(self, tensor: torch.Tensor | None, shape: Sequence[int], place: int) -> torch.Tensor:
        """An fp32 tensor of a parameter's state, None but on the parameter's owner; in main memory on the main rank."""
        if tensor is None:
            tensor = torch.empty(shape, device=self._ranks.device)
        self._ranks.broadcast(tensor, self._owners[place])
        return tensor.cpu() if self._ranks.main else tensor.new_empty(0)


def by_decay(model: Any) -> list[torch.nn.Parameter]:
    """The trainable parameters in the order of checkpoints: matrices first, as `decayed` groups them."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sorted(trainable, key=lambda parameter: parameter.dim() <= 1)


def balanced_owners(sizes: Sequence[int], count: int) -> list[int]:
    """The rank that updates each parameter: from the largest on, the rank with the fewest elements so far."""
    owners, loads = [0] * len(sizes), [0] * count
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        owners[place] = loads.index(min(loads))
        loads[owners[place]] += sizes[place]
    return owners
