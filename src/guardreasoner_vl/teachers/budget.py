"""What teachers cost, and how much may be spent."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.teachers.base import Tokens

_MILLION = 1_000_000


@dataclass(frozen=True)
class Price:
    """USD for a million tokens."""

    input_per_million: float
    output_per_million: float

    def __post_init__(self) -> None:
        if not (self.input_per_million >= 0 and self.output_per_million >= 0):
            raise InputError("a price is not negative: give USD for a million tokens, input and output")

    def of(self, tokens: Tokens) -> float:
        """The cost in USD."""
        return (tokens.prompt * self.input_per_million + tokens.completion * self.output_per_million) / _MILLION

    def batched(self) -> Price:
        """The Batch API's price: half."""
        return Price(self.input_per_million / 2, self.output_per_million / 2)


PRICES = {"gpt-4o-2024-08-06": Price(2.50, 10.00), "rules": Price(0.0, 0.0)}
"""By model. OpenAI's list price of the paper's teacher; another model's is given by hand."""


@dataclass(frozen=True)
class Budget:
    """The most that a corpus's reasoning may take in all, earlier runs included; None is no limit."""

    usd: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.usd is not None and not self.usd >= 0) or (self.tokens is not None and self.tokens < 0):
            raise InputError("a budget is not negative: give USD or tokens")


def price_for(model: str, price: Price | None, budget: Budget | None) -> Price | None:
    """The given price or the known one; raises `InputError` if there is a budget of money and no price."""
    found = price or PRICES.get(model)
    if found is None and budget and budget.usd is not None:
        raise InputError(f"no price is known for {model!r:.60}: give the price of a million tokens, input and output")
    return found


class Purse:
    """What may still be spent. A request reserves the most it may take, and settles for what it took."""

    def __init__(self, budget: Budget | None, price: Price | None, spent: Tokens, cost: float) -> None:
        self._budget, self._price = budget or Budget(), price
        self._spent, self._cost = spent, cost
        self._held, self._in_flight = Tokens(), 0
        self._changed = asyncio.Event()
        self.empty = False
        """Whether a request did not fit in although none was under way."""

    async def reserve(self, most: Tokens) -> bool:
        """Wait until `most` fits in beside what is under way; false if it never will."""
        while not self.empty:
            if self._fits(self._held + most):
                self._held += most
                self._in_flight += 1
                return True
            if self._in_flight:
                await self._changed.wait()
            else:
                self.empty = True
                self._wake()
        return False

    def settle(self, most: Tokens, took: Tokens) -> None:
        """End a reservation of `most`."""
        self._held -= most
        self._in_flight -= 1
        self._spent += took
        self._cost += self._price.of(took) if self._price else 0.0
        self._wake()

    def _fits(self, held: Tokens) -> bool:
        budget = self._budget
        if budget.tokens is not None and (self._spent + held).total > budget.tokens:
            return False
        return budget.usd is None or self._price is None or self._cost + self._price.of(held) <= budget.usd

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
