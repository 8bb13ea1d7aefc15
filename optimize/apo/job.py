"""The job of `ratchet optimize apo`: origin, search, held-out gate, registration, promotion, report.

Everything paid is journalled as it happens, so the job can be killed at any moment and resumed without paying again.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from collector.client import Client
from collector.errors import RatchetError, Unavailable
from collector.settings import Settings
from optimize.apo import factorial
from optimize.apo.editor import LLMEditor
from optimize.apo.examples import gather
from optimize.apo.factorial import Progress, SearchResult
from optimize.apo.origin import Origin, find
from optimize.apo.proposers import Bank, Chain, Demonstrations, Example, Proposer
from optimize.apo.replay import ProposalLog, row_of
from optimize.apo.result import ApoResult, HeldOut, write_report
from optimize.apo.spec import CANARY_SHARE, ApoSpec, check
from optimize.budget import Budget
from optimize.evaluate import AgentEvaluator, context_hash, version_hash
from optimize.evaluation import Outcome, Request
from optimize.gate import Verdict, decide
from optimize.grade import check_tasks, grader
from optimize.jobs import Job, JobCancelled, JobLock, new_job_id
from optimize.llm import completer
from optimize.patience import patiently
from optimize.runner import Rollout, Runner


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
    work = _Work(spec, client, base_url, settings or Settings(), api_key, job_id or new_job_id(), on_progress)
    with JobLock(work.data_dir, work.job.job_id):
        return await work.run()


class _Work:
    """One run of a job. Each method is one step of `_steps`."""

    def __init__(
        self,
        spec: ApoSpec,
        client: Client,
        base_url: str,
        settings: Settings,
        api_key: str | None,
        job_id: str,
        on_progress: OnProgress | None,
    ) -> None:
        self.spec, self.client, self.settings = spec, client, settings
        self.base_url, self.api_key = base_url.rstrip("/"), api_key
        self.search_tasks, self.held = spec.load()
        if spec.grader is not None:
            check_tasks(spec.grader, [*self.search_tasks, *self.held])
        self.data_dir = Path(settings.store.data_dir)
        self.job = Job(client, job_id, "apo", spec.slot, spec.as_dict())
        self._say = on_progress or (lambda stage: None)
        self._phase, self._done, self._total = "origin", 0, 0
        self._latest: Progress | None = None
        self.runner = Runner(
            spec.command,
            client,
            base_url,
            api_key=api_key,
            grade=None if spec.grader is None else grader(spec.grader, settings.optimizer),
            grade_source="llm" if (spec.grader or "").startswith("judge:") else "code",
            concurrency=spec.concurrency,
            timeout=spec.timeout,
            cwd=Path(spec.cwd),
            env={**os.environ, "OPENAI_MODEL": spec.model} if spec.model else None,
            sandbox=spec.sandbox,
            run_id=job_id,
        )
        self.evaluator = AgentEvaluator(
            self.runner,
            client,
            spec.slot,
            job_id=job_id,
            context=context_hash(spec.command, spec.grader, spec.model, Path(spec.cwd)),
            model=spec.model,
            on_rollout=self._settled,
        )

    async def run(self) -> ApoResult:
        """All steps, with the job's state kept true however they end."""
        await self.job.start()
        try:
            result = await self._steps()
        except (JobCancelled, asyncio.CancelledError):
            await self._ended("cancelled")
            raise
        except Exception as error:  # boundary: whatever it was, the job's state must not stay "running"
            await self._ended("failed", {"error": error.message if isinstance(error, RatchetError) else repr(error)})
            raise
        await self.job.finish("done", result.as_dict())
        self._enter("done", 0, result.reason)
        return result

    async def _ended(self, status: str, result: dict[str, Any] | None = None) -> None:
        with contextlib.suppress(Unavailable):  # then the lock alone tells that nobody works on it
            await self.job.finish(status, result)

    async def _steps(self) -> ApoResult:
        began = time.monotonic()
        self._enter("origin", 0, f"{len(self.search_tasks)} tasks to search on, {len(self.held)} held out")
        origin = await find(self.client, self.runner, self.spec.slot, self.search_tasks)
        if origin.adopted:
            self._enter("origin", 0, f"adopted the agent's own prompt as {self.spec.slot}@{origin.version}")
        found = await self._search(origin)
        if found.stop == "failures":
            raise RatchetError(f"the agent is broken: {found.reason}")
        pairs: tuple[HeldOut, ...] = ()
        gate: Verdict | None = None
        if found.changed:
            pairs = await self._hold(origin.template, found.best_template)
            # Every candidate that these tasks have seen counts, whichever job brought it: held-out data wears out.
            tried = await self.evaluator.tried_on({task.id for task in self.held})
            gate = decide(
                [pair.before for pair in pairs],
                [pair.after for pair in pairs],
                alpha=self.settings.gate.alpha,
                candidates_tried=len(tried | {version_hash(found.best_template)}),
                min_samples=self.settings.gate.min_samples,
                seed=self.spec.seed,
            )
        result = await self._decided(origin, found, gate, pairs)
        result = replace(result, seconds=time.monotonic() - began)
        path = await asyncio.to_thread(write_report, result, self.data_dir / "reports")
        return replace(result, report=path)

    async def _search(self, origin: Origin) -> SearchResult:
        self._enter("search", self.spec.budget, f"searching with at most {self.spec.budget} rollouts")
        log = ProposalLog(self._proposer(origin), self.data_dir / "jobs" / f"{self.job.job_id}.proposals.jsonl")
        return await factorial.search(
            origin.template,
            self.search_tasks,
            self._evaluate,
            log,
            self._params(),
            on_progress=self._searching,
            rows=await self._paid_rows(),
            proposals=log.earlier,
            budget=Budget(self.spec.budget),
            train_texts=[str(value) for task in self.search_tasks for value in task.data.values()],
        )

    def _params(self) -> factorial.Params:
        """The engine's defaults; blocks that leave no agent idle where more run at once than a block has rollouts."""
        block = None if self.spec.concurrency <= 4 else self.spec.concurrency
        return factorial.Params(budget=self.spec.budget, seed=self.spec.seed, block=block)

    def _proposer(self, origin: Origin) -> Proposer:
        async def successes() -> list[Example]:
            return await gather(self.client, self.spec.slot, origin.template, self.search_tasks, self.held)

        chain: list[Proposer] = [Bank(), Demonstrations(source=successes, seed=self.spec.seed)]
        optimizer = self.settings.optimizer
        if optimizer.model:
            base = optimizer.api_base or f"{self.base_url}/e/{self.job.job_id}-editor/v1"
            key = optimizer.api_key or self.api_key or os.environ.get("OPENAI_API_KEY")
            chain.append(LLMEditor(completer(base, optimizer.model, key)))
        return Chain(chain)

    async def _paid_rows(self) -> list[factorial.Row]:
        """What this very job paid for before it was broken off."""
        known = {task.id: task for task in self.search_tasks}
        return [
            row_of(event, known[event["task_id"]])
            for event in await self.evaluator.evaluations()
            if event["arm"] == "search" and event["task_id"] in known
        ]

    async def _hold(self, before: str, after: str) -> tuple[HeldOut, ...]:
        """Both prompts once on every held-out task, side by side in time."""
        self._enter("gate", 2 * len(self.held), f"testing on {len(self.held)} held-out tasks, both prompts")
        requests = [
            Request(template, task, arm=arm)
            for task in self.held
            for template, arm in ((before, "baseline"), (after, "candidate"))
        ]
        outcomes = await self._evaluate(requests)
        return tuple(
            HeldOut(old.request.task.id, old.score, new.score, old.answer, new.answer, old.reason, new.reason)
            for old, new in zip(outcomes[::2], outcomes[1::2], strict=True)
        )

    async def _evaluate(self, requests: Sequence[Request]) -> list[Outcome]:
        await self.job.report(phase=self._phase, rollouts=self._done, total=self._total, **self._belief())
        outcomes = await self.evaluator.evaluate(requests)
        if self._phase == "gate":
            await self.job.report(rollouts=self._done)
        return outcomes

    async def _decided(
        self, origin: Origin, found: SearchResult, gate: Verdict | None, pairs: tuple[HeldOut, ...]
    ) -> ApoResult:
        """Register what deserves a number, promote what passed, say why in one sentence."""
        version = revision = None
        paid = await self.evaluator.evaluations()
        if gate is not None and gate.decision != "reject":
            version = await self._register(origin, found, gate)
            if gate.decision == "promote" and self.spec.promote != "never":
                revision = await self._promote(version, gate)
        return ApoResult(
            job_id=self.job.job_id,
            slot=self.spec.slot,
            verdict="reject" if gate is None else gate.decision,
            promoted=revision is not None,
            reason=f"no better prompt was found: {found.reason}" if gate is None else gate.reason,
            seed_template=origin.template,
            best_template=found.best_template,
            seed_version=origin.version,
            version=version,
            revision=revision,
            gate=gate,
            pairs=pairs,
            search=found,
            rollouts=len(paid),
            calls=sum(event["calls"] or 0 for event in paid),
            seconds=0.0,
        )

    async def _register(self, origin: Origin, found: SearchResult, gate: Verdict) -> int:
        body = {
            "kind": "prompt",
            "template": found.best_template,
            "parent": origin.version,
            "job_id": self.job.job_id,
            "note": gate.reason,
            "metrics": {"n": gate.n, "before": gate.before, "after": gate.after, "p_value": gate.p_value},
        }
        added = await patiently(lambda: self.client.add_version(self.spec.slot, **body))
        return int(added["version"])

    async def _promote(self, version: int, gate: Verdict) -> int:
        share = CANARY_SHARE if self.spec.promote == "canary" else 1.0
        how: dict[str, Any] = {"evidence": "gate", "job_id": self.job.job_id, "note": gate.reason}
        return await patiently(lambda: self.client.promote(self.spec.slot, version, share, **how))

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
