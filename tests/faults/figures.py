"""What the drills found: a line a drill, printed when all are over, and kept as a benchmark's result."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.result import RESULTS, Result

KILLS = 200  # what a full run has to do


@dataclass(frozen=True)
class Figure:
    """One drill. `acknowledged` and `stored` count rows of the raw tables."""

    drill: str
    kills: int
    acknowledged: int
    stored: int
    lost: int
    doubled: int
    notes: dict[str, Any] = field(default_factory=dict)


found: list[Figure] = []


def account(
    drill: str, acknowledged: Collection[str], stored: Sequence[str], *, kills: int = 0, **notes: Any
) -> Figure:
    """Compare what was acknowledged with the keys of what is stored, and keep the result before anyone judges it."""
    once = set(stored)
    lost, doubled = len(set(acknowledged) - once), len(stored) - len(once)
    figure = Figure(drill, kills, len(set(acknowledged)), len(stored), lost, doubled, notes)
    found.append(figure)
    return figure


def lines() -> list[str]:
    """The table, as text."""
    head = ("drill", "kills", "acknowledged", "stored", "lost", "doubled")
    rows = [tuple(str(getattr(one, name)) for name in head) for one in found]
    width = max(len(row[0]) for row in (head, *rows))
    return ["  ".join([row[0].ljust(width), *(cell.rjust(12) for cell in row[1:])]) for row in (head, *rows)]


def write(seconds: float, folder: Path = RESULTS) -> Path:
    """The figures in the form of every benchmark: nothing lost, nothing doubled, two hundred kills."""
    result = Result("faults", {"kills": (">=", KILLS)} | {
        f"{one.drill}_{what}": ("<=", 0) for one in found for what in ("lost", "doubled")
    })  # fmt: skip
    result.measures["kills"] = max((one.kills for one in found), default=0)
    for one in found:
        for what in ("kills", "acknowledged", "stored", "lost", "doubled"):
            result.measures[f"{one.drill}_{what}"] = getattr(one, what)
        if one.notes:
            result.notes[one.drill] = one.notes
    return result.write(seconds, folder)
