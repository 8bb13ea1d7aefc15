"""The job of `ratchet optimize rl`: collect, credit, train, register, choose on validation, gate once, promote.

Rounds follow one another: each collects with the policy that the last one made. The version that did best on the
validation tasks meets the held-out tasks, once; only if it is proven better there does it get traffic. Everything that
was paid, and every adapter, is on disk before it is used, so the job can be killed at any moment and resumed.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from collector.client import Client
from collector.errors import BadInput, RatchetError
from collector.settings import Settings
from optimize.dataset import Task
from optimize.gate import Verdict, decide
from optimize.grade import check_tasks, grader
from optimize.jobs import Job, JobCancelled, JobLock, new_job_id
from optimize.patience import patiently
from optimize.rl.adapter import read_manifest
from optimize.rl.gather import Gathered, advantages, gather
from optimize.rl.methods import method
from optimize.rl.paid import Paid
from optimize.rl.rows import Report, Row, Rules, build
from optimize.rl.spec import CANARY_SHARE, RlSpec, check
from optimize.rollout import Plan, Rollout
from optimize.runner import Runner

HOLD_SECONDS = 6 * 3600.0


@dataclass(frozen=True)
class Policy:
    """What answers: the base model (`version` None), or a registered adapter version. `score` on validation."""

    version: int | None
    name: str
    hash: str
    folder: Path | None = None
    score: float | None = None


@dataclass(frozen=True)
class Round:
    """One round, told: mean reward of its rollouts, what became of their calls, the training's last figures."""

    number: int
    credit: str
    reward: float | None
    rows: dict[str, int]
    version: int | None
    validation: float | None
    stopped: str | None
    steps: int
    seconds: float
    curve: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RlResult:
    """How the job ended. `verdict`: promote, shadow (registered, not proven) or reject."""

    job_id: str
    slot: str
    method: str
    verdict: str
    promoted: bool
    reason: str
    baseline: str
    version: int | None
    revision: int | None
    rounds: tuple[Round, ...]
    gate: Verdict | None
    rollouts: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {**asdict(self), "rounds": [asdict(one) for one in self.rounds]}


@dataclass(frozen=True)
class Stage:
    """Where the job stands: `done` of `total` rollouts or steps of this phase; `message` where there is news."""

    phase: str
    done: int
    total: int
    message: str = ""


OnProgress = Callable[[Stage], None]


async def run_rl(
    spec: RlSpec,
    client: Client,
    base_url: str,
    base: Path,
    *,
    settings: Settings | None = None,
    api_key: str | None = None,
    job_id: str | None = None,
    on_progress: OnProgress | None = None,
) -> RlResult:
    """Train to a verdict; with the `job_id` of an earlier run, resume it. `base` is the model's folder.

    Raises BadInput before anything is paid, JobCancelled, Unavailable where server or engine stay away.
    """
    check(spec)
    work = _Work(spec, client, base_url, base, settings or Settings(), api_key, job_id or new_job_id(), on_progress)
    with JobLock(work.data_dir, work.job.job_id):
        return await work.run()


class _Work:
    """One run of a job."""

    def __init__(
        self,
        spec: RlSpec,
        client: Client,
        base_url: str,
        base: Path,
        settings: Settings,
        api_key: str | None,
        job_id: str,
        on_progress: OnProgress | None,
    ) -> None:
        self.spec, self.client, self.settings, self.base = spec, client, settings, base
        self.base_name = base.resolve().name
        self.training, self.validation, self.held = spec.load()
        if spec.grader is not None:
            check_tasks(spec.grader, [*self.training, *self.validation, *self.held])
        self.data_dir = Path(settings.store.data_dir)
        self.folder = self.data_dir / "jobs" / job_id
        self.job = Job(client, job_id, "rl", spec.slot, spec.as_dict())
        self._say = on_progress or (lambda stage: None)
        self._phase, self._done, self._total, self._rollouts = "", 0, 0, 0
        self._base_url, self._api_key = base_url, api_key
        self.paid = Paid(self.folder / "rollouts.jsonl", client, spec.slot, job_id, self._settled)
        self._folders: dict[str, Path | None] = {self.base_name: None}

    async def run(self) -> RlResult:
        """All steps, with the job's state kept true however they end."""
        return await self.job.run(self._steps)

    async def _steps(self) -> RlResult:
        began = time.monotonic()
        baseline = await self._baseline()
        policies, rounds = [baseline], []
        policy = baseline
        for number in range(1, self.spec.rounds + 1):
            made, told = await self._round(number, policy, baseline)
            rounds.append(told)
            if made is None:
                break
            policies.append(made)
            policy = made
        best = max(policies, key=lambda one: (one.score or 0.0, one is baseline))
        if self.spec.tasks is None:
            best = policies[-1]
        gate = await self._gate(baseline, best) if best is not baseline and self.held else None
        verdict, reason = _verdict(baseline, best, gate, rounds)
        revision = None
        if verdict == "promote" and self.spec.promote != "never" and best.version is not None:
            revision = await self._promote(best.version, reason)
        return RlResult(
            job_id=self.job.job_id,
            slot=self.spec.slot,
            method=self.spec.method,
            verdict=verdict,
            promoted=revision is not None,
            reason=reason,
            baseline=baseline.name,
            version=best.version if best is not baseline else None,
            revision=revision,
            rounds=tuple(rounds),
            gate=gate,
            rollouts=self._rollouts,
            seconds=time.monotonic() - began,
        )

    async def _baseline(self) -> Policy:
        """What serves now: the slot's live version, else the base model; with its score on validation."""
        live = await patiently(self._live)
        await self._hold(live)
        return await self._validated(live, 0)

    def _live(self) -> Policy:
        slots = {one["slot"]: one for one in self.client.slots()}
        if self.spec.slot not in slots:
            return Policy(None, self.base_name, "base")
        versions = self.client.versions(self.spec.slot)
        for one in versions:
            self._folders[f"{self.spec.slot}@{one['version']}"] = self._adapters / str(one["path"])
        found = max(versions, key=lambda one: one["live"], default=None)
        if found is None or not found["live"]:
            return Policy(None, self.base_name, "base")
        return self._policy(int(found["version"]), str(found["hash"]))

    @property
    def _adapters(self) -> Path:
        return self.data_dir / "adapters"

    def _policy(self, version: int, content: str) -> Policy:
        name = f"{self.spec.slot}@{version}"
        return Policy(version, name, content, self._folders[name])

    async def _hold(self, policy: Policy) -> None:
        """Have the engines serve it, though no traffic goes there yet; their canary is part of it."""
        version = policy.version
        if version is not None and self.spec.command:
            await patiently(lambda: self.client.hold(self.spec.slot, version, HOLD_SECONDS))

    async def _round(self, number: int, policy: Policy, baseline: Policy) -> tuple[Policy | None, Round]:
        began = time.monotonic()
        gathered, tasks, reward = await self._collect(number, policy)
        name, rows, report = self._rows(gathered, tasks, policy)
        out = self._adapters / self.spec.slot / f"{self.job.job_id}-{number}"
        told = Round(number, name, reward, report.as_dict(), None, None, None, 0, 0.0)
        if not out.is_dir():
            made = await self._train(number, rows, out, policy, report)
            told = replace(told, rows=report.as_dict(), steps=made.steps, stopped=made.stopped)
            told = replace(told, curve=made.curves[-1] if made.curves else {})
            if made.directory is None:
                self._enter("train", 0, f"round {number} collapsed: {made.stopped}; its adapter is not used")
                return None, replace(told, seconds=time.monotonic() - began)
        fresh = await self._validated(await self._register(out, number, policy), number)
        told = replace(told, version=fresh.version, validation=fresh.score, seconds=time.monotonic() - began)
        if fresh.score is not None:
            was = "not known" if baseline.score is None else f"{baseline.score:.3f}"
            self._enter("validation", 0, f"{fresh.name}: {fresh.score:.3f} on validation (before: {was})")
        return fresh, told

    async def _collect(self, number: int, policy: Policy) -> tuple[Gathered, dict[str, str], float | None]:
        weights = self.settings.rewards.weights
        models = {self.base_name, self.spec.slot}
        if not self.spec.command or (self.spec.from_traces and number == 1):
            found = await asyncio.to_thread(gather, self.client, weights, models=models)
            return found, {}, _mean([one.reward for one in found.episodes])
        count = self.spec.samples * len(self.training)
        self._enter("collect", count, f"round {number}: {count} rollouts with {policy.name}")
        rollouts = await self.paid.run(
            self._runner(f"c{number}", explore=True),
            self._plans(self.training, policy, self.spec.samples),
            f"round {number}",
        )
        if not any(one.ok for one in rollouts):
            raise RatchetError(f"the agent is broken: every rollout failed; {rollouts[0].reason}: {rollouts[0].detail}")
        tasks = {one.episode_id: one.task_id for one in rollouts}
        found = await asyncio.to_thread(gather, self.client, weights, only=set(tasks), models=models)
        return found, tasks, sum(one.score for one in rollouts) / len(rollouts)

    def _rows(self, gathered: Gathered, tasks: dict[str, str], policy: Policy) -> tuple[str, list[Row], Report]:
        how = method(self.spec.method)
        weights = self.settings.rewards.weights
        name, credits = advantages(
            gathered, self.spec.method, self.spec.credit, tasks=tasks, weights=weights, roles=self.spec.roles
        )
        rules = Rules(logprobs=how.ratio, merge=how.merge, tokenise=None if how.ratio else self._tokenise)
        if how.ratio:
            rules = replace(rules, ages=self._ages(policy), max_age=self.spec.max_stale)
        rows, report = build(gathered.calls, credits, rules, gathered.rewards)
        if not rows:
            raise BadInput(
                f"no call can be learned from: {report.as_dict()}; engines that are to record token ids and logprobs "
                "need `train: true` in the config",
                param="rows",
            )
        return name, rows, report

    def _ages(self, policy: Policy) -> dict[str, int]:
        """How many versions behind the policy each known one is; later ones are as strange as earlier ones."""
        current = policy.version or 0
        numbers = {name: int(name.rpartition("@")[2]) if "@" in name else 0 for name in self._folders}
        return {name: abs(current - number) for name, number in numbers.items()}

    def _tokenise(self, call: Any) -> tuple[list[int], list[int]]:
        from optimize.rl.text_rows import tokenise

        return tokenise(self.base, call)

    async def _train(self, number: int, rows: Sequence[Row], out: Path, policy: Policy, report: Report) -> Any:
        from optimize.rl.train import TrainSpec, train

        self._enter("train", 0, f"round {number}: training on {len(rows)} rows ({self.spec.method})")
        spec = TrainSpec(
            method=self.spec.method,
            rank=self.spec.rank,
            alpha=2 * self.spec.rank,
            learning_rate=self.spec.learning_rate,
            epochs=self.spec.epochs,
            batch_size=self.spec.batch_size,
            beta=self.spec.beta,
            seed=self.spec.seed + number,
            checkpoint_steps=25,
        )
        stop: list[bool] = []
        so_far: dict[str, int] = {}

        def on_step(step: int, of: int, found: Any) -> None:
            if stop:
                raise JobCancelled(f"{self.job.job_id} was cancelled")
            so_far.update(step=step, steps=of)
            self._say(Stage("train", step, of))

        work = asyncio.to_thread(
            train,
            self.base,
            rows,
            spec,
            out,
            work=self.folder / f"training-{number}",
            parent=policy.folder,
            versions=dict(self._folders),
            report=report,
            job_id=self.job.job_id,
            on_step=on_step,
        )
        running = asyncio.ensure_future(work)
        try:
            while not running.done():
                await asyncio.wait({running}, timeout=2)
                await self.job.report(phase="train", round=number, **so_far)
            return running.result()
        except BaseException:
            stop.append(True)
            with contextlib.suppress(Exception):  # boundary: what ends the job is told, not how its thread ended
                await asyncio.shield(running)
            raise

    async def _register(self, out: Path, number: int, policy: Policy) -> Policy:
        manifest = read_manifest(out)
        body = {
            "kind": "adapter",
            "base_model": manifest.base_model,
            "path": str(out.relative_to(self._adapters)),
            "parent": policy.version,
            "job_id": self.job.job_id,
            "note": f"{self.spec.method}, round {number}",
            "metrics": {name: value for name, value in manifest.metrics.items() if value is not None},
        }
        added = await patiently(lambda: self.client.add_version(self.spec.slot, **body))
        self._folders[f"{self.spec.slot}@{added['version']}"] = out
        fresh = self._policy(int(added["version"]), str(added["hash"]))
        await self._hold(fresh)
        return fresh

    async def _validated(self, policy: Policy, number: int) -> Policy:
        if not self.validation:
            return policy
        self._enter("validation", len(self.validation), "")
        found = await self._judge(self.validation, policy, f"validation {number}")
        return replace(policy, score=sum(one.score for one in found) / len(found))

    async def _gate(self, baseline: Policy, best: Policy) -> Verdict:
        """Both policies once on every held-out task."""
        self._enter("gate", 2 * len(self.held), f"testing {best.name} on {len(self.held)} held-out tasks")
        before, after = await asyncio.gather(
            self._judge(self.held, baseline, "gate before"), self._judge(self.held, best, "gate after")
        )
        tried = await asyncio.to_thread(self._tried)
        return decide(
            [one.score for one in before],
            [one.score for one in after],
            alpha=self.settings.gate.alpha,
            candidates_tried=len(tried | {best.hash}),
            min_samples=self.settings.gate.min_samples,
            seed=self.spec.seed,
        )

    def _tried(self) -> set[str]:
        """Versions that any job held against one of the held-out tasks: each was a chance to be lucky."""
        tasks = {task.id for task in self.held}
        self.client.flush()
        events = [one for one in self.client.evaluations() if one["slot"] == self.spec.slot and one["task_id"] in tasks]
        return {one["version_hash"] for one in events if one["arm"] == "candidate"}

    async def _judge(self, tasks: Sequence[Task], policy: Policy, phase: str) -> list[Rollout]:
        runner = self._runner(phase.replace(" ", ""), explore=False)
        judged = policy.hash if phase.startswith("gate") else None
        return await self.paid.run(runner, self._plans(tasks, policy, 1), phase, judged=judged)

    def _plans(self, tasks: Sequence[Task], policy: Policy, count: int) -> list[Plan]:
        pin = None if policy.version is None else policy.name
        return [Plan(task, pin, replicate) for task in tasks for replicate in range(count)]

    def _runner(self, part: str, *, explore: bool) -> Runner:
        heat = {"OPENAI_TEMPERATURE": f"{self.spec.temperature:g}"} if explore else {}
        return Runner(
            self.spec.command,
            self.client,
            self._base_url,
            api_key=self._api_key,
            grade=None if self.spec.grader is None else grader(self.spec.grader, self.settings.optimizer),
            grade_source="llm" if (self.spec.grader or "").startswith("judge:") else "code",
            concurrency=self.spec.concurrency,
            timeout=self.spec.timeout,
            cwd=Path(self.spec.cwd),
            env={**os.environ, "OPENAI_MODEL": self.base_name, **heat},
            sandbox=self.spec.sandbox,
            run_id=f"{self.job.job_id[-5:]}{part[:3]}",
        )

    async def _promote(self, version: int, reason: str) -> int:
        share = CANARY_SHARE if self.spec.promote == "canary" else 1.0
        how: dict[str, Any] = {"evidence": "gate", "job_id": self.job.job_id, "note": reason}
        slots = {one["slot"]: one for one in await patiently(self.client.slots)}
        if share < 1 and not slots[self.spec.slot]["live"]:
            share = 1.0  # no version is live to take the rest: the base model alone would
        return await patiently(lambda: self.client.promote(self.spec.slot, version, share, **how))

    async def _settled(self, rollout: Rollout) -> None:
        self._rollouts += 1
        self._done += 1
        self._say(Stage(self._phase, self._done, self._total))
        await self.job.report(phase=self._phase, rollouts=self._done, total=self._total)

    def _enter(self, phase: str, total: int, message: str) -> None:
        self._phase, self._done, self._total = phase, 0, total
        self._say(Stage(phase, 0, total, message))


def _verdict(baseline: Policy, best: Policy, gate: Verdict | None, rounds: Sequence[Round]) -> tuple[str, str]:
    if best is baseline:
        stopped = next((one.stopped for one in rounds if one.stopped), None)
        why = f"; training collapsed: {stopped}" if stopped else ""
        return "reject", f"no version did better than {baseline.name} on validation{why}"
    if gate is None:
        return "shadow", f"{best.name} is registered; without tasks to test it on it gets no traffic by itself"
    return gate.decision, gate.reason


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
