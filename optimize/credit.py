"""Which step earned the reward: per-step credit of logged episodes.

`assign(episodes, method, **params)` gives every step of every episode an advantage; the formulas on plain arrays
(`broadcast`, `discounted`, `leave_one_out`, `group`, `gae`, `td_lambda`, `gigpo`, `shaped`) are here as well.

| method | advantage of step t | own parameters |
|---|---|---|
| broadcast | the episode's reward | |
| discounted | return-to-go G_t | gamma 0.95 |
| leave_one_out | R minus the mean of the task's other episodes | key |
| group | (R - mean) / (std + eps) over the task's episodes | key, eps |
| gae | sum of discounted TD residuals, V fitted to returns | gamma 1, lam (by V's foresight), value, folds |
| td_lambda | the same, V fitted to its own lambda-returns | gamma 1, lam 0.5, value, folds, rounds 3 |
| gigpo | group + weight x group over equal step inputs | key, anchor, gamma 0.95, weight 1, eps, normalise |
| shaped | return-to-go of r + gamma Phi' - Phi | gamma 1, potential (default: the fitted V), value, folds |

The smaller lam, the less variance, and the more a poor V bends the result: where V predicts nothing, a small lam
leaves early steps without credit. So gae's lam, unless given, is chosen by what the data say of V: TRUSTED where V, on
episodes that it was not fitted to, foresees what a step still earns (see `foresight`), else CAUTIOUS.

For all: `weights`, `roles`, `standardise` (see `assign`).
"""

import inspect
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from collector.errors import BadInput
from collector.model import Episode, Step
from optimize.advantage import (
    EPS,
    broadcast,
    discounted,
    gae,
    gigpo,
    group,
    leave_one_out,
    shaped,
    standardised,
    td_lambda,
    to_tokens,
)
from optimize.arrays import Floats, expect, number
from optimize.state import State, digest, observe
from optimize.value import Ridge, ValueModel, cross_fit

__all__ = [
    "METHODS",
    "StepCredit",
    "assign",
    "broadcast",
    "discounted",
    "foresight",
    "gae",
    "gigpo",
    "group",
    "leave_one_out",
    "shaped",
    "td_lambda",
    "to_tokens",
]

TRUSTED, CAUTIOUS = 0.2, 0.95
PROVEN = 2.0  # standard errors

Key = Callable[[Episode], Hashable] | Mapping[str, Hashable]


@dataclass(frozen=True, slots=True)
class StepCredit:
    """What one step was worth. `advantage` is None where nothing can be said: no reward, or a role that doesn't learn.

    `return_` is what the step's episode earned from there on, in the method's own terms; None without a reward.
    """

    episode_id: str
    span_id: str
    step: int
    role: str | None
    method: str
    advantage: float | None
    return_: float | None


@dataclass(frozen=True)
class _Rollout:
    """A rewarded episode: its steps in order, which of them learn, what each earned (a terminal reward: the last)."""

    episode: Episode
    steps: list[Step]
    learns: list[bool]
    rewards: Floats

    @property
    def total(self) -> float:
        return float(self.rewards.sum())


@dataclass(frozen=True)
class _Credit:
    """Advantages and returns of one rollout, both (T,)."""

    advantages: Floats
    returns: Floats


def assign(
    episodes: Sequence[Episode],
    method: str,
    *,
    weights: Mapping[str, float] | None = None,
    roles: Collection[str] | None = None,
    standardise: bool = False,
    **params: Any,
) -> list[StepCredit]:
    """Credit for every step, in the order of `episodes`, each one's steps by their number.

    `weights`: reward name -> weight, default {"reward": 1.0}; of several rewards of one name on one target the latest
    counts. Step rewards are earned at their step, episode rewards at the last one. `roles`: slots that learn (default
    all); the others' steps earn for the team and get None. An episode without a weighted reward is in no baseline and
    gets None. `standardise`: centre and scale the advantages, each episode counted once however long it is. `params`:
    the method's own (see the table above); `key` and `anchor` may be functions (Episode) and (Episode, Step) or, `key`
    only, a mapping from episode id. By default a task is its first user message, an anchor a step's whole input.

    Raises BadInput for an unknown method or parameter, a reward that is not finite, or an episode given twice.
    """
    if method not in METHODS:
        raise BadInput(f"unknown method {method!r}; known: {', '.join(METHODS)}", param="method")
    allowed = list(inspect.signature(METHODS[method]).parameters)[1:]
    for name in params:
        if name not in allowed:
            known = ", ".join([*allowed, "weights", "roles", "standardise"])
            raise BadInput(f"{method} takes no {name!r}; it takes: {known}", param=name)
    expect(len({one.episode_id for one in episodes}) == len(episodes), "episodes", "must differ", "some given twice")
    expect(not isinstance(roles, str), "roles", "must be a collection of slots", "a string")
    weighed = {"reward": 1.0} if weights is None else {name: number(one, "weights") for name, one in weights.items()}
    rollouts = [made for episode in episodes if (made := _rollout(episode, weighed, roles)) is not None]
    credits = METHODS[method](rollouts, **params) if rollouts else []
    if standardise:
        credits = _standardise(rollouts, credits)
    found = {made.episode.episode_id: credit for made, credit in zip(rollouts, credits, strict=True)}
    return [credit for episode in episodes for credit in _spell(episode, found.get(episode.episode_id), method, roles)]


def _spell(episode: Episode, credit: _Credit | None, method: str, roles: Collection[str] | None) -> list[StepCredit]:
    made = []
    for at, step in enumerate(_ordered(episode)):
        advantage = float(credit.advantages[at]) if credit and _learns(step, roles) else None
        return_ = float(credit.returns[at]) if credit else None
        made.append(StepCredit(episode.episode_id, step.span_id, step.step, step.role, method, advantage, return_))
    return made


def _ordered(episode: Episode) -> list[Step]:
    return sorted(episode.steps, key=lambda step: (step.step, step.start_ns, step.span_id))


def _learns(step: Step, roles: Collection[str] | None) -> bool:
    return roles is None or step.role in roles


def _rollout(episode: Episode, weights: Mapping[str, float], roles: Collection[str] | None) -> _Rollout | None:
    """None where no step was taken or nothing that counts was judged."""
    steps = _ordered(episode)
    earned = [_earned(step.rewards, weights) for step in steps]
    final = _earned(episode.rewards, weights)
    judged = bool(episode.rewards) or any(step.rewards for step in steps)
    if not judged and episode.reward is not None:
        final = number(episode.reward, "reward")  # an episode of which only the sum was read
    if not steps or (final is None and all(one is None for one in earned)):
        return None
    rewards = np.array([one or 0.0 for one in earned])
    rewards[-1] += final or 0.0
    return _Rollout(episode, steps, [_learns(step, roles) for step in steps], rewards)


def _earned(rewards: Sequence[Mapping[str, Any]], weights: Mapping[str, float]) -> float | None:
    """The weighted sum over names, of each the latest value; None where no weighted name is there."""
    latest: dict[str, tuple[int, float]] = {}
    for reward in rewards:
        name, value = reward.get("name") or "reward", reward.get("value")
        if name in weights and value is not None:
            made = (int(reward.get("ts_ns") or 0), number(value, f"rewards.{name}"))
            if name not in latest or made[0] >= latest[name][0]:
                latest[name] = made
    return math.fsum(weights[name] * value for name, (_, value) in latest.items()) if latest else None


def _standardise(rollouts: Sequence[_Rollout], credits: Sequence[_Credit]) -> list[_Credit]:
    """Over the steps that learn: the others' advantages are not read."""
    masks = [np.array(rollout.learns) for rollout in rollouts]
    scaled = standardised([credit.advantages[mask] for credit, mask in zip(credits, masks, strict=True)])
    result = []
    for credit, mask, values in zip(credits, masks, scaled, strict=True):
        advantages = credit.advantages.copy()
        advantages[mask] = values
        result.append(_Credit(advantages, credit.returns))
    return result


def _broadcast(rollouts: Sequence[_Rollout]) -> list[_Credit]:
    return [_spread(rollout, rollout.total) for rollout in rollouts]


def _discounted(rollouts: Sequence[_Rollout], *, gamma: float = 0.95) -> list[_Credit]:
    returns = [discounted(rollout.rewards, gamma) for rollout in rollouts]
    return [_Credit(one, one) for one in returns]


def _leave_one_out(rollouts: Sequence[_Rollout], *, key: Key | None = None) -> list[_Credit]:
    values = leave_one_out([rollout.total for rollout in rollouts], _tasks(rollouts, key))
    return [_spread(rollout, value) for rollout, value in zip(rollouts, values, strict=True)]


def _group(rollouts: Sequence[_Rollout], *, key: Key | None = None, eps: float = EPS) -> list[_Credit]:
    values = group([rollout.total for rollout in rollouts], _tasks(rollouts, key), eps)
    return [_spread(rollout, value) for rollout, value in zip(rollouts, values, strict=True)]


def _gae(
    rollouts: Sequence[_Rollout],
    *,
    gamma: float = 1.0,
    lam: float | None = None,
    value: ValueModel | None = None,
    folds: int = 5,
) -> list[_Credit]:
    returns = [discounted(rollout.rewards, gamma) for rollout in rollouts]
    values = _values(rollouts, returns, value, folds)
    if lam is None:
        lam = TRUSTED if foresight([one.rewards for one in rollouts], values, gamma) >= PROVEN else CAUTIOUS
    return [
        _Credit(gae(rollout.rewards, np.append(valued, 0.0), gamma, lam), gone)
        for rollout, valued, gone in zip(rollouts, values, returns, strict=True)
    ]


def foresight(rewards: Sequence[Floats], values: Sequence[Floats], gamma: float) -> float:
    """Whether V learns on the way how an episode will end: in standard errors above 0.

    `rewards` and `values`, N arrays (T_i,), V fitted to other episodes. What V_{t+1} says beyond V_t is set against
    what G_{t+1} has beyond V_t (both as least-squares residuals). A right V agrees with it, E > 0; one that is
    constant, or was fitted to noise, does not, E = 0, since the noise of other episodes is not this one's. Steps of
    one episode share their luck, so episodes are the sample.
    """
    long = [at for at, gained in enumerate(rewards) if len(gained) > 1]
    if len(long) < 3:
        return 0.0
    before = np.concatenate([values[at][:-1] for at in long])
    news = _beyond(np.concatenate([values[at][1:] for at in long]), before)
    came = _beyond(np.concatenate([discounted(rewards[at], gamma)[1:] for at in long]), before)
    bounds = np.cumsum([len(rewards[at]) - 1 for at in long])[:-1]
    sums = [float(part.sum()) for part in np.split(news * came, bounds)]
    error = float(np.std(sums, ddof=1)) / math.sqrt(len(sums))
    return float(np.mean(sums)) / error if error > 0 else 0.0


def _beyond(target: Floats, known: Floats) -> Floats:
    """The residual of a line through (known, target); rounding counts as nothing."""
    design = np.column_stack([np.ones(len(known)), known])
    residual: Floats = target - design @ np.linalg.lstsq(design, target, rcond=None)[0]
    return np.where(np.abs(residual) > 1e-9 * max(1.0, float(np.abs(target).max())), residual, 0.0)


def _td_lambda(
    rollouts: Sequence[_Rollout],
    *,
    gamma: float = 1.0,
    lam: float = 0.5,
    value: ValueModel | None = None,
    folds: int = 5,
    rounds: int = 3,
) -> list[_Credit]:
    def refine(index: int, valued: Floats) -> Floats:
        return td_lambda(rollouts[index].rewards, np.append(valued, 0.0), gamma, lam)

    returns = [discounted(rollout.rewards, gamma) for rollout in rollouts]
    values = cross_fit(*_observed(rollouts), returns, value or Ridge(), folds=folds, refine=refine, rounds=rounds)
    targets = [refine(index, valued) for index, valued in enumerate(values)]
    return [_Credit(target - valued, target) for target, valued in zip(targets, values, strict=True)]


def _gigpo(
    rollouts: Sequence[_Rollout],
    *,
    key: Key | None = None,
    anchor: Callable[[Episode, Step], Hashable] | None = None,
    gamma: float = 0.95,
    weight: float = 1.0,
    eps: float = EPS,
    normalise: bool = True,
) -> list[_Credit]:
    """Only steps that learn are compared with each other at an anchor."""
    returns = [discounted(rollout.rewards, gamma) for rollout in rollouts]
    result = [_Credit(np.zeros(len(one)), one) for one in returns]
    tasks: dict[Hashable, list[int]] = {}
    for index, task in enumerate(_tasks(rollouts, key)):
        tasks.setdefault(task, []).append(index)
    mark = anchor or (lambda episode, step: observe(step).digest)
    for members in tasks.values():
        places = [(index, at) for index in members for at, learns in enumerate(rollouts[index].learns) if learns]
        values = gigpo(
            [returns[index][at] for index, at in places],
            [mark(rollouts[index].episode, rollouts[index].steps[at]) for index, at in places],
            [rollouts[index].total for index, _ in places],
            [index for index, _ in places],
            weight,
            eps=eps,
            normalise=normalise,
        )
        for (index, at), one in zip(places, values, strict=True):
            result[index].advantages[at] = one
    return result


def _shaped(
    rollouts: Sequence[_Rollout],
    *,
    gamma: float = 1.0,
    potential: Callable[[Episode, Step], float] | None = None,
    value: ValueModel | None = None,
    folds: int = 5,
) -> list[_Credit]:
    """The potential is 0 after the last step."""
    returns = [discounted(rollout.rewards, gamma) for rollout in rollouts]
    if potential is None:
        potentials = _values(rollouts, returns, value, folds)
    else:
        potentials = [np.array([potential(made.episode, step) for step in made.steps], float) for made in rollouts]
    return [
        _Credit(discounted(shaped(rollout.rewards, np.append(one, 0.0), gamma), gamma), gone)
        for rollout, one, gone in zip(rollouts, potentials, returns, strict=True)
    ]


METHODS: dict[str, Callable[..., list[_Credit]]] = {
    "broadcast": _broadcast,
    "discounted": _discounted,
    "leave_one_out": _leave_one_out,
    "group": _group,
    "gae": _gae,
    "td_lambda": _td_lambda,
    "gigpo": _gigpo,
    "shaped": _shaped,
}


def _spread(rollout: _Rollout, advantage: float) -> _Credit:
    size = len(rollout.steps)
    return _Credit(broadcast(advantage, size), broadcast(rollout.total, size))


def _tasks(rollouts: Sequence[_Rollout], key: Key | None) -> list[Hashable]:
    if key is None:
        return [_first_request(rollout) for rollout in rollouts]
    if callable(key):
        return [key(rollout.episode) for rollout in rollouts]
    for rollout in rollouts:
        expect(rollout.episode.episode_id in key, "key", "must name a group", f"for {rollout.episode.episode_id!r}")
    return [key[rollout.episode.episode_id] for rollout in rollouts]


def _first_request(rollout: _Rollout) -> str:
    seen = observe(rollout.steps[0])
    return digest(seen.task or seen.text)


def _observed(rollouts: Sequence[_Rollout]) -> tuple[list[str], list[list[State]]]:
    ids = [rollout.episode.episode_id for rollout in rollouts]
    return ids, [[observe(step) for step in rollout.steps] for rollout in rollouts]


def _values(
    rollouts: Sequence[_Rollout], returns: Sequence[Floats], value: ValueModel | None, folds: int
) -> list[Floats]:
    return cross_fit(*_observed(rollouts), returns, value or Ridge(), folds=folds)
