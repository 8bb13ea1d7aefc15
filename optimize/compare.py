"""Which credit method suits some episodes: how much spread each removes, and whether the value function knows anything.

Pure. The spread of advantages is what a policy gradient's noise is made of: all the methods here aim at the same
gradient (none divides by a standard deviation), so the one with the least spread needs the fewest episodes, as long as
what it rests on holds. For those with a fitted value function that is asked of episodes it was not fitted to.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from collector.errors import BadInput
from collector.model import Episode
from optimize.arrays import Floats
from optimize.credit import PROVEN, StepCredit, assign, foresight
from optimize.state import observe
from optimize.value import Ridge, cross_fit

# Unscaled, gamma 1: advantages in units of reward.
COMPARED: dict[str, tuple[str, dict[str, Any]]] = {
    "broadcast": ("broadcast", {}),
    "discounted": ("discounted", {"gamma": 1.0}),
    "leave_one_out": ("leave_one_out", {}),
    "shaped": ("shaped", {}),
    "gae": ("gae", {}),
    "td_lambda": ("td_lambda", {}),
    "gigpo": ("gigpo", {"gamma": 1.0, "normalise": False}),
}
FEW = 8


@dataclass(frozen=True)
class Comparison:
    """`removed`: method -> share of broadcast's mean squared advantage that it removes (negative: it adds).

    `value_r2`: share of the variance of held-out returns that the value function explains, None where they don't vary;
    `foresight` in standard errors. `turns`: steps an episode; `repeated_tasks` and `repeated_states`: shares of
    episodes and steps that share their task, or their whole input, with another episode.
    """

    episodes: int
    rewarded: int
    turns: float
    repeated_tasks: float
    repeated_states: float
    removed: dict[str, float]
    value_r2: float | None
    foresight: float
    recommended: str
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def compare(episodes: Sequence[Episode], weights: Mapping[str, float] | None = None) -> Comparison:
    """Compare on logged episodes. Raises BadInput where fewer than FEW have a reward."""
    given = assign(episodes, "discounted", weights=weights, gamma=1.0)
    known = {one.episode_id for one in given if one.return_ is not None}
    rewarded = [one for one in episodes if one.episode_id in known]
    if len(rewarded) < FEW:
        raise BadInput(f"{len(rewarded)} episodes with a reward are too few: {FEW} are needed", param="episodes")
    spreads = {
        name: _spread(assign(rewarded, method, weights=weights, **params)) * (0.25 if name == "gigpo" else 1.0)
        for name, (method, params) in COMPARED.items()  # gigpo adds two estimates of one gradient: half of it counts
    }
    whole = spreads["broadcast"]
    removed = {name: 1 - spread / whole if whole else 0.0 for name, spread in spreads.items()}
    r2, sight = _value(rewarded, given)
    turns = sum(len(one.steps) for one in rewarded) / len(rewarded)
    tasks = _repeated([observe(one.steps[0]).task for one in rewarded if one.steps])
    states = _repeated([observe(step).digest for one in rewarded for step in one.steps])
    name, reason = recommend(turns, sight, tasks, states)
    return Comparison(len(episodes), len(rewarded), turns, tasks, states, removed, r2, sight, name, reason)


def recommend(turns: float, sight: float, tasks: float, states: float) -> tuple[str, str]:
    """A method and why, from what the episodes are like."""
    if turns < 1.5:
        if tasks >= 0.5:
            return "leave_one_out", "episodes have one step, and tasks were run several times"
        return "leave_one_out", "episodes have one step: there is nothing to share out, only a baseline to take away"
    if sight >= PROVEN:
        return "gae", f"the value function foresees held-out returns ({sight:.1f} standard errors above chance)"
    if states >= 0.5:
        return "gigpo", "the value function foresees nothing yet, but many steps share their whole input"
    if tasks >= 0.5:
        return "leave_one_out", "the value function foresees nothing yet, but tasks were run several times"
    return "discounted", "neither the value function nor repeated tasks help: more episodes would"


def _spread(credits: Sequence[StepCredit]) -> float:
    """Mean squared advantage, each episode counted once."""
    by_episode: dict[str, list[float]] = {}
    for one in credits:
        if one.advantage is not None:
            by_episode.setdefault(one.episode_id, []).append(one.advantage**2)
    return float(np.mean([np.mean(values) for values in by_episode.values()]))


def _value(episodes: Sequence[Episode], given: Sequence[StepCredit]) -> tuple[float | None, float]:
    """R^2 of V on held-out returns, and its foresight."""
    gone: dict[str, list[float]] = {}
    for one in given:
        if one.return_ is not None:
            gone.setdefault(one.episode_id, []).append(one.return_)
    ids = [one.episode_id for one in episodes]
    returns: list[Floats] = [np.array(gone[name]) for name in ids]
    states = [[observe(step) for step in sorted(one.steps, key=lambda step: step.step)] for one in episodes]
    values = cross_fit(ids, states, returns, Ridge())
    flat, guessed = np.concatenate(returns), np.concatenate(values)
    spread = float(((flat - flat.mean()) ** 2).sum())
    rewards = [one - np.append(one[1:], 0.0) for one in returns]
    r2 = 1 - float(((flat - guessed) ** 2).sum()) / spread if spread > 1e-12 else None
    return r2, foresight(rewards, values, 1.0)


def _repeated(names: Sequence[str]) -> float:
    counts = Counter(names)
    return sum(count for count in counts.values() if count > 1) / max(len(names), 1)
