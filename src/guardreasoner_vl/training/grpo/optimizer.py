"""AdamW for GRPO, its state shared out over the ranks (ZeRO-1), whole in a checkpoint.

So a run may go on with another number of ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from guardreasoner_vl.training.master_adamw import MasterAdamW, decayed

if TYPE_CHECKING:
    from guardreasoner_vl.recipe import GrpoSection
    from guardreasoner_vl.training.grpo.ranks import Ranks

_BETAS = (0.9, 0.999)


def new_optimizer(model: Any, section: GrpoSection, ranks: Ranks) -> torch.optim.Optimizer:
    """Decay applies to matrices only."""
    parameters = [one for one in model.parameters() if one.requires_grad]
    if section.precision == "bf16-weights":
        return MasterAdamW(parameters, section.learning_rate, _BETAS, section.weight_decay)
    groups = decayed(parameters, section.weight_decay)
    if ranks.count == 1:
        return torch.optim.AdamW(groups, lr=section.learning_rate, betas=_BETAS, fused=True)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    # Not fused: it keeps the number of steps where a fused step on a GPU does not look for it.
    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=section.learning_rate, betas=_BETAS)


def whole_state(optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Any]:
    """The state of all parameters, on the main rank; every rank must call."""
    if ranks.count > 1:
        optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]  # ZeRO's
    return optimizer.state_dict() if ranks.main else {}


def restore(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Take over a `whole_state`, with this optimizer's own settings: `fused` depends on the number of ranks."""
    groups = [
        {**own, "params": theirs["params"]}
        for own, theirs in zip(optimizer.param_groups, stored["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({**stored, "param_groups": groups})
