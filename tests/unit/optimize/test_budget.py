"""A budget is never overshot, whoever asks."""

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.errors import BadInput
from optimize.budget import Budget


@given(st.integers(0, 50), st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=40))
def test_any_order_of_reservations_and_refunds_keeps_the_balance(total: int, steps: list[tuple[bool, int]]) -> None:
    budget = Budget(total)
    held = 0
    for take, n in steps:
        if take:
            granted = budget.reserve(n)
            assert granted == min(n, total - held)
            held += granted
        elif n <= held:
            budget.refund(n)
            held -= n
        else:
            with pytest.raises(BadInput):
                budget.refund(n)
        assert (budget.spent, budget.left) == (held, total - held)


def test_threads_together_never_get_more_than_there_is() -> None:
    budget = Budget(1000)

    def take(seed: int) -> int:
        dice = random.Random(seed)
        return sum(budget.reserve(dice.randint(0, 3)) for _ in range(200))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(8))) == 1000
    assert budget.left == 0


def test_tasks_of_an_event_loop_never_get_more_than_there_is() -> None:
    budget = Budget(37)

    async def take() -> int:
        granted = budget.reserve(5)
        await asyncio.sleep(0)
        return granted

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(take() for _ in range(20)))

    assert sum(asyncio.run(all_of_them())) == 37


def test_negative_numbers_are_refused() -> None:
    for wrong in (lambda: Budget(-1), lambda: Budget(1).reserve(-1), lambda: Budget(1).refund(-1)):
        with pytest.raises(BadInput):
            wrong()
