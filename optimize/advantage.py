"""What each step of an episode was worth, on plain arrays: the formulas behind `optimize.credit`.

Shapes: T steps of one episode, N episodes, M steps of several episodes. Lists do as well as arrays; answers are
float64 arrays. Where a missing reward has a meaning it is NaN: it enters no mean, no spread and no denominator, and
comes out as NaN. Everywhere else a value that is not finite is refused with `BadInput`, which names the argument.

Tokens: a step's advantage is *repeated* on each token that the model wrote in that step (see `to_tokens`), so the
mean over a step's tokens is the step's advantage. It is never split among them.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from collector.errors import BadInput
from optimize.arrays import Floats, Labels, expect, fraction, labels, number, vector

EPS = 1e-8
# Spreads below this share of the values' size are rounding, not signal: such a group counts as equal.
ROUNDING = 8 * float(np.finfo(np.float64).eps)

_Rule = Callable[[Floats], Floats]


def broadcast(reward: float, steps: int) -> Floats:
    """Every step gets exactly the episode's reward: A_t = R, shape (steps,)."""
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 0:
        raise BadInput(f"steps must be a whole number >= 0, not {steps!r}", param="steps")
    return np.full(int(steps), number(reward, "reward"))


def discounted(rewards: ArrayLike, gamma: float) -> Floats:
    """Return-to-go G_t = sum_{k>=t} gamma^(k-t) r_k. `rewards` (T,) -> (T,)."""
    return _backward(vector(rewards, "rewards"), fraction(gamma, "gamma"))


def gae(rewards: ArrayLike, values: ArrayLike, gamma: float, lam: float) -> Floats:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    A_t = sum_l (gamma lam)^l delta_{t+l} with delta_t = r_t + gamma V_{t+1} - V_t. `rewards` (T,), `values` (T+1,)
    -> (T,). `values[T]` is 0 where the episode ended, the value of the state it was cut at where it was truncated.
    lam = 1 is return minus value (no bias from a bad V), lam = 0 the TD residual (least variance).
    """
    gained, valued, gamma, lam = _bootstrapped(rewards, values, gamma, lam)
    return _backward(gained + gamma * valued[1:] - valued[:-1], gamma * lam)


def td_lambda(rewards: ArrayLike, values: ArrayLike, gamma: float, lam: float) -> Floats:
    """The lambda-returns, which a value function is fitted to (Sutton and Barto 2018, section 12.1).

    G_t = r_t + gamma ((1 - lam) V_{t+1} + lam G_{t+1}), G_T = V_T; so `td_lambda - V = gae`. `rewards` (T,),
    `values` (T+1,) as in `gae` -> (T,).
    """
    gained, valued, gamma, lam = _bootstrapped(rewards, values, gamma, lam)
    seed = np.zeros_like(gained)
    if len(seed):
        seed[-1] = gamma * lam * valued[-1]
    return _backward(gained + gamma * (1 - lam) * valued[1:] + seed, gamma * lam)


def shaped(rewards: ArrayLike, potentials: ArrayLike, gamma: float) -> Floats:
    """Potential-based shaping r'_t = r_t + gamma Phi_{t+1} - Phi_t (Ng, Harada, Russell 1999).

    `rewards` (T,), `potentials` (T+1,) -> shaped rewards (T,). With `potentials[T]` = 0 every return from the start
    differs by -Phi_0 whatever was done, so the best policy stays the best.
    """
    gained, phi = vector(rewards, "rewards"), vector(potentials, "potentials")
    expect(len(phi) == len(gained) + 1, "potentials", f"must hold one more than rewards: {len(gained) + 1}", len(phi))
    return gained + fraction(gamma, "gamma") * phi[1:] - phi[:-1]


def leave_one_out(returns: ArrayLike, groups: Labels | None = None) -> Floats:
    """A_i = R_i - mean of the others' R, in one group or within each of `groups` (RLOO, Ahmadian et al. 2402.14740).

    `returns` (N,) with NaN where missing, `groups` (N,) -> (N,). The baseline knows nothing of the episode's own
    actions, so the gradient stays unbiased. A group of one has no baseline: 0.
    """
    observed = vector(returns, "returns", missing=True)
    codes = np.zeros(len(observed), dtype=np.intp) if groups is None else labels(groups, "groups", len(observed))
    return _within(observed, codes, _others)


def group(returns: ArrayLike, groups: Labels, eps: float = EPS) -> Floats:
    """A_i = (R_i - mean) / (std + eps) within each group (GRPO, Shao et al. 2024, arXiv 2402.03300).

    `returns` (N,) with NaN where missing, `groups` (N,) of numbers or strings -> (N,). One entry is one *episode*, so
    long episodes don't weigh more; std is the population's. Equal rewards, and a group of one: 0.
    """
    observed = vector(returns, "returns", missing=True)
    codes = labels(groups, "groups", len(observed))
    return _within(observed, codes, _standard(eps))


def gigpo(
    step_returns: ArrayLike,
    anchors: Labels,
    episode_returns: ArrayLike,
    episodes: Labels,
    weight: float = 1.0,
    *,
    eps: float = EPS,
    normalise: bool = True,
) -> Floats:
    """Group-in-group advantages A = A_episode + weight A_step (GiGPO, Feng et al. 2025, arXiv 2505.10978).

    All arrays (M,), one entry a step, of episodes of *one* task. A_episode is `group` over the episodes, each counted
    once; A_step is the same over the returns-to-go of the steps that share an anchor state. `episode_returns` repeats
    each episode's return on its steps; NaN marks a missing one: its steps are in no baseline and come out NaN (their
    step_returns may be NaN as well). An anchor seen once adds 0. `normalise=False` puts the others' mean in place of
    mean and std (the paper's F_norm = 1), which keeps the gradient unbiased where no episode meets an anchor twice.
    """
    totals = vector(episode_returns, "episode_returns", missing=True)
    size = len(totals)
    known = ~np.isnan(totals)
    going = vector(step_returns, "step_returns", missing=True)
    expect(len(going) == size, "step_returns", f"must be as long as episode_returns: {size}", len(going))
    expect(not np.isnan(going[known]).any(), "step_returns", "must be finite where the episode has a return", "NaN")
    firsts, of_step = _per_episode(totals, labels(episodes, "episodes", size))
    rule = _standard(eps) if normalise else _others
    whole = _within(totals[firsts], np.zeros(len(firsts), dtype=np.intp), rule)
    local = _within(np.where(known, going, np.nan), labels(anchors, "anchors", size), rule)
    return whole[of_step] + number(weight, "weight") * local


def to_tokens(advantages: ArrayLike, steps: ArrayLike) -> Floats:
    """Repeat each step's advantage on the tokens that the model wrote in it.

    `advantages` (T,); `steps` (L,) holds for each token of a row the index of its step, or -1 for a token that the
    model did not write (prompt, observation, padding), which gets 0. -> (L,).
    """
    values = vector(advantages, "advantages")
    index = np.asarray(steps)
    whole = index.ndim == 1 and (index.dtype.kind in "iu" or not index.size)
    expect(whole, "steps", "must be a flat list of whole numbers", index.dtype)
    inside = not index.size or bool(index.min() >= -1 and index.max() < len(values))
    expect(inside, "steps", f"must lie between -1 and {len(values) - 1}", index)
    padded = np.append(values, 0.0)
    return padded[index.astype(np.intp)]


def standardised(values: Sequence[Floats], eps: float = EPS) -> list[Floats]:
    """(A - mean) / (std + eps) over several episodes' advantages, each episode counted once however long it is.

    Each of its T_i steps weighs 1/T_i. Episodes without a step are left alone; equal advantages become 0.
    """
    filled = [value for value in values if len(value)]
    if not filled:
        return list(values)
    flat = np.concatenate(filled)
    shares = np.concatenate([np.full(len(value), 1 / len(value)) for value in filled]) / len(filled)
    mean = float(flat @ shares)
    std = math.sqrt(float((flat - mean) ** 2 @ shares))
    if _even(flat):
        return [np.zeros_like(value) for value in values]
    return [(value - mean) / (std + eps) for value in values]


def _backward(terms: Floats, decay: float) -> Floats:
    """y_t = x_t + decay y_{t+1}, from the end."""
    result = np.empty_like(terms)
    carried = 0.0
    for at in range(len(terms) - 1, -1, -1):
        carried = float(terms[at]) + decay * carried
        result[at] = carried
    return result


def _bootstrapped(
    rewards: ArrayLike, values: ArrayLike, gamma: float, lam: float
) -> tuple[Floats, Floats, float, float]:
    gained, valued = vector(rewards, "rewards"), vector(values, "values")
    expect(len(valued) == len(gained) + 1, "values", f"must hold one more than rewards: {len(gained) + 1}", len(valued))
    return gained, valued, fraction(gamma, "gamma"), fraction(lam, "lam")


def _even(values: Floats) -> bool:
    return bool(np.ptp(values) <= ROUNDING * np.abs(values).max())


def _others(returns: Floats) -> Floats:
    """R_i minus the mean of the others, for two or more."""
    size = len(returns)
    centred: Floats = returns - returns.mean()
    return centred * (size / (size - 1))


def _standard(eps: float) -> _Rule:
    """(R - mean) / (std + eps), for two or more."""
    floor = number(eps, "eps")
    expect(floor >= 0, "eps", "must not be negative", floor)

    def rule(returns: Floats) -> Floats:
        if _even(returns):
            return np.zeros_like(returns)
        centred: Floats = returns - returns.mean()
        return centred / (float(returns.std()) + floor)

    return rule


def _within(returns: Floats, codes: NDArray[np.intp], rule: _Rule) -> Floats:
    """`rule` on the observed returns of each group; groups of one get 0, missing ones stay NaN."""
    result = np.full(len(returns), np.nan)
    observed = np.flatnonzero(~np.isnan(returns))
    if not len(observed):
        return result
    ordered = observed[np.argsort(codes[observed], kind="stable")]
    for members in np.split(ordered, np.flatnonzero(np.diff(codes[ordered])) + 1):
        result[members] = rule(returns[members]) if len(members) > 1 else 0.0
    return result


def _per_episode(totals: Floats, codes: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The first step of each episode and each step's episode; BadInput where an episode has two returns."""
    _, firsts, of_step = np.unique(codes, return_index=True, return_inverse=True)
    same = np.array_equal(totals, totals[firsts][of_step], equal_nan=True)
    expect(same, "episode_returns", "must be the same on all steps of an episode", "several")
    return firsts, of_step
