"""True score of the reported prompt against paid rollouts, a chart a problem: means over seeds."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {"ratchet": "#1f6feb", "gepa": "#d1242f", "gepa-3": "#f0883e", "beam": "#8c959f", "ratchet-drip": "#54aeff"}


def at(curve: Sequence[tuple[int, float | None]], rollouts: int) -> float:
    """What a run's reported prompt is worth after so many rollouts; not a number where that was not scored."""
    score = next(score for spent, score in reversed(curve) if spent <= rollouts)
    return math.nan if score is None else score


def draw(problems: dict[str, Any], budget: int, path: Path) -> None:
    """Write the picture as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(problems), figsize=(5.5 * len(problems), 3.6), squeeze=False)
    grid = range(budget + 1)
    for axis, (name, notes) in zip(axes[0], problems.items(), strict=True):
        for engine, curves in notes["curves"].items():
            means = [sum(at(curve, spent) for curve in curves) / len(curves) for spent in grid]
            axis.step(grid, means, where="post", color=COLOURS.get(engine), label=engine)
            for curve in curves:
                points = [at(curve, spent) for spent in grid]
                axis.step(grid, points, where="post", color=COLOURS.get(engine), alpha=0.15, linewidth=0.8)
        axis.axhline(notes["best"] - 0.03, color="#444", linewidth=0.8, linestyle=":")
        axis.set_title(f"{name}, {notes['seeds']} seeds", fontsize=9)
        axis.set_xlabel("paid rollouts", fontsize=8)
        axis.set_ylim(-0.02, 1.02)
    axes[0][0].set_ylabel("exactly right on the evaluation set", fontsize=8)
    axes[0][0].legend(fontsize=8)
    figure.suptitle("gemma-3-270m; dotted: 3 points below the best prompt found", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
