"""Credit and training in figures: `python -m bench.rl` prints the tables and writes bench/results/rl.json.

`--only parity,swaps` measures these parts anew and keeps the others' figures; the notes say for each part when and
under which load it was measured.

The capital city figures come from `python -m bench.capital`, which takes longer (see bench/results/capital.json), and
are taken over with their own date; without that file they are left out.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import subprocess
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import credit
from bench.result import RESULTS, Result

MUST: dict[str, tuple[str, float]] = {
    "gradient bias, standard errors": ("<=", 2.0),
    "RMSE of gae over broadcast": ("<=", 0.5),
    "RMSE of td_lambda over broadcast": ("<=", 0.5),
    "loss parity": ("<=", 1e-5),
    "loss parity, on-policy, with TRL's own trainer": ("<=", 1e-5),
    "capital city, held-out exact, mean of seeds": (">=", 0.80),
    "episodes to the same return, gae over broadcast": ("<=", 0.7),
    "merged rows, tokens": ("<=", 0.4),
    "merged rows, seconds": ("<=", 0.5),
    "step over TRL's": ("<=", 1.1),
    "swap to first new-version answer, seconds, median": ("<=", 1.0),
    "swap to first new-version answer, seconds, most": ("<=", 1.0),
    "failed requests during 100 swaps": ("<=", 0),
    "poisoned adapters promoted": ("<=", 0),
}
DEFAULTS = {"gae": ("gae", {}), "td_lambda": ("td_lambda", {})}
SEEDS = 3


def on_credit(result: Result) -> None:
    """Bias, distance to the true advantages, learning speed."""
    errors, spreads = credit.bias()
    credit.FITTED.update(DEFAULTS)  # type: ignore[arg-type]  # the methods as they come, beside those with a given lambda
    rmse = credit.distance()
    ratios = {problem: {name: value / row["broadcast"] for name, value in row.items()} for problem, row in rmse.items()}
    credit.LEARNERS = ("broadcast", "broadcast, leave-one-out", "gae 0.5", "gae 0")
    episodes, reached = credit.speed()
    credit.show("Gradient bias, in standard errors", errors, "{:+.2f}")
    credit.show("RMSE to the true advantages over broadcast's", ratios)
    credit.show("Episodes to 90 % of the gain, each with its best learning rate", episodes, "{:.0f}")
    credit.show("Share of runs that got there", reached, "{:.2f}")
    result.measures |= {
        "gradient bias, standard errors": max(abs(one) for row in errors.values() for one in row.values()),
        **{
            f"RMSE of {name} over broadcast": credit._geometric([row[name] for row in ratios.values()])
            for name in ("gae", "td_lambda", "leave_one_out")
        },
        "episodes to the same return, gae over broadcast": credit._geometric(credit.against(episodes, "gae 0.5")),
        "episodes to the same return, gae 0 over broadcast": credit._geometric(credit.against(episodes, "gae 0")),
    }
    result.notes |= {"bias": errors, "spread": spreads, "rmse_ratio": ratios, "episodes": episodes, "reached": reached}


def on_parity(result: Result) -> None:
    """Losses against formulas and against TRL's own trainer."""
    from bench import training

    result.measures["loss parity"] = training.losses()
    result.measures["loss parity, on-policy, with TRL's own trainer"] = training.on_policy()


def on_training(result: Result) -> None:
    """Cost of a step, merging, the gate."""
    from bench import training

    steps, merged, poisoned = training.overhead(), training.merging(), training.poisoned()
    result.measures |= {
        "step over TRL's": steps["step"],
        "step over TRL's, shared beginning": steps["step, shared beginning"],
        "merged rows, tokens": merged["tokens"],
        "merged rows, seconds": merged["seconds"],
        "poisoned adapters promoted": poisoned.get("promote", 0),
    }
    result.notes["poisoned adapters"] = poisoned


def on_swaps(result: Result) -> None:
    """A promotion's way to the first answer, under load."""
    from bench import swaps

    result.measures |= swaps.measure()


def on_capital(result: Result, folder: Path = RESULTS) -> None:
    """What `bench.capital` measured."""
    path = folder / "capital.json"
    if not path.is_file():
        return
    found = json.loads(path.read_text())
    best = found["measures"].get("rft")
    if best is not None and len(found["notes"]["seeds"]["rft"]) >= SEEDS:
        result.measures["capital city, held-out exact, mean of seeds"] = best
    for name, seeds in found["notes"]["seeds"].items():
        if len(seeds) >= SEEDS:
            result.measures[f"capital city, held-out exact, {name}"] = found["measures"][name]
    told = {name: found[name] for name in ("measures", "machine", "seconds")}
    result.notes["capital city"] = {**told, "commit and day": _committed(path), "ci95": found["notes"]["ci95"]}


def _committed(path: Path) -> str | None:
    """Short hash and day of the commit that a file is from; None outside a checkout."""
    command = ["git", "log", "-1", "--format=%h %cs", "--", path.name]
    try:
        told = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return told.stdout.strip() or None


def picture(result: Result, folder: Path = RESULTS) -> Path:
    """RMSE and episodes against broadcast's, problem by problem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
        (
            "RMSE to the true advantages, broadcast = 1",
            result.notes["rmse_ratio"],
            ("leave_one_out", "gae", "td_lambda"),
        ),
        ("Episodes to 90 % of the gain", result.notes["episodes"], ("broadcast, leave-one-out", "gae 0.5", "gae 0")),
    ]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for axis, (title, table, names) in zip(axes, tables, strict=True):
        for at, name in enumerate(names):
            places = [index + 0.27 * at for index in range(len(table))]
            axis.bar(places, [row[name] for row in table.values()], width=0.25, label=name)
        axis.set_xticks([index + 0.27 for index in range(len(table))], list(table), rotation=30, ha="right", fontsize=7)
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=7)
    figure.tight_layout()
    path = folder / "rl.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


PARTS = {
    "parity": on_parity, "training": on_training, "swaps": on_swaps, "credit": on_credit, "capital": on_capital,
}  # fmt: skip


def earlier(folder: Path = RESULTS) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures and notes of the last run, empty where there is none."""
    path = folder / "rl.json"
    found = json.loads(path.read_text()) if path.is_file() else {"measures": {}, "notes": {}}
    return found["measures"], found["notes"]


def measure(names: Sequence[str], folder: Path = RESULTS) -> Result:
    """The parts of these names, over the last run's figures where they are not all."""
    measures, notes = ({}, {}) if set(names) == set(PARTS) else earlier(folder)
    result = Result("rl", MUST, measures, {**notes, "parts": dict(notes.get("parts", {}))})
    for name in names:
        began, spent = time.monotonic(), sum(os.times()[:4])
        PARTS[name](result)
        told = {"day": time.strftime("%Y-%m-%d", time.gmtime()), "load": os.getloadavg()[1]}
        took = {"seconds": time.monotonic() - began, "cpu_seconds": sum(os.times()[:4]) - spent}
        result.notes["parts"][name] = {**told, **{key: round(value, 1) for key, value in took.items()}}
    return result


def main() -> None:
    """Measure, print, write."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    names = parser.parse_args().only.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    result = measure(names)
    result.write(sum(part["seconds"] for part in result.notes["parts"].values()))
    if "rmse_ratio" in result.notes:
        picture(result)
    result.show()


if __name__ == "__main__":
    main()
