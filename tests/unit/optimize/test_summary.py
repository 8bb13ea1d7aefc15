import json
import math

from hypothesis import given
from hypothesis import strategies as st

from optimize.rollout import Rollout
from optimize.summary import interval, summarise


def rollout(reward: float | None, reason: str | None = None, calls: int | None = 1) -> Rollout:
    return Rollout("t", "run-1", reward, reason is None, reason, "", 0.1, calls, calls, None)


def test_a_failure_counts_as_zero_in_the_mean_and_is_named() -> None:
    found = summarise([rollout(1.0), rollout(1.0), rollout(None, "crash"), rollout(0.9, "timeout")], 2.0)
    assert (found.n, found.failed, found.mean) == (4, 2, 0.5)
    assert found.reasons == {"crash": 1, "timeout": 1}
    assert json.loads(json.dumps(found.as_dict()))["ci95"] == list(found.ci95)


def test_what_the_store_does_not_know_is_not_counted_as_none() -> None:
    found = summarise([rollout(1.0, calls=None), rollout(1.0, calls=3)], 1.0)
    assert (found.calls, found.input_tokens, found.output_tokens) == (3, 3, None)
    assert summarise([rollout(1.0, calls=None)], 1.0).calls is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_the_interval_of_bounded_scores_stays_in_bounds_and_holds_the_mean(scores: list[float]) -> None:
    low, high = interval(scores)
    assert 0.0 <= low <= math.fsum(scores) / len(scores) + 1e-9
    assert math.fsum(scores) / len(scores) - 1e-9 <= high <= 1.0


def test_twenty_of_twenty_is_not_certainty() -> None:
    low, high = interval([1.0] * 20)
    assert high == 1.0
    assert 0.8 < low < 0.98


def test_scores_beyond_one_have_an_interval_of_their_own() -> None:
    low, high = interval([-3.0, 5.0, 1.0, 9.0])
    assert low < 3.0 < high
    assert interval([7.0]) == (-math.inf, math.inf)
