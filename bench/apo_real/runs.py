"""One search by one engine on the real model, and what it would have reported after how many paid rollouts."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from bench.apo_real.answers import Answers, Asked
from bench.apo_real.banks import Problem
from bench.apo_real.editor import MOST, Editor
from optimize.apo import engine as engines
from optimize.apo.beam import Beam
from optimize.apo.engine import Progress
from optimize.apo.factorial import Factorial
from optimize.apo.gepa import Gepa
from optimize.apo.parts import Part
from optimize.apo.proposers import Bank
from optimize.apo.state import State
from optimize.budget import Budget
from optimize.dataset import Task
from optimize.evaluation import Outcome, Request

ENGINES = ("ratchet", "gepa", "gepa-3", "beam")
EVERY = (*ENGINES, "ratchet-drip")  # the last: ours with the peers' kind of editor, for comparison
STEP = 20  # rollouts between two looks at what would be reported
MINIBATCH = {"gepa": 8, "gepa-3": 3}


@dataclass(frozen=True)
class Run:
    """What an engine reported, at what price. `curve`: (paid rollouts, prompt that it would report from there on)."""

    problem: str
    engine: str
    seed: int
    curve: tuple[tuple[int, str], ...]
    rollouts: int
    calls: int
    stop: str

    @property
    def final(self) -> str:
        """The prompt reported at the end."""
        return self.curve[-1][1]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


class FixedBank(Bank):
    """The bank as parts, all of them at the start; nothing more comes."""

    def __init__(self, problem: Problem) -> None:
        self.parts = list(problem.bank)


class Drip(FixedBank):
    """The bank as from an editor: one to three parts a call, in a random order, and only where failures are shown."""

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem)
        self._dice = random.Random(f"drip-{seed}")
        self._dice.shuffle(self.parts)

    async def propose(self, state: State) -> list[Part]:
        """The next few that are not known yet."""
        fresh = await super().propose(state) if state.failures else []
        return fresh[: self._dice.randint(1, MOST)]


def asked(problem: Problem, system: str, task: Task) -> Asked:
    """What the model is asked, and what is right."""
    expected = task.expected if isinstance(task.expected, list) else [task.expected]
    return Asked(system, problem.question(task), tuple(str(one) for one in expected), problem.longest)


async def search(problem: Problem, engine: str, seed: int, budget: int, answers: Answers) -> Run:
    """One search. Every rollout counts as paid, whether or not its answer is on disk; the reward is 1 for exact."""
    editor = Editor(problem.seed_prompt, problem.bank, seed)
    curve: list[tuple[int, str]] = [(0, problem.seed_prompt)]

    async def evaluate(requests: Sequence[Request]) -> list[Outcome]:
        right = await answers.right([asked(problem, one.template, one.task) for one in requests])
        return [
            Outcome(one, float(good), feedback="" if good else "not exactly right")
            for one, good in zip(requests, right, strict=True)
        ]

    def watch(progress: Progress) -> None:
        curve.append((progress.rollouts, progress.best_template))

    given = engines.Problem(
        seed_template=problem.seed_prompt,
        tasks=problem.search,
        evaluate=evaluate,
        budget=Budget(budget),
        proposer=Drip(problem, seed) if engine == "ratchet-drip" else FixedBank(problem),
        complete=editor.complete,
        seed=seed,
        on_progress=watch,
        params={"minibatch": MINIBATCH[engine]} if engine in MINIBATCH else {},
    )
    chosen: engines.Engine = Factorial() if engine.startswith("ratchet") else Beam() if engine == "beam" else Gepa()
    result = await chosen.search(given)
    curve.append((result.rollouts, result.best_template))
    return Run(problem.name, engine, seed, changes(sampled(curve)), result.rollouts, editor.calls, result.stop)


def sampled(curve: Sequence[tuple[int, str]], step: int = STEP) -> list[tuple[int, str]]:
    """The curve at every `step`-th rollout and at its end: what would be reported there."""
    end = curve[-1][0]
    grid = [*range(0, end, step), end]
    return [(at, [prompt for spent, prompt in curve if spent <= at][-1]) for at in grid]


def changes(curve: Sequence[tuple[int, str]]) -> tuple[tuple[int, str], ...]:
    """The curve without the points at which nothing changed."""
    kept: list[tuple[int, str]] = []
    for at, prompt in curve:
        if not kept or kept[-1][1] != prompt:
            kept.append((at, prompt))
    return tuple(kept)
