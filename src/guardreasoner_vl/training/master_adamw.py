"""AdamW for a bf16 model: it updates fp32 master copies of the weights, with fp32 moments.

Autocast keeps fp32 weights and casts at every operation; on a CPU with bf16 arithmetic a bf16 model is faster, and the
fp32 copies keep small updates from being rounded away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MASTERS = "masters"
"""The key of the copies in the state."""


def decayed(parameters: Sequence[torch.Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with weight decay for matrices only."""
    return [
        {"params": [tensor for tensor in parameters if tensor.dim() > 1], "weight_decay": weight_decay},
        {"params": [tensor for tensor in parameters if tensor.dim() <= 1], "weight_decay": 0.0},
    ]


class MasterAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` on fp32 copies of `parameters`; decay applies to matrices only.

    The copies are part of the state, so a resumed run continues exactly.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.masters = [parameter.detach().float().clone() for parameter in self._parameters]
        super().__init__(decayed(self.masters, weight_decay), lr=lr, betas=betas, fused=True)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update; parameters without a gradient do not change."""
        for master, parameter in zip(self.masters, self._parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        loss = super().step(closure)
        with torch.no_grad():
            for master, parameter in zip(self.masters, self._parameters, strict=True):
                parameter.copy_(master)
                master.grad = None  # it takes as much memory as the copy
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the parameters and of their fp32 copies."""
        for parameter in self._parameters:
            parameter.grad = None
        super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state of AdamW, with the fp32 copies under the key `MASTERS`."""
        return {**super().state_dict(), MASTERS: [master.clone() for master in self.masters]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore AdamW and the fp32 copies; the bf16 parameters are not changed."""
        state = dict(state_dict)
        with torch.no_grad():
            for master, stored in zip(self.masters, state.pop(MASTERS), strict=True):
                master.copy_(stored)
        super().load_state_dict(state)
