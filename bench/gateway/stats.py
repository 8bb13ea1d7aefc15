"""Small figures out of many: quantiles, medians with their spread, ratios within a round."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple


class Figure(NamedTuple):
    """A median and what it lies between."""

    median: float
    low: float
    high: float


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed (nearest rank). Raises ValueError for none."""
    if not values:
        raise ValueError("a quantile of nothing")
    ordered = sorted(values)
    rank = -int(-share * len(ordered) // 1)  # the ceiling
    return ordered[min(max(rank, 1), len(ordered)) - 1]


def figure(values: Sequence[float]) -> Figure | None:
    """The figure of what the rounds gave; None where no round gave any."""
    return Figure(median(values), min(values), max(values)) if values else None


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Figure | None:
    """Ours over theirs, round by round, for the rounds that have both: neighbours in time share the machine's mood."""
    return figure([ours[at] / theirs[at] for at in ours if theirs.get(at)])
