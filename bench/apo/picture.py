"""Score against rollouts, one small chart a world, with what the peers reach at the two budgets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(worlds: dict[str, Any], grid: Sequence[int], path: Path) -> None:
    """Write the picture of all worlds as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 5
    rows = -(-max(1, len(worlds)) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(14, 2.4 * rows), squeeze=False, sharex=True)
    for axis in axes.flat[len(worlds) :]:
        axis.axis("off")
    for axis, (name, row) in zip(axes.flat, worlds.items(), strict=False):
        axis.plot(grid, row["curve"], color="#1f6feb", label="ratchet")
        for engine, colour in (("gepa", "#d1242f"), ("agentlightning", "#8c959f")):
            marks = [(budget, row[f"{engine}_{budget}"]) for budget in (400, 1200) if f"{engine}_{budget}" in row]
            for budget, (mean, low, high) in marks:
                axis.errorbar([budget], [mean], [[mean - low], [high - mean]], fmt="o", ms=4, color=colour, capsize=2)
        axis.set_title(name, fontsize=9)
        axis.set_ylim(-0.1, 1.05)
        axis.tick_params(labelsize=7)
    figure.supxlabel("paid rollouts", fontsize=9)
    figure.supylabel("score: 0 the seed, 1 the optimum", fontsize=9)
    figure.suptitle(
        "Reported prompt: ratchet (line), gepa 0.1.4 (red), agentlightning 0.3.0 (grey), 95 % intervals", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
