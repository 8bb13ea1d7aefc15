"""`python -m bench.apo_real [--seeds 5] [--problems capital,reviews]`: prompt search on the real local model.

Writes bench/results/apo-real.json and apo-real.svg. Answers are kept under data/apo-real, so a second run, or one that
was broken off, asks the model for nothing twice.
"""

import argparse
import asyncio
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.apo_real import figures, picture
from bench.apo_real.answers import Answers, Cache
from bench.apo_real.banks import PROBLEMS, Problem
from bench.apo_real.runs import ENGINES, EVERY, Run, asked, search
from bench.result import RESULTS, Result

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "data" / "models" / "gemma-3-270m"
KEPT = ROOT / "data" / "apo-real"
PEERS = ("gepa", "beam")  # the better minibatch stands for gepa
MUST = 0.6
GIVEN = (
    "ratchet gets the bank's parts at the start and no editor. gepa (minibatch 8, or 3 as gepa-3, the better of which "
    "counts) and beam get a scripted editor that adds, replaces or drops one to three parts of the prompt at random, "
    "out of the same bank, with no hint which are good. ratchet-drip gets one to three random parts of the bank a "
    "call. All start at the same prompt and see the same search tasks; the reward is 1 for an exactly right greedy "
    "answer, else 0; every rollout counts as paid, cached or not. What would be reported is looked at every 20 "
    "rollouts. A run is there when all that it reports from then on is within 3 points of the best final prompt of "
    "any engine and seed; one that never is counts as later than any, and a peer's median then as the whole budget. "
    "Answers: fp32, its products in bfloat16 where the CPU can (the same text as without in 140 of 140 compared). "
    "`seconds` is of the last run, which asks the model only for what is not on disk yet."
)


class Bench:
    """One problem: its searches, and the truth about the prompts that they reported."""

    def __init__(self, problem: Problem, options: argparse.Namespace, say: Callable[[str], None]) -> None:
        self.problem, self.options, self.say = problem, options, say
        self.answers = Answers(MODEL, Cache(KEPT / f"{problem.name}.jsonl"), threads=options.threads)
        self.kept = Kept(KEPT / f"{problem.name}-runs-{options.budget}.jsonl")
        self.truth: dict[str, float] = {}

    async def run(self, tell: Callable[[list[Run], figures.Truth], None]) -> None:
        """What is not on disk yet, a few seeds at a time; tells whenever there is more to report."""
        seeds = [] if self.options.finished else range(self.options.seeds)
        try:
            for first in range(0, len(seeds), self.options.together):
                wanted = itertools.product(seeds[first : first + self.options.together], self.options.engines)
                await asyncio.gather(*(self._search(*one) for one in wanted if one not in self.kept.runs))
                await self._told(tell)
            runs = await self._told(tell)
            if runs and not self.options.brief:
                await asyncio.gather(*(self.score(prompt) for run in runs for _, prompt in run.curve))
                tell(runs, self.truth)
        finally:
            self.answers.close()

    async def score(self, prompt: str) -> float:
        """Share of the evaluation set that the prompt gets exactly right."""
        if prompt not in self.truth:
            problem = self.problem
            right = await self.answers.right([asked(problem, prompt, task) for task in problem.evaluation])
            self.truth[prompt] = sum(right) / len(right)
        return self.truth[prompt]

    async def _search(self, seed: int, engine: str) -> None:
        began = time.monotonic()
        run = await search(self.problem, engine, seed, self.options.budget, self.answers)
        self.kept.add(run)
        seconds = time.monotonic() - began
        self.say(f"{run.problem} {engine} seed {seed}: {run.rollouts} rollouts, {run.stop}, {seconds:.0f} s")

    async def _told(self, tell: Callable[[list[Run], figures.Truth], None]) -> list[Run]:
        """Scores the final prompts, then each run's others from its end on while they are good; tells the figures."""
        runs = whole(self.kept.runs.values(), self.options)
        if not runs:
            return []
        await asyncio.gather(*(self.score(prompt) for run in runs for prompt in (self.problem.seed_prompt, run.final)))
        goal = figures.target(runs, self.truth)
        await asyncio.gather(*(self._walk(run, goal) for run in runs))
        tell(runs, self.truth)
        return runs

    async def _walk(self, run: Run, goal: float) -> None:
        for _, prompt in reversed(run.curve):
            if not figures.good(await self.score(prompt), goal):
                return


def whole(runs: Iterable[Run], options: argparse.Namespace) -> list[Run]:
    """The runs of those seeds for which every engine has come to its end."""
    known = {(run.seed, run.engine): run for run in runs if run.seed < options.seeds}
    seeds = [seed for seed in range(options.seeds) if all((seed, engine) in known for engine in options.engines)]
    return [known[seed, engine] for engine in options.engines for seed in seeds]


class Kept:
    """Finished searches in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[tuple[int, str], Run] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            entry = json.loads(line)
            run = Run(**{**entry, "curve": tuple((at, prompt) for at, prompt in entry["curve"])})
            self.runs[run.seed, run.engine] = run

    def add(self, run: Run) -> None:
        """Keep a run, at once."""
        self.runs[run.seed, run.engine] = run
        with self.path.open("a") as file:
            file.write(json.dumps(run.as_dict()) + "\n")


def measure(result: Result, problem: Problem, runs: Sequence[Run], truth: figures.Truth, budget: int) -> None:
    """Fill in one problem's figures."""
    goal = figures.target(runs, truth)
    counts = {
        engine: [figures.reached(run, truth, goal) for run in runs if run.engine == engine]
        for engine in dict.fromkeys(run.engine for run in runs)
    }
    if "gepa-3" in counts:
        best = min(("gepa", "gepa-3"), key=lambda name: _late(counts[name], budget))
        counts["gepa, the better"] = counts[best]
    notes: dict[str, Any] = {"seed_prompt": truth[problem.seed_prompt], "best": goal + figures.CLOSE, "engines": {}}
    for engine, reached in counts.items():
        ends = [truth[run.final] for run in runs if run.engine == engine]
        notes["engines"][engine] = {
            "rollouts": reached,
            "median": figures.middle(reached),
            "ci95": figures.interval(reached),
            "scores_at_end": ends,
        }
    for peer in PEERS:
        theirs = counts.get("gepa, the better", counts.get(peer)) if peer == "gepa" else counts.get(peer)
        ours = counts.get("ratchet")
        value = None if ours is None or theirs is None else figures.ratio(ours, theirs, budget)
        if value is not None:
            result.measures[f"{problem.name}_rollouts_of_{peer}"] = value
    winner = max(runs, key=lambda run: truth[run.final])
    notes |= {"best_prompt": winner.final, "best_by": winner.engine, "seeds": len({run.seed for run in runs})}
    notes["curves"] = {
        engine: [[(at, truth.get(text)) for at, text in run.curve] for run in runs if run.engine == engine]
        for engine in counts
        if engine in EVERY
    }
    result.notes[problem.name] = notes


def _late(counts: Sequence[int | None], budget: int) -> tuple[float, float]:
    """The median, then the mean, runs that never got there as twice the budget."""
    whole = [2.0 * budget if count is None else float(count) for count in counts]
    return figures.middle(counts) or 2.0 * budget, sum(whole) / len(whole)


def main() -> None:
    """Run, write, show."""
    parser = argparse.ArgumentParser(prog="python -m bench.apo_real", description=__doc__)
    parser.add_argument("--seeds", type=int, default=int(os.environ.get("SEEDS", "5")))
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"of {', '.join(EVERY)}")
    parser.add_argument("--budget", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--together", type=int, default=5, help="seeds that run side by side")
    parser.add_argument("--finished", action="store_true", help="search nothing more: report what is on disk")
    parser.add_argument("--brief", action="store_true", help="score only the prompts that the figures need")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.engines = options.engines.split(",")
    if unknown := {*options.engines} - {*EVERY}:
        parser.error(f"--engines: no engine {', '.join(sorted(unknown))}; there are {', '.join(EVERY)}")
    console, began = Console(), time.monotonic()
    names = options.problems.split(",")
    must = {f"{name}_rollouts_of_{peer}": ("<=", MUST) for name in names for peer in PEERS}
    result = Result("apo-real", must, notes={"given": GIVEN, "budget": options.budget})
    for name in names:
        problem = PROBLEMS[name]()

        def tell(runs: list[Run], truth: figures.Truth, problem: Problem = problem) -> None:
            measure(result, problem, runs, truth, options.budget)
            result.write(time.monotonic() - began, options.out)

        asyncio.run(Bench(problem, options, lambda line: console.print(line, highlight=False)).run(tell))
    measured = {name: result.notes[name] for name in names if name in result.notes}
    if not measured:
        console.print("no seed is finished by every engine: nothing to report")
        raise SystemExit(1)
    picture.draw(measured, options.budget, options.out / "apo-real.svg")
    result.show(console)


if __name__ == "__main__":
    main()
