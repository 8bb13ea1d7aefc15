"""The whole benchmark: start everything, take the rounds, see that nothing was lost, write what came out."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.gateway import figures, ours, report, rounds
from bench.gateway.payloads import Scenario, scenarios
from bench.gateway.process import NotStarted, Target
from bench.gateway.rounds import Samples
from bench.gateway.stage import PEERS, Stage
from bench.result import RESULTS, Result

NAMES = ("floor", figures.OURS, "unrecorded", *PEERS)
FEW, MANY = 5_000, 50_000  # calls after which the memory of a worker is read
SMALL = next(one for one in scenarios() if one.name == "json_c16")
_SUSTAINED = 6.0  # seconds: longer than a segment and its loading, so that the loader's share lies within
_AT_MOST = 240.0  # seconds for the calls whose memory is asked
_RECORDING = (figures.OURS, "unrecorded")


@dataclass(frozen=True)
class Plan:
    """What to run. `targets` and `names` of scenarios None: all. `quick`: no boots, no memory."""

    rounds: int = 4
    targets: Sequence[str] | None = None
    names: Sequence[str] | None = None
    scale: float = 1.0
    quick: bool = False

    @property
    def whole(self) -> bool:
        """Whether this is the run whose figures are kept."""
        return self.targets is None and self.names is None and not self.quick

    def scenarios(self) -> list[Scenario]:
        """The scenarios to run, in their order; `sustained` is the one for recording on against off."""
        long = replace(SMALL, name="sustained", title="JSON, c=16, sustained", seconds=_SUSTAINED, calls=100_000)
        return [one for one in (*scenarios(), long) if self.names is None or one.name in self.names]


@dataclass
class Outcome:
    """All that was measured."""

    samples: Samples = field(default_factory=Samples)
    measures: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    integrity: dict[str, Any] = field(default_factory=dict)


def run(plan: Plan) -> Result:
    """Measure, print, and for a whole run write `bench/results/gateway.{json,md,svg}`."""
    began = time.monotonic()
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="bench-gateway-"))
    bar = Progress(TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with bar:
            task = bar.add_task("", total=plan.rounds * len(plan.scenarios()))
            stage = Stage(folder, lambda said: bar.update(task, description=said))
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, stage.cores.load)
            try:
                outcome = _measure(stage, plan, lambda: bar.advance(task))
            finally:
                os.sched_setaffinity(0, before)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = _result(stage, plan, outcome)
    seconds = time.monotonic() - began
    text = report.markdown(result, outcome.samples, stage, outcome.memory)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if plan.whole:
        result.write(seconds)
        (RESULTS / "gateway.md").write_text(text)
        report.picture(outcome.samples, RESULTS / "gateway.svg")
    return result


def _measure(stage: Stage, plan: Plan, advance: Any) -> Outcome:
    outcome = Outcome()
    names = [name for name in NAMES if plan.targets is None or name in plan.targets]
    names = stage.install(names)
    with stage.scripted() as direct:
        if not plan.quick:
            names = stage.boot(names)
        with contextlib.ExitStack() as stack:
            targets = [direct, *stage.up(stack, names)]
            for at in range(plan.rounds):
                for scenario in plan.scenarios():
                    stage.say(f"round {at + 1}: {scenario.title}")
                    rounds.measure(outcome.samples, taking_part(targets, scenario), scenario, at, plan.scale)
                    advance()
            for target in targets:
                outcome.memory[target.name] = target.resident()
                if target.name == figures.OURS:
                    outcome.integrity = integrity(target)
        if figures.OURS in names and not plan.quick:
            _apart(stage, outcome)
    return outcome


def taking_part(targets: Sequence[Target], scenario: Scenario) -> list[Target]:
    """The sustained load is for recording on against off; the other loads are for everything else."""
    if scenario.name == "sustained":
        return [target for target in targets if target.name in _RECORDING]
    return [target for target in targets if target.name != "unrecorded"]


def integrity(target: Target) -> dict[str, Any]:
    """Calls sent, journal lines, spans, distinct spans, spans that were served the promoted version: whether all agree.
    The first calls, before the promotion, were served the agent's own version."""
    assert target.folder is not None
    held = ours.records(target)
    found = {
        "sent": target.sent,
        "lines": ours.lines(target.folder),
        "spans": held.spans,
        "distinct": held.distinct,
        "injected": held.injected,
    }
    complete = found["sent"] == found["lines"] == found["spans"] == found["distinct"]
    return {**found, "complete": complete}


def _apart(stage: Stage, outcome: Outcome) -> None:
    """What takes servers of its own. One that fails leaves its figures out, and the reason among the failures."""
    for name, measured in (("memory", _memory), ("workers", _workers)):
        try:
            outcome.measures |= measured(stage)
        except (NotStarted, TimeoutError, ConnectionError) as error:
            outcome.samples.failures[name] = str(error).strip()[-300:] or "calls stayed unanswered"


def _memory(stage: Stage) -> dict[str, float]:
    """The worker's memory after few and after many calls to a fresh server. Raises TimeoutError where the machine is
    too busy for so many."""
    found = {}
    with stage.target(figures.OURS, stage.cores.target) as target:
        for calls in (FEW, MANY):
            stage.say(f"memory after {calls} calls")
            more = calls - target.sent - 2 * SMALL.concurrency
            rounds.loaded(target, replace(SMALL, calls=more, seconds=_AT_MOST))
            if target.sent < calls:
                raise TimeoutError(f"only {target.sent} of {calls} calls within {_AT_MOST:g} s")
            found[calls] = target.resident(ours.WORKER)
    return {
        "rss_50k_vs_5k": found[MANY] / found[FEW],
        "rss_worker_5k_mb": found[FEW] / 1e6,
        "rss_worker_50k_mb": found[MANY] / 1e6,
    }


def _workers(stage: Stage) -> dict[str, float]:
    """Calls a second of two workers over those of one, on two CPUs; nothing where there are none to spare."""
    rps = {}
    for workers in (1, 2) if stage.cores.pair else ():
        stage.say(f"{workers} workers")
        with ours.served(stage.fresh("workers"), stage.upstream, stage.cores.pair, workers=workers) as target:
            seen, _ = rounds.loaded(target, replace(SMALL, seconds=_SUSTAINED, calls=200_000))
            rps[workers] = seen.measures["rps"]
    return {"workers_2_vs_1_rps": rps[2] / rps[1]} if rps else {}


def _result(stage: Stage, plan: Plan, outcome: Outcome) -> Result:
    compared = figures.compared(outcome.samples)
    measures = {name: figure.median for name, figure in compared.items()} | outcome.measures
    if stage.boots.get(figures.OURS):
        measures["boot_seconds"] = median(stage.boots[figures.OURS])
    loads = outcome.samples.loads
    notes: dict[str, Any] = {
        "rounds": plan.rounds,
        "load_average": {"low": min(loads), "median": median(loads), "high": max(loads)} if loads else {},
        "spread": {name: [round(figure.low, 4), round(figure.high, 4)] for name, figure in compared.items()},
        "absent": stage.absent,
        "failed": outcome.samples.failures,
        "integrity": outcome.integrity,
        "boot_seconds": {name: [round(one, 2) for one in values] for name, values in stage.boots.items()},
        "rss_tree_mb": {name: round(value / 1e6) for name, value in outcome.memory.items() if value},
        "samples": outcome.samples.listed(),
    }
    if not stage.cores.pair:
        notes["workers_2_vs_1_rps"] = "not measured: it takes four CPUs, two for the workers and two for the load"
    return Result("gateway", figures.MUST, measures, notes)
