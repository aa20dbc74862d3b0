"""AdamW for GRPO, with its state sharded over the ranks (ZeRO-1).

Checkpoints hold the whole state, so that a run can resume with another number of ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from guardreasoner_vl.training.master_adamw import MasterAdamW, decayed

if TYPE_CHECKING:
    from guardreasoner_vl.recipe import GrpoSection
    from guardreasoner_vl.training.grpo.ranks import DistributedContext

_BETAS = (0.9, 0.999)


def new_optimizer(model: Any, section: GrpoSection, ranks: DistributedContext) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; weight decay applies to matrices only."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if section.precision == "bf16-weights":
        return MasterAdamW(parameters, section.learning_rate, _BETAS, section.weight_decay)
    groups = decayed(parameters, section.weight_decay)
    if ranks.count == 1:
        return torch.optim.AdamW(groups, lr=section.learning_rate, betas=_BETAS, fused=True)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    # Not fused: ZeRO keeps the step counter on another device than a fused step on a GPU expects.
    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=section.learning_rate, betas=_BETAS)


def whole_state(optimizer: torch.optim.Optimizer, ranks: DistributedContext) -> dict[str, Any]:
    """The state of all parameters on the main rank, an empty one elsewhere; every rank must call this."""
    if ranks.count > 1:
        optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]  # ZeRO's
    return optimizer.state_dict() if ranks.main else {}


def restore(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Load a `whole_state` but keep this optimizer's settings: `fused` depends on the number of ranks."""
    groups = [
        {**current, "params": saved["params"]}
        for current, saved in zip(optimizer.param_groups, stored["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({**stored, "param_groups": groups})
