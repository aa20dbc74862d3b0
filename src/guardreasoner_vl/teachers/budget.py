"""Prices of teachers, and budgets in USD and tokens."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.teachers.base import Tokens

_MILLION = 1_000_000


@dataclass(frozen=True)
class Price:
    """USD per million tokens."""

    input_per_million: float
    output_per_million: float

    def __post_init__(self) -> None:
        if not (self.input_per_million >= 0 and self.output_per_million >= 0):
            raise InputError("a price must not be negative: give USD per million tokens, input and output")

    def of(self, tokens: Tokens) -> float:
        """The cost in USD."""
        return (tokens.prompt * self.input_per_million + tokens.completion * self.output_per_million) / _MILLION

    def batched(self) -> Price:
        """The Batch API's price: half of this one."""
        return Price(self.input_per_million / 2, self.output_per_million / 2)


PRICES = {"gpt-4o-2024-08-06": Price(2.50, 10.00), "rules": Price(0.0, 0.0)}
"""Known prices by model: OpenAI's list price of the paper's teacher. Others must be given."""


@dataclass(frozen=True)
class Budget:
    """Upper limits for the reasoning of a whole corpus, earlier runs included; None means no limit."""

    usd: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.usd is not None and not self.usd >= 0) or (self.tokens is not None and self.tokens < 0):
            raise InputError("a budget must not be negative: give USD or tokens")


def price_for(model: str, price: Price | None, budget: Budget | None) -> Price | None:
    """`price`, else the known price of `model`. Raises `InputError` for a budget in USD without any price."""
    known = price or PRICES.get(model)
    if known is None and budget and budget.usd is not None:
        raise InputError(f"no price is known for {model!r:.60}: give USD per million tokens, input and output")
    return known


class BudgetTracker:
    """Tracks spending. A request first reserves the most it may use, then settles with what it used."""

    def __init__(self, budget: Budget | None, price: Price | None, spent: Tokens, cost: float) -> None:
        self._budget, self._price = budget or Budget(), price
        self._spent, self._cost = spent, cost
        self._reserved, self._in_flight = Tokens(), 0
        self._changed = asyncio.Event()
        self.empty = False
        """Whether a request exceeded the budget although none was in flight."""

    async def reserve(self, most: Tokens) -> bool:
        """Wait until `most` fits beside the requests in flight, and reserve it; False if it never will."""
        while not self.empty:
            if self._fits(self._reserved + most):
                self._reserved += most
                self._in_flight += 1
                return True
            if self._in_flight:
                await self._changed.wait()
            else:
                self.empty = True
                self._wake()
        return False

    def settle(self, most: Tokens, used: Tokens) -> None:
        """End a reservation of `most`, of which `used` was spent."""
        self._reserved -= most
        self._in_flight -= 1
        self._spent += used
        self._cost += self._price.of(used) if self._price else 0.0
        self._wake()

    def _fits(self, reserved: Tokens) -> bool:
        budget = self._budget
        if budget.tokens is not None and (self._spent + reserved).total > budget.tokens:
            return False
        return budget.usd is None or self._price is None or self._cost + self._price.of(reserved) <= budget.usd

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
