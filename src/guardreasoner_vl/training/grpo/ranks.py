"""The processes of a launch (`accelerate launch`, `torchrun`), which train one model together; without a launch, one.

Each rank has its part of every batch; sums over the ranks make gradients and figures whole. No wrapper stands around
the model, so that a rank without images, or without any signal, takes part like the others. The main rank writes.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch

from guardreasoner_vl.errors import GuardError, MissingExtraError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from guardreasoner_vl.recipe import GrpoSection

_PATIENCE = timedelta(hours=6)  # a rank waits for the slowest one's rollouts
_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """This process among `count`, and its device. All but `part` and `main` are calls that every rank must make."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of_launch(cls) -> Ranks:
        """Join the others: over NCCL on GPUs, over Gloo on the CPU."""
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise MissingExtraError("accelerate", "train") from error
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def check(self, section: GrpoSection) -> None:
        """Raises `RecipeError` for what so many ranks cannot do."""
        if section.update_batch % self.count:
            raise RecipeError(
                f"grpo.update_batch {section.update_batch} cannot be shared out to {self.count} processes: "
                "use a multiple of their number"
            )
        if self.count > 1 and section.precision == "bf16-weights":
            raise RecipeError("precision bf16-weights is for one process; use bf16")

    def part(self, items: Sequence[_T]) -> list[_T]:
        """What is this rank's of a batch."""
        return list(items[self.rank :: self.count])

    def any(self, flag: bool) -> bool:
        """Whether it holds on a rank."""
        return self.sum([float(flag)])[0] > 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Gradients summed over the ranks; where none stands, zero."""
        for one in parameters:
            if one.grad is None:
                one.grad = torch.zeros_like(one)
            if self.count > 1:
                torch.distributed.all_reduce(one.grad)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work after which all go on or none: what one rank raises, `GuardError` or `FloatingPointError`, stops all."""
        fault: GuardError | FloatingPointError | None = None
        try:
            yield
        except (GuardError, FloatingPointError) as error:
            fault = error
        if self.any(fault is not None):
            raise fault or GuardError("another process failed, and its message says why: start all of them again")


@contextmanager
def told_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come; it no longer kills while this is open, on this process."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only that one may take signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
