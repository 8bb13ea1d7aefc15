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


@given(
    st.integers(1, 60),
    st.integers(200, 5000),
    st.integers(0, 6),
    st.lists(st.integers(20, 100), min_size=80, max_size=80),
    st.integers(1, 9),
)
def test_tokens_are_never_overshot_while_no_rollout_costs_a_quarter_more_than_the_dearest_before(
    rollouts: int, tokens: int, keep: int, costs: list[int], block: int
) -> None:
    budget = Budget(rollouts, tokens=tokens, keep=keep)
    dearest, used, paid = 100, 0, iter(costs)
    budget.settle(tokens=dearest)  # the rollout that tells the price
    used += dearest
    while granted := budget.reserve(block):
        for cost in [next(paid) for _ in range(granted)]:
            used += cost
            budget.settle(tokens=cost)
    assert used + keep * dearest <= max(tokens, dearest + keep * dearest)
    assert budget.spent <= rollouts
    assert budget.used["tokens"] == used
    assert budget.affordable(keep) == keep or used + keep * 1.25 * dearest > tokens


def test_before_a_price_is_known_one_rollout_is_granted() -> None:
    budget = Budget(100, usd=1.0)
    assert budget.reserve(8) == 1
    budget.settle(usd=0.1)
    assert budget.reserve(100) == 7  # 0.9 left at 0.125 each


def test_seconds_run_out_with_the_clock_and_leave_time_for_what_is_kept() -> None:
    now = [0.0]
    budget = Budget(100, seconds=60.0, keep=4, at_once=2, clock=lambda: now[0])
    budget.reserve(1)
    budget.settle(seconds=4.0)
    assert budget.reserve(100) == 20  # 12 waves of 5 seconds, two at once, less the four that are kept
    now[0] = 55.0
    assert (budget.reserve(10), budget.left) == (0, 0)
    assert budget.affordable(4) == 2
    budget.start_from(100.0)
    assert budget.affordable(4) == 0


def test_a_call_of_the_optimizers_model_is_within_the_budget_too() -> None:
    budget = Budget(100, tokens=1000, keep=2)
    budget.settle(tokens=100)
    assert budget.affords_call()
    budget.settle_call(tokens=500)
    assert not budget.affords_call()  # 400 are left, 250 kept, and a call may take 625
    assert Budget(1).affords_call()


def test_a_part_of_a_budget_spends_the_whole() -> None:
    whole = Budget(10)
    part = whole.part(4)
    assert (part.reserve(6), part.left, whole.left) == (4, 0, 6)
    part.refund(1)
    assert (part.left, whole.left) == (1, 7)
    assert whole.part(50).reserve(50) == 7
    assert part.reserve(1) == 0


@pytest.mark.parametrize("limit", ["tokens", "usd", "seconds"])
def test_a_limit_of_nothing_is_refused_by_its_name(limit: str) -> None:
    with pytest.raises(BadInput, match=f"budget-{limit}"):
        Budget(1, **{limit: 0})  # type: ignore[arg-type]
