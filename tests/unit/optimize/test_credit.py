"""The identities that credit functions must keep, on random episodes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.errors import BadInput
from optimize import credit

NAN = math.nan
numbers = st.floats(-100, 100, allow_subnormal=False)
shares = st.floats(0, 1)


def series(size: int) -> st.SearchStrategy[list[float]]:
    return st.lists(numbers, min_size=size, max_size=size)


# Rewards (T,) and values (T+1,).
episodes = st.integers(1, 12).flatmap(lambda size: st.tuples(series(size), series(size + 1)))
returns_with_gaps = st.lists(st.one_of(numbers, st.just(NAN)), min_size=1, max_size=12)
grouped = st.lists(st.tuples(st.one_of(numbers, st.just(NAN)), st.integers(0, 3)), min_size=1, max_size=16)


def assert_close(left: Any, right: Any) -> None:
    np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-8)


@given(episodes, shares)
def test_gae_with_lambda_one_is_the_return_with_bootstrap_minus_the_value(
    episode: tuple[list[float], list[float]], gamma: float
) -> None:
    rewards, values = episode
    size = len(rewards)
    returns = credit.discounted(rewards, gamma) + gamma ** np.arange(size, 0, -1) * values[-1]
    assert_close(credit.gae(rewards, values, gamma, 1), returns - values[:-1])
    assert_close(credit.gae(rewards, np.zeros(size + 1), gamma, 1), credit.discounted(rewards, gamma))


@given(episodes, shares)
def test_gae_with_lambda_zero_is_the_td_residual(episode: tuple[list[float], list[float]], gamma: float) -> None:
    rewards, values = episode
    assert_close(credit.gae(rewards, values, gamma, 0), np.array(rewards) + gamma * np.array(values[1:]) - values[:-1])


@given(episodes, shares, shares)
def test_gae_recursion_equals_the_explicit_sum(
    episode: tuple[list[float], list[float]], gamma: float, lam: float
) -> None:
    rewards, values = episode
    deltas = [r + gamma * after - before for r, before, after in zip(rewards, values, values[1:], strict=False)]
    explicit = [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]
    assert_close(credit.gae(rewards, values, gamma, lam), explicit)


@given(episodes, shares, shares)
def test_lambda_returns_are_the_value_plus_gae(
    episode: tuple[list[float], list[float]], gamma: float, lam: float
) -> None:
    rewards, values = episode
    assert_close(credit.td_lambda(rewards, values, gamma, lam), credit.gae(rewards, values, gamma, lam) + values[:-1])


@given(episodes, shares)
def test_lambda_returns_go_from_one_step_to_the_whole_return(
    episode: tuple[list[float], list[float]], gamma: float
) -> None:
    rewards, values = episode
    one_step = np.array(rewards) + gamma * np.array(values[1:])
    assert_close(credit.td_lambda(rewards, values, gamma, 0), one_step)
    ended = [*values[:-1], 0.0]
    assert_close(credit.td_lambda(rewards, ended, gamma, 1), credit.discounted(rewards, gamma))


@given(grouped)
def test_leave_one_out_sums_to_zero_per_group_and_is_the_scaled_distance_from_the_mean(
    pairs: list[tuple[float, int]],
) -> None:
    returns, groups = np.array([one for one, _ in pairs]), np.array([label for _, label in pairs])
    advantages = credit.leave_one_out(returns, groups)
    for label in set(groups):
        observed = returns[(groups == label) & ~np.isnan(returns)]
        mine = advantages[(groups == label) & ~np.isnan(returns)]
        assert_close(mine.sum(), 0)
        if len(observed) > 1:
            others = [np.delete(observed, at).mean() for at in range(len(observed))]
            assert_close(mine, observed - others)
        else:
            assert not mine.any()


@given(returns_with_gaps, numbers)
def test_a_constant_added_to_all_returns_changes_no_baselined_advantage(returns: list[float], shift: float) -> None:
    moved = np.array(returns) + shift
    assert_close(credit.leave_one_out(moved), credit.leave_one_out(returns))
    # A fixed eps of this size keeps rounding of equal-but-for-rounding rewards out of the comparison.
    assert_close(credit.group(moved, [0] * len(moved), eps=0.1), credit.group(returns, [0] * len(returns), eps=0.1))


@given(grouped)
def test_group_has_zero_mean_and_at_most_unit_spread(pairs: list[tuple[float, int]]) -> None:
    returns, groups = [one for one, _ in pairs], np.array([label for _, label in pairs])
    advantages = credit.group(returns, groups)
    for label in set(groups):
        mine = advantages[groups == label]
        mine = mine[~np.isnan(mine)]
        if len(mine):
            assert abs(mine.mean()) < 1e-6
            assert mine.std() <= 1 + 1e-6


def test_group_is_the_documented_formula() -> None:
    advantages = credit.group([1.0, 2.0, 6.0, 5.0, NAN], ["a", "a", "a", "b", "b"], eps=0.5)
    expected = (np.array([1.0, 2.0, 6.0]) - 3) / (math.sqrt(14 / 3) + 0.5)
    assert_close(advantages[:3], expected)
    assert advantages[3] == 0
    assert math.isnan(advantages[4])


@given(numbers, st.integers(1, 9))
def test_equal_rewards_give_exactly_zero(reward: float, count: int) -> None:
    assert not credit.group([reward] * count, [1.5] * count).any()
    assert credit.group([0.1 + 0.2, 0.3], ["g", "g"]).tolist() == [0.0, 0.0]


@given(episodes, shares)
def test_shaping_telescopes(episode: tuple[list[float], list[float]], gamma: float) -> None:
    rewards, potentials = episode
    size = len(rewards)
    added = credit.shaped(rewards, potentials, gamma) - rewards
    assert_close(gamma ** np.arange(size) @ added, gamma**size * potentials[-1] - potentials[0])
    ended = [*potentials[:-1], 0.0]
    whole = credit.discounted(credit.shaped(rewards, ended, gamma), gamma)[0]
    assert_close(whole, credit.discounted(rewards, gamma)[0] - ended[0])


@given(episodes, shares, shares, st.data())
def test_shaping_leaves_gae_unchanged_when_the_values_drop_the_potential(
    episode: tuple[list[float], list[float]], gamma: float, lam: float, data: st.DataObject
) -> None:
    rewards, values = episode
    potentials = np.array(data.draw(series(len(values))))
    after = credit.gae(credit.shaped(rewards, potentials, gamma), np.array(values) - potentials, gamma, lam)
    assert_close(after, credit.gae(rewards, values, gamma, lam))


@given(st.integers(1, 12).flatmap(series), numbers, shares)
def test_discounting_has_its_known_limits(rewards: list[float], final: float, gamma: float) -> None:
    assert_close(credit.discounted(rewards, 1), np.cumsum(rewards[::-1])[::-1])
    assert_close(credit.discounted(rewards, 0), rewards)
    size = len(rewards)
    assert_close(credit.discounted([0.0] * (size - 1) + [final], gamma), gamma ** np.arange(size - 1, -1, -1) * final)


@given(numbers, st.integers(0, 20))
def test_broadcast_gives_every_step_exactly_the_reward(reward: float, steps: int) -> None:
    assert credit.broadcast(reward, steps).tolist() == [reward] * steps


@given(st.lists(st.tuples(numbers, st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=8))
def test_tokens_repeat_their_steps_advantage_and_others_get_zero(rows: list[tuple[float, int, int]]) -> None:
    advantages = [one for one, _, _ in rows]
    steps = [label for at, (_, written, seen) in enumerate(rows) for label in [-1] * seen + [at] * written]
    tokens = credit.to_tokens(advantages, steps)
    assert_close(tokens.sum(), sum(one * written for one, written, _ in rows))
    for at, one in enumerate(advantages):
        assert set(tokens[np.array(steps) == at]) == {one}
    assert not tokens[np.array(steps) == -1].any()


METHODS_ON_RETURNS: list[Callable[[Any, Any], Any]] = [credit.leave_one_out, credit.group]


@pytest.mark.parametrize("method", METHODS_ON_RETURNS)
@given(pairs=grouped)
def test_missing_returns_come_out_missing_and_change_nobody_else(
    method: Callable[[Any, Any], Any], pairs: list[tuple[float, int]]
) -> None:
    returns, groups = np.array([one for one, _ in pairs]), np.array([label for _, label in pairs])
    seen = ~np.isnan(returns)
    advantages = method(returns, groups)
    assert np.isnan(advantages).tolist() == (~seen).tolist()
    np.testing.assert_array_equal(advantages[seen], method(returns[seen], groups[seen]))


def test_a_reward_of_zero_is_kept() -> None:
    assert credit.leave_one_out([0.0, 1.0]).tolist() == [-1.0, 1.0]
    assert np.isnan(credit.leave_one_out([NAN, NAN])).all()
    np.testing.assert_array_equal(credit.leave_one_out([None, 1.0, 3.0]), [NAN, -2.0, 2.0])


@pytest.mark.parametrize("method", METHODS_ON_RETURNS)
@given(pairs=grouped, data=st.data())
def test_permuting_episodes_permutes_the_answer(
    method: Callable[[Any, Any], Any], pairs: list[tuple[float, int]], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(pairs))))
    returns, groups = np.array([one for one, _ in pairs]), [str(label) for _, label in pairs]
    # Equal but for rounding is decided on the values, so the same for any order.
    moved = method(returns[order], [groups[at] for at in order])
    np.testing.assert_allclose(moved, method(returns, groups)[order], rtol=1e-6, atol=1e-6)


Steps = list[tuple[float, int, int]]  # (return-to-go, anchor, episode)
steps_of_episodes = st.lists(st.tuples(numbers, st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=20)
totals_of_episodes = st.lists(st.one_of(numbers, st.just(NAN)), min_size=5, max_size=5)


def columns(steps: Steps, totals: Sequence[float]) -> tuple[list[float], list[int], list[float], list[int]]:
    going, anchors, owners = (list(column) for column in zip(*steps, strict=True))
    return going, anchors, [totals[owner] for owner in owners], owners  # type: ignore[index, return-value, misc]


@given(steps_of_episodes, totals_of_episodes)
def test_gigpo_without_weight_is_the_group_advantage_of_the_episodes(steps: Steps, totals: list[float]) -> None:
    going, anchors, returns, owners = columns(steps, totals)
    present = sorted(set(owners))
    by_episode = dict(zip(present, credit.group([totals[one] for one in present], [0] * len(present)), strict=True))
    assert_close(credit.gigpo(going, anchors, returns, owners, 0.0), [by_episode[owner] for owner in owners])


@pytest.mark.parametrize("normalise", [True, False])
@given(steps=steps_of_episodes, totals=totals_of_episodes, weight=st.floats(0, 3))
def test_gigpo_steps_sum_to_zero_per_anchor(normalise: bool, steps: Steps, totals: list[float], weight: float) -> None:
    going, anchors, returns, owners = columns(steps, totals)
    without = credit.gigpo(going, anchors, returns, owners, 0.0, normalise=normalise)
    local = credit.gigpo(going, anchors, returns, owners, weight, normalise=normalise) - without
    assert np.isnan(local).tolist() == np.isnan(returns).tolist()
    for anchor in set(anchors):
        mine = local[np.array(anchors) == anchor]
        mine = mine[~np.isnan(mine)]
        assert abs(mine.sum()) < 1e-5
        if len(mine) == 1:
            assert mine[0] == 0


def test_gigpo_counts_an_episode_once_however_long_it_is() -> None:
    short = credit.gigpo([1.0, 0.0], ["x", "y"], [1.0, 0.0], ["a", "b"], 0.0)
    long = credit.gigpo([1.0, *[0.0] * 9], range(10), [1.0, *[0.0] * 9], ["a", *["b"] * 9], 0.0)
    assert_close(long[0], short[0])
    assert_close(long[1:], short[1])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: credit.discounted([1.0, NAN], 1.0), "rewards"),
        (lambda: credit.discounted([1.0], 1.1), "gamma"),
        (lambda: credit.discounted([[1.0]], 1.0), "rewards"),
        (lambda: credit.discounted(["x"], 1.0), "rewards"),
        (lambda: credit.gae([1.0], [0.0], 1.0, 1.0), "values"),
        (lambda: credit.gae([1.0], [0.0, math.inf], 1.0, 1.0), "values"),
        (lambda: credit.gae([1.0], [0.0, 0.0], 1.0, NAN), "lam"),
        (lambda: credit.td_lambda([None], [0.0, 0.0], 1.0, 1.0), "rewards"),
        (lambda: credit.shaped([1.0], [0.0], 1.0), "potentials"),
        (lambda: credit.broadcast(NAN, 2), "reward"),
        (lambda: credit.broadcast(1.0, -1), "steps"),
        (lambda: credit.leave_one_out([1.0, math.inf]), "returns"),
        (lambda: credit.group([1.0, -math.inf], [0, 0]), "returns"),
        (lambda: credit.group([1.0], [NAN]), "groups"),
        (lambda: credit.group([1.0], []), "groups"),
        (lambda: credit.group([1.0, 2.0], [0, 0], eps=-1.0), "eps"),
        (lambda: credit.gigpo([NAN], [0], [1.0], [0], 1.0), "step_returns"),
        (lambda: credit.gigpo([math.inf], [0], [NAN], [0], 1.0), "step_returns"),
        (lambda: credit.gigpo([1.0, 1.0], [0, 0], [1.0, 2.0], [0, 0], 1.0), "episode_returns"),
        (lambda: credit.gigpo([1.0], [0, 1], [1.0], [0], 1.0), "anchors"),
        (lambda: credit.gigpo([1.0], [0], [1.0], [None], 1.0), "episodes"),
        (lambda: credit.gigpo([1.0], [0], [1.0], [0], NAN), "weight"),
        (lambda: credit.to_tokens([1.0], [1]), "steps"),
        (lambda: credit.to_tokens([1.0], [0.5]), "steps"),
    ],
)
def test_bad_numbers_are_refused_by_name(call: Callable[[], object], name: str) -> None:
    with pytest.raises(BadInput) as caught:
        call()
    assert caught.value.param == name
    assert name in caught.value.message
