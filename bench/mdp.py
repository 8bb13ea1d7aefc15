"""Small episodic decision problems whose values, advantages and policy gradients are known in closed form.

States 0..S-1, a terminal state S, actions 0..A-1, at most `horizon` steps (the end of the horizon is an end, value 0).
Policies are softmax tables theta (O, A) on what the agent heeds of a state, by default all of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


@dataclass(frozen=True)
class Batch:
    """Episodes side by side: states, actions (N, T) as taken, rewards (N, T), lengths (N,)."""

    states: Ints
    actions: Ints
    rewards: Floats
    lengths: Ints


@dataclass(frozen=True)
class MDP:
    """`moves` (S, A, S+1) probabilities, `gains` (S, A) mean rewards, `noise` (S, A): a reward is gain +- noise.

    `view` (S,): what the policy heeds of a state; `features` (S+1, F): how a value function sees it.
    """

    name: str
    moves: Floats
    gains: Floats
    noise: Floats
    horizon: int
    start: int = 0
    gamma: float = 1.0
    view: Ints | None = None
    features: Floats | None = None

    @property
    def seen(self) -> Ints:
        """Observation (S,) of each state."""
        return np.arange(len(self.gains)) if self.view is None else self.view

    @cached_property
    def _landings(self) -> Floats:
        return self.moves.cumsum(axis=2)

    def indifferent(self) -> Floats:
        """The uniform policy's theta (O, A)."""
        return np.zeros((int(self.seen.max()) + 1, self.gains.shape[1]))

    def policy(self, theta: Floats) -> Floats:
        """Probabilities (S, A)."""
        return softmax(theta)[self.seen]

    def values(self, theta: Floats) -> tuple[Floats, Floats]:
        """V (T+1, S+1) and Q (T, S, A) of the policy, by backward induction."""
        states, actions = self.gains.shape
        policy = self.policy(theta)
        v = np.zeros((self.horizon + 1, states + 1))
        q = np.zeros((self.horizon, states, actions))
        for t in range(self.horizon - 1, -1, -1):
            q[t] = self.gains + self.gamma * self.moves @ v[t + 1]
            v[t, :states] = (policy * q[t]).sum(axis=1)
        return v, q

    def reach(self, theta: Floats) -> Floats:
        """Probability (T, S) of being in a state at a step."""
        states = len(self.gains)
        policy = self.policy(theta)
        d = np.zeros((self.horizon, states))
        d[0, self.start] = 1
        for t in range(1, self.horizon):
            d[t] = np.einsum("s,sa,saz->z", d[t - 1], policy, self.moves)[:states]
        return d

    def objective(self, theta: Floats) -> float:
        """Expected discounted return from the start."""
        return float(self.values(theta)[0][0, self.start])

    def best(self) -> float:
        """The best policy's expected return."""
        v = np.zeros(len(self.gains) + 1)
        for _ in range(self.horizon):
            v[:-1] = (self.gains + self.gamma * self.moves @ v).max(axis=1)
        return float(v[self.start])

    def gradient(self, theta: Floats) -> Floats:
        """d objective / d theta (O, A): the policy gradient theorem, summed exactly."""
        policy = self.policy(theta)
        v, q = self.values(theta)
        advantages = q - v[:-1, :-1, None]
        discounts = self.gamma ** np.arange(self.horizon)
        result = np.zeros_like(theta)
        np.add.at(result, self.seen, np.einsum("t,ts,sa,tsa->sa", discounts, self.reach(theta), policy, advantages))
        return result

    def sample(self, theta: Floats, count: int, rng: np.random.Generator) -> Batch:
        """`count` episodes."""
        terminal = len(self.gains)
        chances, landings = self.policy(theta).cumsum(axis=1), self._landings
        shape = (count, self.horizon)
        states, actions, rewards = np.zeros(shape, np.intp), np.zeros(shape, np.intp), np.zeros(shape)
        lengths, at = np.zeros(count, np.intp), np.full(count, self.start)
        for t in range(self.horizon):
            alive = np.flatnonzero(at < terminal)
            here = at[alive]
            acts = np.minimum((rng.random((len(alive), 1)) > chances[here]).sum(axis=1), self.gains.shape[1] - 1)
            signs = rng.choice([-1.0, 1.0], len(alive))
            states[alive, t], actions[alive, t] = here, acts
            rewards[alive, t] = self.gains[here, acts] + signs * self.noise[here, acts]
            lengths[alive] += 1
            at[alive] = np.minimum((rng.random((len(alive), 1)) > landings[here, acts]).sum(axis=1), terminal)
        return Batch(states, actions, rewards, lengths)

    def trajectories(self, theta: Floats) -> Iterator[tuple[float, list[int], list[int], list[float]]]:
        """Every possible episode with its probability: (p, states, actions, rewards)."""
        policy = self.policy(theta)
        open_: list[tuple[float, int, list[int], list[int], list[float]]] = [(1.0, self.start, [], [], [])]
        while open_:
            p, at, states, actions, rewards = open_.pop()
            if at == len(self.gains) or len(states) == self.horizon:
                yield p, states, actions, rewards
                continue
            for action, chance in enumerate(policy[at]):
                spread = float(self.noise[at, action])
                for shock in (-spread, spread) if spread else (0.0,):
                    share = p * float(chance) * (0.5 if spread else 1.0)
                    reward = float(self.gains[at, action]) + shock
                    for to in np.flatnonzero(self.moves[at, action]):
                        step = ([*states, at], [*actions, action], [*rewards, reward])
                        open_.append((share * float(self.moves[at, action, to]), int(to), *step))


def softmax(theta: Floats) -> Floats:
    """Row by row."""
    powers = np.exp(theta - theta.max(axis=1, keepdims=True))
    result: Floats = powers / powers.sum(axis=1, keepdims=True)
    return result


def score(theta: Floats, seen: Ints | list[int], actions: Ints | list[int], factors: Floats) -> Floats:
    """sum_t factors_t d log pi(a_t | seen_t) / d theta, shape (O, A)."""
    result = np.zeros_like(theta)
    rows, columns = np.asarray(seen, np.intp), np.asarray(actions, np.intp)
    np.add.at(result, (rows, columns), factors)
    np.add.at(result, rows, -factors[:, None] * softmax(theta)[rows])
    return result


def chain(length: int, decisive: int, noise: float = 1.0, actions: int = 2) -> MDP:
    """Every step is a choice, one alone counts: it decides a noisy reward at the very end. State: (step, outcome)."""
    # States: t for t <= decisive; afterwards two tracks, good and bad.
    after = length - decisive - 1
    size = decisive + 1 + 2 * after
    moves, gains, spread = _blank(size, actions)
    for t in range(decisive):
        moves[t, :, t + 1] = 1
    good = decisive + 1
    for action in range(actions):
        right = action == actions - 1
        moves[decisive, action, (good if right else good + after) if after else size] = 1
        gains[decisive, action] = float(right) if not after else 0
        spread[decisive, action] = noise if not after else 0
    for track, gain in ((0, 1.0), (1, 0.0)):
        for t in range(after):
            at, last = good + track * after + t, t == after - 1
            moves[at, :, size if last else at + 1] = 1
            gains[at, :], spread[at, :] = (gain, noise) if last else (0, 0)
    return MDP(f"chain {length}, step {decisive} decides", moves, gains, spread, length)


def key_door(distractors: int, noise: float = 0.5, actions: int = 2) -> MDP:
    """Take the key first; then noisy small rewards whatever is done; the door at the end opens with the key alone."""
    size = 1 + 2 * (distractors + 1)
    moves, gains, spread = _blank(size, actions)
    for action in range(actions):
        moves[0, action, 1 if action == actions - 1 else 2 + distractors] = 1
    for track in (0, 1):
        for t in range(distractors + 1):
            at, last = 1 + track * (distractors + 1) + t, t == distractors
            moves[at, :, size if last else at + 1] = 1
            if last:
                gains[at, :] = 1.0 - track
            else:
                spread[at, :] = noise
    return MDP(f"key and door, {distractors} distractors", moves, gains, spread, distractors + 2)


def lock(digits: int, noise: float = 0.3) -> MDP:
    """All of several choices must be right; one wrong and nothing opens. The reward comes at the end, noisy."""
    size = 2 * digits
    moves, gains, spread = _blank(size, 2)
    for t in range(digits):
        last = t == digits - 1
        moves[t, 1, size if last else t + 1] = 1
        moves[t, 0, size if last else digits + t + 1] = 1
        moves[digits + t, :, size if last else digits + t + 1] = 1
    gains[digits - 1, 1] = 1
    spread[digits - 1, :] = spread[size - 1, :] = noise
    return MDP(f"lock of {digits}", moves, gains, spread, digits)


def tally(length: int, actions: int = 3, noise: float = 0.5, every: int = 1) -> MDP:
    """At every step (or each `every`-th) one action is right; how many were is told, noisily, only at the very end.

    State: (step, right so far); the policy heeds the step alone.
    """
    width = length + 1
    moves, gains, spread = _blank(length * width, actions)
    for t in range(length):
        counts, last = t % every == 0, t == length - 1
        for right in range(width):
            at = t * width + right
            for action in range(actions):
                now = min(right + (counts and action == actions - 1), length)
                moves[at, action, length * width if last else at + width + now - right] = 1
                if last:
                    gains[at, action], spread[at, action] = now * every / length, noise
    steps, counted = np.divmod(np.arange(length * width), width)
    features = np.zeros((length * width + 1, length + 1))
    features[np.arange(length * width), steps] = 1
    features[:-1, length] = counted * every / length
    name = f"tally of {length}" + (f", each {every}th" if every > 1 else "")
    return MDP(name, moves, gains, spread, length, view=steps, features=features)


def walk(length: int, horizon: int, gamma: float = 0.9, slip: float = 0.2) -> MDP:
    """A corridor with slips and a price per step: episodes of many lengths, states met again, a reward at the goal."""
    moves, gains, spread = _blank(length, 2)
    for at in range(length):
        ahead, back = at + 1, max(at - 1, 0)
        moves[at, 1, ahead] += 1 - slip
        moves[at, 1, back] += slip
        moves[at, 0, back] += 1 - slip
        moves[at, 0, ahead] += slip
    gains[:] = -0.05
    gains[length - 1, 1] += 1 - slip
    gains[length - 1, 0] += slip
    return MDP(f"slippery walk of {length}", moves, gains, spread, horizon, gamma=gamma)


def _blank(states: int, actions: int) -> tuple[Floats, Floats, Floats]:
    return np.zeros((states, actions, states + 1)), np.zeros((states, actions)), np.zeros((states, actions))
