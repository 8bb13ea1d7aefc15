"""`python -m bench.apo [--seeds N] [--worlds a,b]`: ours beside the real gepa and the real APO of agentlightning.

Simulated worlds whose optimum is known, the same scripted editor for each. Writes bench/results/apo.json, apo.csv (one
line a run) and apo.svg. `NULL_RUNS=1000` in the environment (or --nulls) sets how many searches in all run where
nothing helps. `--keep-peers` takes the peers' lines from the last apo.csv: their searches depend on nothing but the
world and the seed.
"""

import argparse
import csv
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the matrices are small: threads only wait for one another

import numpy as np
import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from scipy.stats import binomtest

from bench.apo import agentlightning, picture
from bench.apo.peers import factorial, gepa
from bench.apo.worlds import NULLS, PUBLISHED, SCORED, SEED_PROMPT, SPECS, World, summary
from bench.result import RESULTS, Result
from optimize.gate import decide

BUDGETS = (400, 1200)
GRID = range(20, 1201, 20)
MUST = {
    "rollouts_to_gepa_1200_worst_world": ("<=", 400.0),
    "worlds_above_gepa_at_400": (">=", 13.0),
    "worlds_below_gepa_at_400": ("<=", 0.0),
    "worlds_above_gepa_at_1200": (">=", 13.0),
    "worlds_below_gepa_at_1200": ("<=", 0.0),
    "worlds_above_agentlightning_at_400": (">=", 15.0),
    "worlds_below_agentlightning_at_400": ("<=", 0.0),
    "worlds_above_agentlightning_at_1200": (">=", 15.0),
    "worlds_below_agentlightning_at_1200": ("<=", 0.0),
    "null_promotions": ("<=", 0.05),
    "held_out_bias": ("<=", 0.02),
    "held_out_coverage": (">=", 0.93),
    "budget_overshoot": ("<=", 0.0),
}
Line = dict[str, Any]
Key = tuple[str, str, int, int]
ENGINES = ("ratchet", "gepa", "agentlightning")


def ours(name: str, seed: int, budget: int) -> Line:
    """One search with the product's defaults, and the gate on held-out tasks."""
    world = World(SPECS[name], seed)
    run = factorial(world, budget, seed)
    line: Line = {
        "engine": "ratchet",
        "world": name,
        "seed": seed,
        "budget": budget,
        "score": world.score(run.template),
    }
    line |= {"rollouts": run.rollouts, "calls": run.calls, "stop": run.stop, "promoted": False}
    if budget == max(BUDGETS):
        line["curve"] = [_at(run.curve, rollouts) for rollouts in GRID]
    if run.template != SEED_PROMPT:
        before, after = (
            [world.reward(text, task, 0, "gate") for task in world.held] for text in (SEED_PROMPT, run.template)
        )
        verdict = decide(before, after)
        true = float(np.mean([world.success(run.template, t) - world.success(SEED_PROMPT, t) for t in world.held]))
        line |= {"promoted": verdict.decision == "promote", "held_out": verdict.diff, "held_out_true": true}
        line |= {"covered": verdict.ci95[0] <= true <= verdict.ci95[1]}
    return line


def theirs(name: str, seed: int, budget: int) -> Line:
    """One search by gepa."""
    world = World(SPECS[name], seed)
    run = gepa(world, budget, seed)
    line: Line = {"engine": "gepa", "world": name, "seed": seed, "budget": budget, "score": world.score(run.template)}
    return line | {"rollouts": run.rollouts, "calls": run.calls}


def _at(curve: Sequence[tuple[int, float]], rollouts: int) -> float:
    """What would be reported after so many rollouts."""
    return next((score for spent, score in reversed(curve) if spent <= rollouts), 0.0)


def kept(path: Path, worlds: Sequence[str], seeds: Sequence[int]) -> list[Line]:
    """The peers' lines of an earlier run, of these worlds and seeds."""
    with path.open(newline="") as file:
        lines: list[Line] = [
            {**line, "seed": int(line["seed"]), "budget": int(line["budget"]), "score": float(line["score"])}
            for line in csv.DictReader(file)
            if line["engine"] != "ratchet"
        ]
    return [line for line in lines if line["world"] in worlds and line["seed"] in seeds]


def collect(plan: "Plan", jobs: int, known: Sequence[Line], journal: Path | None) -> list[Line]:
    """Every run of the plan; those that are not `known` are spread over processes. Each is appended to the `journal`
    as it is done."""
    keyed = {_key(line): line for line in known}
    with ProcessPoolExecutor(jobs) as pool, _bar() as bar:
        calls = [pool.submit(ours, *run[1:]) for run in plan.mine() if run not in keyed]
        calls += [pool.submit(theirs, *run[1:]) for run in plan.peer("gepa") if run not in keyed]
        if agentlightning.python() is not None:
            missing: dict[str, set[int]] = defaultdict(set)
            for _, name, seed, _ in (run for run in plan.peer("agentlightning") if run not in keyed):
                missing[name].add(seed)
            calls += [pool.submit(agentlightning.runs, name, sorted(seeds), BUDGETS) for name, seeds in missing.items()]
        task = bar.add_task("searches", total=len(calls))
        for call in as_completed(calls):
            done = call.result()
            for line in done if isinstance(done, list) else [done]:
                keyed[_key(line)] = line
                _note(journal, line)
            bar.advance(task)
    wanted = [*plan.mine(), *plan.peer("gepa"), *plan.peer("agentlightning")]
    return [keyed[run] for run in wanted if run in keyed]


@dataclass(frozen=True)
class Plan:
    """Which searches a run of the bench needs, each as (engine, world, seed, budget)."""

    worlds: Sequence[str]
    seeds: Sequence[int]
    nulls: int
    engines: Sequence[str]

    def mine(self) -> list[Key]:
        """Ours: scored worlds at both budgets, null worlds in turn at the smaller one."""
        if "ratchet" not in self.engines:
            return []
        names = [name for name in NULLS if name in self.worlds]
        nulls = (
            [(names[run % len(names)], self.seeds[0] + run // len(names)) for run in range(self.nulls)] if names else []
        )
        return self._scored("ratchet") + [("ratchet", name, seed, BUDGETS[0]) for name, seed in nulls]

    def peer(self, engine: str) -> list[Key]:
        """A peer's, on the scored worlds."""
        return self._scored(engine) if engine in self.engines else []

    def _scored(self, engine: str) -> list[Key]:
        names = [name for name in self.worlds if name in SCORED]
        return [(engine, name, seed, budget) for seed in self.seeds for name in names for budget in BUDGETS]


def _key(line: Line) -> Key:
    return line["engine"], line["world"], line["seed"], line["budget"]


def _note(journal: Path | None, line: Line) -> None:
    if journal is not None:
        with journal.open("ab") as file:
            file.write(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")


def _noted(journal: Path | None) -> list[Line]:
    if journal is None or not journal.exists():
        return []
    return [orjson.loads(line) for line in journal.read_bytes().splitlines()]


def _bar() -> Progress:
    return Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), transient=True)


def measure(result: Result, lines: Sequence[Line]) -> None:
    """Fill in the measures and, by world, the means with their intervals."""
    by: dict[tuple[str, str, int], dict[int, Line]] = defaultdict(dict)
    for line in lines:
        by[line["engine"], line["world"], line["budget"]][line["seed"]] = line
    published = [name for name in PUBLISHED if ("ratchet", name, 400) in by]
    table: dict[str, Any] = {}
    for name in [name for name in SCORED if ("ratchet", name, 400) in by]:
        table[name] = _world(by, name)
    for peer in ("gepa", "agentlightning"):
        for budget in BUDGETS:
            gaps = [
                table[name][f"minus_{peer}_{budget}"] for name in published if f"minus_{peer}_{budget}" in table[name]
            ]
            if gaps:
                result.measures[f"worlds_above_{peer}_at_{budget}"] = sum(low > 0 for _, low, _ in gaps)
                result.measures[f"worlds_below_{peer}_at_{budget}"] = sum(high < 0 for _, _, high in gaps)
    reached = [row["rollouts_to_gepa_1200"] for name in published if "rollouts_to_gepa_1200" in (row := table[name])]
    if reached:
        result.measures["rollouts_to_gepa_1200_worst_world"] = max(one or float("inf") for one in reached)
    mine = [line for line in lines if line["engine"] == "ratchet"]
    null = [line for line in mine if line["world"] in NULLS]
    if null:
        promoted = sum(line["promoted"] for line in null)
        exact = binomtest(promoted, len(null)).proportion_ci(0.95, "exact")
        result.measures["null_promotions"] = promoted / len(null)
        result.measures["null_share_spent"] = float(np.mean([line["rollouts"] / line["budget"] for line in null]))
        result.notes |= {"null_runs": len(null), "null_promotions_ci95": [float(exact.low), float(exact.high)]}
        result.notes["null_reached_the_gate"] = float(np.mean(["held_out" in line for line in null]))
        result.notes["null_share_spent_by_world"] = {
            name: float(np.mean([line["rollouts"] / line["budget"] for line in null if line["world"] == name]))
            for name in sorted({line["world"] for line in null})
        }
    gated = [line for line in mine if "held_out" in line]
    if gated:
        result.measures["held_out_bias"] = abs(
            float(np.mean([one["held_out"] - one["held_out_true"] for one in gated]))
        )
        result.measures["held_out_coverage"] = float(np.mean([line["covered"] for line in gated]))
    result.measures["budget_overshoot"] = float(max((line["rollouts"] - line["budget"] for line in mine), default=0))
    result.notes["worlds"] = table


def _world(by: dict[tuple[str, str, int], dict[int, Line]], name: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for budget in BUDGETS:
        mine = by["ratchet", name, budget]
        for engine in ENGINES:
            runs = by.get((engine, name, budget))
            if runs:
                row[f"{engine}_{budget}"] = summary([line["score"] for line in runs.values()])
                if engine != "ratchet":
                    gaps = [mine[seed]["score"] - line["score"] for seed, line in runs.items()]
                    row[f"minus_{engine}_{budget}"] = summary(gaps)
    curve = np.mean([line["curve"] for line in by["ratchet", name, max(BUDGETS)].values()], axis=0)
    row["curve"] = [round(float(score), 4) for score in curve]
    if goal := row.get(f"gepa_{max(BUDGETS)}"):
        row["rollouts_to_gepa_1200"] = next((at for at, mean in zip(GRID, curve, strict=True) if mean >= goal[0]), None)
    return row


def show(result: Result, console: Console) -> None:
    """The worlds' table, then the measures."""
    table = Table("world", *(f"{engine} {budget}" for budget in BUDGETS for engine in ENGINES))
    table.add_column("to gepa's 1,200")
    for name, row in result.notes["worlds"].items():
        cells = [row.get(f"{engine}_{b}") for b in BUDGETS for engine in ENGINES]
        shown = [f"{cell[0]:.2f} ({cell[1]:.2f}..{cell[2]:.2f})" if cell else "absent" for cell in cells]
        table.add_row(name, *shown, str(row.get("rollouts_to_gepa_1200", "absent")))
    console.print(table)
    result.show(console)


def main() -> None:
    """Run, write, show."""
    parser = argparse.ArgumentParser(prog="python -m bench.apo", description=__doc__)
    parser.add_argument("--seeds", type=int, default=int(os.environ.get("SEEDS", "10")))
    parser.add_argument("--first-seed", type=int, default=0, help="for tuning: seeds that no published table uses")
    nulls = int(os.environ.get("NULL_RUNS", "0"))
    parser.add_argument("--nulls", type=int, default=nulls, help="searches in null worlds, in all; default 18 a seed")
    parser.add_argument("--journal", type=Path, help="a file of runs that are done: a broken bench goes on from there")
    parser.add_argument("--keep-peers", action="store_true", help="take the peers' lines from the last apo.csv")
    parser.add_argument("--worlds", default=",".join(SPECS), help="which, by name")
    parser.add_argument("--engines", default=",".join(ENGINES), help="which, by name; the others' columns stay empty")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    worlds, engines, began = options.worlds.split(","), options.engines.split(","), time.monotonic()
    if unknown := set(worlds) - set(SPECS):
        parser.error(f"--worlds: no world {', '.join(sorted(unknown))}; there are {', '.join(SPECS)}")
    if unknown := set(engines) - set(ENGINES):
        parser.error(f"--engines: no engine {', '.join(sorted(unknown))}; there are {', '.join(ENGINES)}")
    console = Console()
    if "agentlightning" in engines and agentlightning.python() is None:
        console.print("agentlightning is absent (make .venvs/bench-agentlightning/.done installs it); what it has not")
        console.print("run yet stays empty")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    peers = kept(RESULTS / "apo.csv", worlds, seeds) if options.keep_peers else []
    plan = Plan(worlds, seeds, options.nulls or 18 * options.seeds, engines)
    done = _noted(options.journal)
    lines = collect(plan, options.jobs, [*peers, *done], options.journal)
    notes = {"seeds": options.seeds, "first_seed": options.first_seed, "runs_done_before": len(peers) + len(done)}
    result = Result("apo", MUST, notes=notes)
    measure(result, lines)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "apo.csv").open("w", newline="") as file:
        names = ["engine", "world", "seed", "budget", "score", "rollouts", "calls", "stop", "promoted", "held_out"]
        writer = csv.DictWriter(file, [*names, "held_out_true", "covered"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(sorted(lines, key=lambda line: (line["world"], line["engine"], line["budget"], line["seed"])))
    picture.draw(result.notes["worlds"], list(GRID), options.out / "apo.svg")
    result.write(time.monotonic() - began, options.out)
    show(result, console)


if __name__ == "__main__":
    main()
