"""Unbiasedness, exactly: every possible episode of small decision problems, weighed by its probability.

The expected value of (advantage x score) must be the policy gradient in closed form. No sampling, so no luck.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest

from bench.mdp import MDP, chain, key_door, lock, score, walk
from optimize import credit

PROBLEMS = [chain(4, 1), chain(3, 2), key_door(2), lock(3), walk(3, 4, gamma=0.9)]
SMALL = [chain(3, 1), key_door(1), lock(3), walk(2, 3, gamma=1.0)]


def policy(problem: MDP) -> Any:
    return np.random.default_rng(7).normal(0, 0.7, problem.gains.shape)


def expected(problem: MDP, theta: Any, advantages: Callable[[list[int], list[float]], Any]) -> Any:
    """E of sum_t gamma^t A_t d log pi, over all episodes."""
    total = np.zeros_like(theta)
    for chance, states, actions, rewards in problem.trajectories(theta):
        factors = problem.gamma ** np.arange(len(states)) * advantages(states, rewards)
        total += chance * score(theta, states, actions, factors)
    return total


def along(values: Any, states: Sequence[int], horizon: int) -> Any:
    """V of each step's state, and 0 at the end."""
    return np.append(values[np.arange(len(states)), states], 0.0)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_with_the_true_values_has_no_bias_for_any_lambda(problem: MDP, lam: float) -> None:
    theta = policy(problem)
    values, _ = problem.values(theta)

    def with_gae(states: list[int], rewards: list[float]) -> Any:
        return credit.gae(rewards, along(values, states, problem.horizon), problem.gamma, lam)

    def with_targets(states: list[int], rewards: list[float]) -> Any:
        known = along(values, states, problem.horizon)
        return credit.td_lambda(rewards, known, problem.gamma, lam) - known[:-1]

    for method in (with_gae, with_targets):
        np.testing.assert_allclose(expected(problem, theta, method), problem.gradient(theta), atol=1e-12)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_returns_broadcast_discounted_and_shaped_have_no_bias(problem: MDP) -> None:
    theta = policy(problem)
    potential = np.random.default_rng(1).normal(0, 1, (problem.horizon + 1, len(theta) + 1))

    def whole(states: list[int], rewards: list[float]) -> Any:
        # The whole discounted return, on every step; gamma^t is taken out because `expected` puts it in.
        total = float(credit.discounted(rewards, problem.gamma)[0])
        return credit.broadcast(total, len(rewards)) / problem.gamma ** np.arange(len(rewards))

    def reshaped(states: list[int], rewards: list[float]) -> Any:
        phi = along(potential, states, problem.horizon)
        return credit.discounted(credit.shaped(rewards, phi, problem.gamma), problem.gamma)

    def returns(states: list[int], rewards: list[float]) -> Any:
        return credit.discounted(rewards, problem.gamma)

    for method in (whole, returns, reshaped):
        np.testing.assert_allclose(expected(problem, theta, method), problem.gradient(theta), atol=1e-12)


def test_a_wrong_value_biases_small_lambda_and_not_lambda_one() -> None:
    problem = chain(4, 1)
    theta = policy(problem)
    wrong = problem.values(theta)[0] + np.random.default_rng(2).normal(0, 1, (5, len(theta) + 1))

    def bias(lam: float) -> float:
        found = expected(problem, theta, lambda states, r: credit.gae(r, along(wrong, states, 4), 1.0, lam))
        return float(np.abs(found - problem.gradient(theta)).max())

    assert bias(1.0) < 1e-12
    assert bias(0.0) > 0.01


def pairs(problem: MDP, theta: Any, advantages: Callable[[list[Any]], list[Any]]) -> Any:
    """E of the mean gradient estimate of two independent episodes, over all pairs."""
    total = np.zeros_like(theta)
    possible = list(problem.trajectories(theta))
    for first, second in product(possible, repeat=2):
        for (_, states, actions, _), factors in zip((first, second), advantages([first, second]), strict=True):
            total += first[0] * second[0] / 2 * score(theta, states, actions, factors)
    return total


@pytest.mark.parametrize("problem", SMALL, ids=lambda problem: problem.name)
def test_leave_one_out_has_no_bias_and_a_mean_over_all_shrinks_by_what_is_known(problem: MDP) -> None:
    theta = policy(problem)

    def left_out(both: list[Any]) -> list[Any]:
        values = credit.leave_one_out([sum(one[3]) for one in both])
        return [credit.broadcast(value, len(one[1])) for value, one in zip(values, both, strict=True)]

    def centred(both: list[Any]) -> list[Any]:
        # An eps far above the spread makes `group` a mean baseline: (R - mean) / eps.
        values = credit.group([sum(one[3]) for one in both], [0, 0], eps=1e9) * 1e9
        return [credit.broadcast(value, len(one[1])) for value, one in zip(values, both, strict=True)]

    np.testing.assert_allclose(pairs(problem, theta, left_out), problem.gradient(theta), atol=1e-12)
    np.testing.assert_allclose(pairs(problem, theta, centred), problem.gradient(theta) / 2, atol=1e-6)


def test_gigpo_with_the_others_mean_has_no_bias_where_every_anchor_is_met_by_both() -> None:
    # Both episodes pass the same states at the same steps: one track, rewards on the way.
    moves = np.zeros((3, 2, 4))
    for at in range(3):
        moves[at, :, at + 1] = 1
    track = MDP("track", moves, np.array([[0.0, 1.0], [0.5, 0.2], [0.0, 2.0]]), np.zeros((3, 2)), 3)
    theta = policy(track)

    def anchored(both: list[Any]) -> list[Any]:
        steps = [(one, t) for one in (0, 1) for t in range(3)]
        going = [credit.discounted(one[3], 1.0) for one in both]
        totals = [sum(both[one][3]) for one, _ in steps]
        anchors, owners = [both[one][1][t] for one, t in steps], [one for one, _ in steps]
        values = credit.gigpo([going[one][t] for one, t in steps], anchors, totals, owners, 0.5, normalise=False)
        return [values[:3], values[3:]]

    np.testing.assert_allclose(pairs(track, theta, anchored), 1.5 * track.gradient(theta), atol=1e-12)
