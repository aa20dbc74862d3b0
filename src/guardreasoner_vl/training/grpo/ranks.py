"""The processes (ranks) of a launch by `accelerate launch` or `torchrun`; a single process without a launch.

Each rank works on its part of every batch; gradients and figures are summed over the ranks. The model is not wrapped
(no DDP), so that a rank whose part has no images or no signal still takes part. Only the main rank writes files.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch

from guardreasoner_vl.errors import GuardError, MissingExtraError, RecipeError
from guardreasoner_vl.training.launch import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from guardreasoner_vl.recipe import GrpoSection

_T = TypeVar("_T")


@dataclass(frozen=True)
class DistributedContext:
    """This process's rank among `count`, and its device. Every rank must call each method except `part` and `main`."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of_launch(cls) -> DistributedContext:
        """Join the process group: over NCCL on GPUs, over Gloo on the CPU."""
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise MissingExtraError("accelerate", "train") from error
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def main(self) -> bool:
        """Whether this rank writes files."""
        return self.rank == 0

    def check(self, section: GrpoSection) -> None:
        """Raises `RecipeError` if this number of ranks cannot train with `section`."""
        if section.update_batch % self.count:
            raise RecipeError(
                f"grpo.update_batch {section.update_batch} cannot be split over {self.count} processes: "
                "use a multiple of their number"
            )

    def part(self, items: Sequence[_T]) -> list[_T]:
        """This rank's items of a batch."""
        return list(items[self.rank :: self.count])

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return self.sum([float(flag)])[0] > 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def gathered(self, values: torch.Tensor) -> torch.Tensor:
        """The values (any number,) of all ranks in main memory, one rank after the other."""
        if self.count == 1:
            return values.cpu()
        parts: list[torch.Tensor] = [values] * self.count
        torch.distributed.all_gather_object(parts, values.cpu())
        return torch.cat(parts)

    def largest(self, value: int) -> int:
        """The largest value of any rank."""
        if self.count == 1:
            return value
        most = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients over the ranks in place, in fp32; a parameter without a gradient gets zeros."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.count > 1:
                total = parameter.grad.float()
                torch.distributed.all_reduce(total)
                parameter.grad.copy_(total)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Overwrite the tensor on every rank with that of rank `source`."""
        if self.count > 1:
            torch.distributed.broadcast(tensor, source)

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Barrier: if any rank raises `GuardError` or `FloatingPointError` inside, every rank raises."""
        fault: GuardError | FloatingPointError | None = None
        try:
            yield
        except (GuardError, FloatingPointError) as error:
            fault = error
        if self.any(fault is not None):
            raise fault or GuardError("another process failed: read its message, then start all processes again")


@contextmanager
def sigterm_flag() -> Iterator[Callable[[], bool]]:
    """A callable that tells whether this process has received SIGTERM, which does not end it inside this context."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)
