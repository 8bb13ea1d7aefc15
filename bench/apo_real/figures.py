"""From runs and true scores to the figures: rollouts to the target, medians over seeds, ratios. Pure."""

import math
import random
from collections.abc import Mapping, Sequence
from statistics import median

from bench.apo_real.runs import Run

CLOSE = 0.03
DRAWS = 2000
Truth = Mapping[str, float]  # prompt -> share of exactly right answers on the evaluation set


def target(runs: Sequence[Run], truth: Truth) -> float:
    """The true score that counts as reached: 3 points below the best prompt that any engine reported at its end."""
    return max(truth[run.final] for run in runs) - CLOSE


def reached(run: Run, truth: Truth, goal: float) -> int | None:
    """Paid rollouts from which on all that the run reported had that true score; None: its last prompt had not.

    A prompt that was reported for a moment and lost again was luck, whoever reported it.
    """
    since = None
    for at, prompt in reversed(run.curve):
        if not good(truth[prompt], goal):
            break
        since = at
    return since


def good(score: float, goal: float) -> bool:
    """Whether a true score reaches the goal, rounding apart."""
    return score >= goal - 1e-9


def middle(counts: Sequence[int | None]) -> float | None:
    """The median, runs that never got there counting as later than any; None where it is one of these."""
    value = median([math.inf if count is None else float(count) for count in counts])
    return None if math.isinf(value) else value


def interval(counts: Sequence[int | None], seed: int = 0) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of the median over seeds; None stands for beyond the budget."""
    dice = random.Random(f"interval-{seed}")  # a reproducible draw
    data = [math.inf if count is None else float(count) for count in counts]
    medians = sorted(median(dice.choices(data, k=len(data))) for _ in range(DRAWS))
    low, high = medians[round(0.025 * DRAWS)], medians[round(0.975 * DRAWS) - 1]
    return (None if math.isinf(low) else low), (None if math.isinf(high) else high)


def ratio(ours: Sequence[int | None], theirs: Sequence[int | None], budget: int) -> float | None:
    """Our median over theirs. Where theirs lies beyond the budget it counts as the budget, which flatters them.

    None where ours lies beyond the budget: then there is no figure, and no bound is met.
    """
    mine, other = middle(ours), middle(theirs)
    if mine is None:
        return None
    return mine / max(1.0, budget if other is None else other)
