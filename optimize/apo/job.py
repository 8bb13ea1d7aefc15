"""The job of `ratchet optimize apo`: origin, search, held-out gate, registration, promotion, report.

Everything paid is journalled as it happens, so the job can be killed at any moment and resumed without paying again.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from collector.client import Client
from collector.errors import BadInput, NotFound, RatchetError
from collector.settings import Settings
from optimize.apo.costs import compare, within
from optimize.apo.editor import LLMEditor
from optimize.apo.engine import Engine, Problem, Progress, Row, SearchResult
from optimize.apo.joint import Joint
from optimize.apo.judge import Judge
from optimize.apo.origin import Origin
from optimize.apo.proposers import Chain
from optimize.apo.replay import ProposalLog, ReplyLog, row_of
from optimize.apo.result import ApoResult, HeldOut, pair_of, write_report
from optimize.apo.setup import Setup, agent_setup, replay_setup
from optimize.apo.shorter import Shortened
from optimize.apo.spec import CANARY_SHARE, ApoSpec, check
from optimize.apo.state import Proposer
from optimize.budget import Budget
from optimize.dataset import Task
from optimize.evaluate import JournalledEvaluator, tokens, version_hash
from optimize.evaluation import Outcome, Request
from optimize.gate import Verdict
from optimize.jobs import Job, JobLock, decoded, new_job_id
from optimize.joint import divide, join
from optimize.patience import patiently
from optimize.rollout import Rollout

PROBE = 1_000_000  # the replicate of the rollout that tells what one costs, where tokens or money are limited


@dataclass(frozen=True)
class Stage:
    """Where the job stands. `phase`: origin, search, gate or done; `rollouts` of `total` in this phase; `search` is the
    search's own latest progress."""

    phase: str
    rollouts: int
    total: int
    message: str = ""
    search: Progress | None = None


OnProgress = Callable[[Stage], None]


async def run_apo(
    spec: ApoSpec,
    client: Client,
    base_url: str,
    *,
    settings: Settings | None = None,
    api_key: str | None = None,
    job_id: str | None = None,
    on_progress: OnProgress | None = None,
) -> ApoResult:
    """Run a search to its verdict; with `job_id` of an earlier one, resume it.

    Raises BadInput before anything is paid, JobCancelled, Unavailable where proxy or collector stay away, RatchetError
    where the agent itself is broken. The job's state in the registry says the same.
    """
    check(spec)
    settings, job_id = settings or Settings(), job_id or new_job_id()
    if spec.mode == "replay":
        setup = await replay_setup(spec, client, base_url, settings, api_key, job_id)
    else:
        setup = agent_setup(spec, client, base_url, settings, api_key, job_id)
    return await run_setup(spec, setup, client, settings=settings, job_id=job_id, on_progress=on_progress)


async def run_setup(
    spec: ApoSpec,
    setup: Setup,
    client: Client,
    *,
    settings: Settings,
    job_id: str,
    on_progress: OnProgress | None = None,
) -> ApoResult:
    """The same with the ingredients given, whoever makes the rollouts."""
    check(spec)
    work = _Work(spec, setup, client, settings, job_id, on_progress)
    with JobLock(work.data_dir, job_id):
        return await work.run()


def engine_of(name: str) -> Engine:
    """The engine of a name. Raises BadInput, for gepa also where its package is absent."""
    if name == "beam":
        from optimize.apo.beam import Beam

        return Beam()
    if name == "gepa":
        from optimize.apo.gepa import Gepa

        return Gepa()
    from optimize.apo.factorial import Factorial

    return Factorial()


class _Work:
    """One run of a job. Each method is one step of `_steps`."""

    def __init__(
        self,
        spec: ApoSpec,
        setup: Setup,
        client: Client,
        settings: Settings,
        job_id: str,
        on_progress: OnProgress | None,
    ) -> None:
        self.spec, self.setup, self.client, self.settings = spec, setup, client, settings
        self.search_tasks, self.held = setup.search, setup.held
        self.engine = Joint(Shortened(engine_of(spec.engine)))
        self.origins: dict[str, Origin] = {}
        self.data_dir = Path(settings.store.data_dir)
        self.job = Job(client, job_id, "apo", spec.slot, spec.as_dict())
        self._say = on_progress or (lambda stage: None)
        self._phase, self._done, self._total = "origin", 0, 0
        self._latest: Progress | None = None
        self.notes = setup.notes
        self.budget = Budget(
            spec.budget,
            tokens=spec.budget_tokens,
            usd=spec.budget_usd,
            seconds=spec.budget_seconds,
            keep=2 * len(self.held) * spec.replicates,
            at_once=spec.concurrency,
        )
        self.evaluator = JournalledEvaluator(
            setup.rollouts,
            client,
            spec.slot,
            job_id=job_id,
            context=setup.context,
            model=spec.model,
            on_rollout=self._settled,
        )

    async def run(self) -> ApoResult:
        """All steps, with the job's state kept true however they end."""
        await self._count_earlier()
        result = await self.job.run(self._steps)
        self._enter("done", 0, result.reason)
        return result

    async def _count_earlier(self) -> None:
        """The seconds of an earlier, broken run of this job count against its limit."""
        with contextlib.suppress(NotFound):
            earlier = await patiently(lambda: self.client.job(self.job.job_id))
            self.budget.start_from(float(decoded(earlier, "progress").get("seconds") or 0.0))

    async def _steps(self) -> ApoResult:
        began = time.monotonic()
        for note in self.setup.notes:
            self._enter("origin", 0, note)
        self._enter("origin", 0, f"{len(self.search_tasks)} tasks to search on, {len(self.held)} held out")
        self.origins = await self.setup.origin()
        for slot, origin in self.origins.items():
            if origin.adopted:
                self._enter("origin", 0, f"adopted the agent's own prompt as {slot}@{origin.version}")
        seed = self._seed()
        await self._probe(seed)
        found = await self._search(seed)
        if found.stop == "failures":
            said = next((row.feedback for row in found.rows if not row.ok and row.feedback), "")
            raise RatchetError(f"the agent is broken: {found.reason}" + (f" ({said[-400:]})" if said else ""))
        pairs, gate = await self._hold(seed, found.best_template) if found.changed else ((), None)
        costs = compare(pairs, self.settings.gate)
        gate = within(gate, costs, self.settings.gate) if gate else None
        result = await self._decided(found, gate, pairs)
        result = replace(result, seconds=time.monotonic() - began, costs=costs, used=self.budget.used)
        path = await asyncio.to_thread(write_report, result, self.data_dir / "reports")
        return replace(result, report=path)

    def _seed(self) -> str:
        """The prompt to start from; of several slots, all of them as one."""
        templates = {slot: origin.template for slot, origin in self.origins.items()}
        return join(templates) if len(templates) > 1 else next(iter(templates.values()))

    async def _probe(self, template: str) -> None:
        """One rollout of the prompt as it is, where a limit needs to know what one costs."""
        if not self.budget.limited or not self.budget.reserve(1):
            return
        (outcome,) = await self.evaluator.evaluate([Request(template, self.search_tasks[0], PROBE)])
        unknown = {"tokens": outcome.tokens is None, "usd": outcome.cost_usd is None}
        for name in self.budget.limited:
            if outcome.ok and unknown.get(name):
                raise BadInput(
                    f"--budget-{name} cannot be held: nobody says what a rollout costs in {name}; limit rollouts or "
                    f"seconds, or give the model's entry in model_list its price",
                    param=f"budget_{name}",
                )
        self.budget.settle(outcome.tokens, outcome.cost_usd, outcome.seconds)

    async def _search(self, seed: str) -> SearchResult:
        self._enter("search", self.spec.budget, f"searching with at most {self.spec.budget} rollouts")
        folder = self.data_dir / "jobs"
        ask, complete = self.setup.ask, None
        free = list(self.setup.free(seed))
        if ask is not None:
            complete = ReplyLog(ask, folder / f"{self.job.job_id}.replies.jsonl", self.budget).complete
        proposers: list[Proposer] = [*free, *([LLMEditor(complete)] if complete else [])]
        log = ProposalLog(Chain(proposers), folder / f"{self.job.job_id}.proposals.jsonl")
        return await self.engine.search(
            Problem(
                seed,
                self.search_tasks,
                self._evaluate,
                self.budget,
                log,
                complete,
                seed=self.spec.seed,
                concurrency=self.spec.concurrency,
                rows=await self._paid_rows(),
                proposals=log.earlier,
                train_texts=[str(value) for task in self.search_tasks for value in task.data.values()],
                on_progress=self._searching,
                params=self.spec.engine_params,
            )
        )

    async def _paid_rows(self) -> list[Row]:
        """What this very job paid for before it was broken off."""
        known = {task.id: task for task in self.search_tasks}
        return [
            row_of(event, known[event["task_id"]])
            for event in await self.evaluator.evaluations()
            if event["arm"] == "search" and event["task_id"] in known and event["replicate"] != PROBE
        ]

    async def _hold(self, before: str, after: str) -> tuple[tuple[HeldOut, ...], Verdict | None]:
        """Both prompts on the held-out tasks until the judge knows; on fewer where the budget leaves no more."""
        # Every candidate that these tasks have seen counts, whichever job brought it: held-out data wears out.
        tried = await self.evaluator.tried_on({task.id for task in self.held})
        judge = Judge(self.spec.gate, self.settings.gate, len(tried | {version_hash(after)}), self.spec.seed)
        each = 2 * self.spec.replicates
        held = self.held[: self.budget.affordable(each * len(self.held)) // each] if self.budget.limited else self.held
        short = "" if len(held) == len(self.held) else f" of {len(self.held)}: the budget leaves no more"
        self._enter("gate", each * len(held), f"testing on {len(held)} held-out tasks{short}, both prompts")
        pairs: tuple[HeldOut, ...] = ()
        for block in judge.blocks(held, self.spec.concurrency):
            pairs += await self._paired(block, before, after)
            if judge.settled(pairs):
                break
        if len(pairs) < len(held):
            self.notes += (f"the held-out test was decided after {len(pairs)} of {len(held)} tasks",)
        return pairs, judge.verdict(pairs)

    async def _paired(self, held: Sequence[Task], before: str, after: str) -> tuple[HeldOut, ...]:
        """Both prompts on each task, side by side in time."""
        each = 2 * self.spec.replicates
        requests = [
            Request(template, task, replicate, arm)
            for task in held
            for replicate in range(self.spec.replicates)
            for template, arm in ((before, "baseline"), (after, "candidate"))
        ]
        outcomes = await self._evaluate(requests)
        return tuple(pair_of(outcomes[at : at + each]) for at in range(0, len(outcomes), each))

    async def _evaluate(self, requests: Sequence[Request]) -> list[Outcome]:
        seconds = round(self.budget.used["seconds"], 1)
        await self.job.report(
            phase=self._phase, rollouts=self._done, total=self._total, seconds=seconds, **self._belief()
        )
        outcomes = await self.evaluator.evaluate(requests)
        if self._phase == "gate":
            await self.job.report(rollouts=self._done)
        return outcomes

    async def _decided(self, found: SearchResult, gate: Verdict | None, pairs: tuple[HeldOut, ...]) -> ApoResult:
        """Register what deserves a number, promote what passed, say why in one sentence."""
        versions: dict[str, int] = {}
        revision = None
        paid = await self.evaluator.evaluations()
        if gate is not None and gate.decision != "reject":
            versions = await self._register(found, gate)
            if gate.decision == "promote" and self.spec.promote != "never":
                for slot, version in versions.items():
                    revision = await self._promote(slot, version, gate)
        return ApoResult(
            job_id=self.job.job_id,
            slot=self.spec.slot,
            verdict=gate.decision if gate else "shadow" if found.changed else "reject",
            promoted=revision is not None,
            reason=_reason(found, gate),
            seed_template=found.seed_template,
            best_template=found.best_template,
            seed_version=next(iter(self.origins.values())).version,
            version=next(iter(versions.values()), None),
            versions=versions,
            revision=revision,
            gate=gate,
            pairs=pairs,
            search=found,
            rollouts=len(paid),
            calls=tokens(event["calls"] for event in paid),
            seconds=0.0,
            notes=self.notes,
        )

    async def _register(self, found: SearchResult, gate: Verdict) -> dict[str, int]:
        """The number of each slot's new version, of those whose prompt changed."""
        versions = {}
        for slot, template in divide(found.best_template, self.spec.slot).items():
            if template == self.origins[slot].template:
                continue
            body = {
                "kind": "prompt",
                "template": template,
                "parent": self.origins[slot].version,
                "job_id": self.job.job_id,
                "note": gate.reason,
                "metrics": {"n": gate.n, "before": gate.before, "after": gate.after, "p_value": gate.p_value},
            }
            added = await patiently(partial(self.client.add_version, slot, **body))
            versions[slot] = int(added["version"])
        return versions

    async def _promote(self, slot: str, version: int, gate: Verdict) -> int:
        share = CANARY_SHARE if self.spec.promote == "canary" else 1.0
        how: dict[str, Any] = {"evidence": "gate", "job_id": self.job.job_id, "note": gate.reason}
        return await patiently(lambda: self.client.promote(slot, version, share, **how))

    def _settled(self, request: Request, rollout: Rollout) -> None:
        self._done += 1
        self._say(Stage(self._phase, self._done, self._total, search=self._latest))

    def _searching(self, progress: Progress) -> None:
        self._latest, self._done = progress, progress.rollouts
        self._say(Stage("search", self._done, self._total, search=progress))

    def _belief(self) -> dict[str, Any]:
        if self._latest is None:
            return {}
        return {name: getattr(self._latest, name) for name in ("gain", "p_gain", "best_template")}

    def _enter(self, phase: str, total: int, message: str) -> None:
        self._phase, self._done, self._total = phase, 0, total
        self._say(Stage(phase, 0, total, message))


def _reason(found: SearchResult, gate: Verdict | None) -> str:
    if gate is not None:
        return gate.reason
    if found.changed:
        return "a candidate was found, but the budget left nothing for the held-out test"
    return f"no better prompt was found: {found.reason}"
