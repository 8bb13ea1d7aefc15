"""The engines under comparison, each on one world with the same scripted editor; every rollout is counted."""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.apo.worlds import SEED_PROMPT, Editor, World
from optimize.apo.engine import Progress
from optimize.apo.factorial import Params, search
from optimize.apo.parts import Part, make
from optimize.apo.state import State
from optimize.dataset import Task
from optimize.evaluation import Outcome, Request

MINIBATCH = 8  # gepa's own default is 3; its published and our measured best is 8


@dataclass(frozen=True)
class Run:
    """What an engine reported at the end, at what price, and `curve`: (rollouts, score of what it would report)."""

    template: str
    rollouts: int
    calls: int
    claimed: float | None = None  # the expected reward that the engine itself reports
    curve: tuple[tuple[int, float], ...] = field(default=())
    stop: str = ""


class Proposer:
    """The world's editor as a proposer of parts."""

    def __init__(self, world: World) -> None:
        self.editor = Editor(world)

    async def propose(self, state: State) -> list[Part]:
        """The named rules, each with the failures that it was named for; a whole rewrite where there are none."""
        if not state.failures:
            return []
        texts = {part.id: part.text for part in state.parts}
        shown = [
            (failure.task.id, "{input}\n" + "\n".join(texts[one] for one in failure.subset))
            for failure in state.failures
        ]
        edit = self.editor.edit(state.template, shown)
        if edit.whole:
            rewrites = {part.id for part in state.parts if part.kind == "rewrite"}
            parent = next((one for one in state.subset if one in rewrites), None)
            return [make("rewrite", edit.rewrite, parent=parent)]
        return [replace(make("instruction", text), cites=cites) for text, cites in edit.units]


def factorial(world: World, budget: int, seed: int, **params: Any) -> Run:
    """Ours, with its defaults."""
    tasks = [Task(name, {"input": name}, name) for name in world.tasks]
    proposer = Proposer(world)
    curve: list[tuple[int, float]] = []

    async def evaluate(requests: Sequence[Request]) -> list[Outcome]:
        scores = [world.reward(one.template, one.task.id, one.replicate) for one in requests]
        return [
            Outcome(request, score, feedback="" if score > 0.5 else "wrong")
            for request, score in zip(requests, scores, strict=True)
        ]

    def watch(progress: Progress) -> None:
        curve.append((progress.rollouts, world.score(progress.best_template)))

    options = Params(budget=budget, seed=seed, **params)
    result = asyncio.run(search(SEED_PROMPT, tasks, evaluate, proposer, options, watch))
    curve.append((result.rollouts, world.score(result.best_template)))
    claimed = result.value if result.changed else None
    return Run(result.best_template, world.rollouts, proposer.editor.calls, claimed, tuple(curve), result.stop)


class GepaAdapter:
    """A world behind gepa's adapter protocol: train tasks to reflect on, val tasks to choose by."""

    def __init__(self, world: World) -> None:
        self.world, self.editor = world, Editor(world)
        self._asked: Counter[tuple[str, str]] = Counter()

    def evaluate(self, batch: list[str], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        """One rollout a task."""
        from gepa import EvaluationBatch

        template = candidate["prompt"]
        scores = []
        for task in batch:
            scores.append(self.world.reward(template, task, self._asked[template, task]))
            self._asked[template, task] += 1
        traces = [(task, score) for task, score in zip(batch, scores, strict=True)] if capture_traces else None
        return EvaluationBatch(outputs=list(batch), scores=scores, trajectories=traces)

    def make_reflective_dataset(self, candidate: Any, batch: Any, components: list[str]) -> dict[str, list[Any]]:
        """The failures of a minibatch."""
        return {"prompt": [{"task": task} for task, score in batch.trajectories if score < 0.95]}

    def propose_new_texts(self, candidate: dict[str, str], failures: Any, components: list[str]) -> dict[str, str]:
        """The editor's whole rewrite."""
        template = candidate["prompt"]
        shown = [(record["task"], template) for record in failures["prompt"]]
        return {"prompt": self.editor.edit(template, shown).rewrite if shown else template}


def gepa(world: World, budget: int, seed: int) -> Run:
    """The real gepa at a budget of metric calls; it may overshoot, and what it spent is what is counted."""
    from gepa import optimize

    adapter = GepaAdapter(world)
    result = optimize(
        seed_candidate={"prompt": SEED_PROMPT},
        trainset=list(world.train),
        valset=list(world.val),
        adapter=adapter,
        reflection_minibatch_size=min(MINIBATCH, len(world.train)),
        max_metric_calls=budget,
        seed=seed,
        logger=_Silent(),
        raise_on_exception=True,
    )
    best = result.best_idx
    claimed = float(result.val_aggregate_scores[best])
    return Run(result.candidates[best]["prompt"], world.rollouts, adapter.editor.calls, claimed)


class _Silent:
    def log(self, message: str) -> None:
        logging.getLogger(__name__).debug("%s", message)
