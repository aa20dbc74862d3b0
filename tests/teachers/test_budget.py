"""What teachers cost and how much may be spent: hand-computed, and never exceeded."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.teachers.base import Tokens
from guardreasoner_vl.teachers.budget import PRICES, Budget, BudgetTracker, Price, price_for


def test_prices_by_hand() -> None:
    # 2,000 tokens at 2.50 and 500 at 10.00 a million.
    assert PRICES["gpt-4o-2024-08-06"].of(Tokens(2_000, 500)) == pytest.approx(0.005 + 0.005)
    assert PRICES["gpt-4o-2024-08-06"].batched() == Price(1.25, 5.00)
    assert PRICES["rules"].of(Tokens(10**9, 10**9)) == 0


def test_money_needs_a_price_and_tokens_do_not() -> None:
    assert price_for("rules", None, Budget(usd=1)) == Price(0, 0)
    assert price_for("odd", Price(1, 2), Budget(usd=1)) == Price(1, 2)
    assert price_for("odd", None, Budget(tokens=5)) is None
    assert price_for("odd", None, None) is None
    with pytest.raises(InputError, match="no price is known for 'odd': give USD per million tokens"):
        price_for("odd", None, Budget(usd=1))


@pytest.mark.parametrize("number", [-1, float("nan")])
def test_nothing_is_negative(number: float) -> None:
    with pytest.raises(InputError, match="must not be negative"):
        Price(number, 1)
    with pytest.raises(InputError, match="must not be negative"):
        Budget(usd=number)
    with pytest.raises(InputError, match="must not be negative"):
        Budget(tokens=-1)


async def test_a_request_waits_for_those_under_way_and_gives_up_when_none_is() -> None:
    budget = BudgetTracker(Budget(tokens=100), None, Tokens(30, 10), 0.0)
    assert await budget.reserve(Tokens(30, 20))
    second = asyncio.create_task(budget.reserve(Tokens(10, 10)))
    await asyncio.sleep(0.01)
    assert not second.done()
    # It took 30 of the 50 held: 70 spent, 30 left.
    budget.settle(Tokens(30, 20), Tokens(20, 10))
    assert await second
    budget.settle(Tokens(10, 10), Tokens(10, 10))
    assert not await budget.reserve(Tokens(11, 0))
    assert budget.empty
    # Once said, it holds for smaller ones too.
    assert not await budget.reserve(Tokens(1, 0))


async def test_waiting_requests_are_refused_when_the_budget_is_spent() -> None:
    budget = BudgetTracker(Budget(usd=1.0), Price(1_000_000, 0), Tokens(), 0.25)
    assert await budget.reserve(Tokens(0, 500))
    waiting = [asyncio.create_task(budget.reserve(Tokens(1, 0))) for _ in range(3)]
    await asyncio.sleep(0.01)
    budget.settle(Tokens(0, 500), Tokens())
    assert await asyncio.gather(*waiting) == [False] * 3


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=30), st.integers(0, 300))
def test_a_budget_is_never_exceeded_and_never_left_for_no_reason(asks: list[tuple[int, float]], limit: int) -> None:
    taken: list[int] = []
    refused: list[int] = []

    async def work() -> None:
        budget = BudgetTracker(Budget(tokens=limit), None, Tokens(), 0.0)

        async def ask(most: int, share: float) -> None:
            if not await budget.reserve(Tokens(most)):
                refused.append(most)
                return
            await asyncio.sleep(0)
            taken.append(int(most * share))
            budget.settle(Tokens(most), Tokens(taken[-1]))

        await asyncio.wait_for(asyncio.gather(*(ask(most, share) for most, share in asks)), 5)

    asyncio.run(work())
    assert len(taken) + len(refused) == len(asks)
    assert sum(taken) <= limit
    assert not refused or sum(taken) + max(refused) > limit
