from collections.abc import Sequence

import numpy as np
import pytest

from collector.errors import BadInput
from collector.settings import Gate
from optimize.apo.judge import Judge
from optimize.apo.result import HeldOut
from optimize.dataset import make_task

TASKS = [make_task({"id": f"t{number}"}) for number in range(60)]


def judge(method: str = "anytime", tried: int = 1, seed: int = 0, **gate: float) -> Judge:
    return Judge(method, Gate(**gate), tried, seed)  # type: ignore[arg-type]


def scored(before: Sequence[float], after: Sequence[float]) -> list[HeldOut]:
    return [HeldOut(f"t{at}", float(old), float(new)) for at, (old, new) in enumerate(zip(before, after, strict=True))]


def ended(one: Judge, pairs: list[HeldOut], at_once: int = 4) -> tuple[str, int]:
    """The decision, and after how many pairs."""
    for n in range(at_once, len(pairs) + 1, at_once):
        if one.settled(pairs[:n]):
            break
    verdict = one.verdict(pairs[:n])
    assert verdict is not None
    return verdict.decision, n


def test_a_fixed_test_looks_once_and_an_anytime_test_after_each_block_in_a_drawn_order() -> None:
    assert list(judge("fixed").blocks(TASKS, 4)) == [TASKS]
    blocks = list(judge().blocks(TASKS, 4))
    assert [len(block) for block in blocks] == [4] * 15
    order = [task for block in blocks for task in block]
    assert sorted(order, key=TASKS.index) == TASKS != order
    assert list(judge().blocks(TASKS, 4)) == blocks != list(judge(seed=1).blocks(TASKS, 4))


def test_a_clear_gain_and_a_clear_loss_end_an_anytime_test_early_and_a_fixed_test_never() -> None:
    won, lost = scored([0.0] * 60, [1.0] * 60), scored([1.0] * 60, [0.0] * 60)
    assert ended(judge(), won) == ("promote", 12)  # of which ten are needed for any decision
    assert ended(judge(), lost) == ("reject", 12)
    assert ended(judge("fixed"), won) == ("promote", 60)


def test_costs_are_judged_on_all_tasks_so_that_with_a_limit_only_a_loser_ends_early() -> None:
    won, lost = scored([0.0] * 60, [1.0] * 60), scored([1.0] * 60, [0.0] * 60)
    assert ended(judge(max_cost=1.5), won) == ("promote", 60)
    assert ended(judge(max_cost=1.5), lost) == ("reject", 12)


@pytest.mark.parametrize("tried", [1, 6])
def test_no_gain_is_promoted_at_most_alpha_of_the_time_whatever_the_number_of_candidates(tried: int) -> None:
    rng = np.random.default_rng(tried)
    runs = 300 // tried
    false = sum(
        any(
            ended(judge(tried=tried, seed=run), scored(*rng.binomial(1, 0.4, (2, 60))))[0] == "promote"
            for _ in range(tried)
        )
        for run in range(runs)
    )
    assert false / runs <= 0.05 + 2 * (0.05 * 0.95 / runs) ** 0.5


def test_rewards_wider_than_the_configuration_says_are_refused_with_the_key_named() -> None:
    wide = scored([-1.0] * 20, [1.0] * 20)
    with pytest.raises(BadInput, match=r"gate\.span"):
        judge().verdict(wide)
    assert ended(judge(span=2.0), wide)[0] == "promote"
    assert judge().verdict(wide[:1]) is None
    assert judge("fixed").verdict(wide) is not None
