"""What a set of rollouts came to: one object for `--json`, a few lines for people."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optimize.evaluate import tokens
from optimize.rollout import Rollout


@dataclass(frozen=True)
class Summary:
    """`mean` counts a failure as 0; `ci95` is its interval; `calls` and tokens are None where the store knows none."""

    n: int
    failed: int
    reasons: dict[str, int]
    mean: float
    ci95: tuple[float, float]
    calls: int | None
    input_tokens: int | None
    output_tokens: int | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        names = ("n", "failed", "reasons", "mean", "calls", "input_tokens", "output_tokens", "seconds")
        return {**{name: getattr(self, name) for name in names}, "ci95": list(self.ci95)}


def summarise(rollouts: Sequence[Rollout], seconds: float) -> Summary:
    """The summary of at least one rollout; `seconds` is the wall time of all."""
    scores = [rollout.score for rollout in rollouts]
    failed = [rollout for rollout in rollouts if not rollout.ok]
    return Summary(
        n=len(rollouts),
        failed=len(failed),
        reasons=dict(Counter(rollout.reason or "unknown" for rollout in failed).most_common()),
        mean=sum(scores) / len(scores),
        ci95=interval(scores),
        calls=tokens([rollout.calls for rollout in rollouts]),
        input_tokens=tokens([rollout.input_tokens for rollout in rollouts]),
        output_tokens=tokens([rollout.output_tokens for rollout in rollouts]),
        seconds=round(seconds, 3),
    )


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """A 95% interval of the mean: Student's t.

    Scores that all lie in [0, 1] get one pseudo-score at each end first (after Agresti & Coull 1998), so that 20 of 20
    is not certainty, and the interval is cut to [0, 1]. Fewer than two scores: unbounded within what is known.
    """
    from scipy import stats

    bounded = all(0.0 <= score <= 1.0 for score in scores)
    padded = [*scores, 0.0, 1.0] if bounded else list(scores)
    if len(padded) < 2:
        return -math.inf, math.inf
    mean = sum(padded) / len(padded)
    variance = sum((score - mean) ** 2 for score in padded) / (len(padded) - 1)
    half = float(stats.t.ppf(0.975, len(padded) - 1)) * math.sqrt(variance / len(padded))
    own = sum(scores) / len(scores)
    low, high = min(mean - half, own), max(mean + half, own)
    return (max(low, 0.0), min(high, 1.0)) if bounded else (low, high)
