"""The evaluator behind every search: rollouts of candidate prompts, journalled as they settle; nothing is paid twice.

Who makes the rollouts is a `Rollouts`: the user's command with the candidate pinned in its URL (`runner.py`), logged
requests sent again (`resend.py`), or a function of this process (`function.py`).
"""

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from collector.client import Client
from collector.errors import Unavailable
from optimize.budget import Budget
from optimize.dataset import Task
from optimize.evaluation import Outcome, Request
from optimize.joint import divide
from optimize.patience import patiently
from optimize.rollout import INFRASTRUCTURE, Plan, Rollout, Rollouts

TRIES = 3  # of a rollout that failed for want of infrastructure, and of no other
ANSWER_CHARS = 4000  # of an answer, as journalled and as an engine sees it: the same before and after a resume
SOURCE_BYTES = 1 << 20  # a named file up to this size is part of the command's identity


def context_hash(command: Sequence[str], grader: str | None, model: str | None, cwd: Path, adapters: str = "") -> str:
    """What, beside prompt and task, decides a reward: the command, the files that it names, the grader, the model, the
    adapters in force.

    An agent that was edited is another agent: its old rollouts are not reused.
    """
    known = [list(command), grader, model, adapters] if adapters else [list(command), grader, model]
    digest = hashlib.sha256(json.dumps(known).encode())
    named = list(command)
    if grader is not None and grader.startswith("python:"):
        named.append(grader.removeprefix("python:").rpartition(".")[0].replace(".", "/") + ".py")
    for part in named:
        path = cwd / part
        if path.is_file() and path.stat().st_size <= SOURCE_BYTES:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def version_hash(template: str) -> str:
    """First 12 hex digits of the sha256 of a prompt's text."""
    return hashlib.sha256(template.encode()).hexdigest()[:12]


class JournalledEvaluator:
    """Rollouts under candidate prompts of `slot`; each paid one is journalled as it is settled.

    Rollouts of an earlier job with the same prompt, task, replicate and `context` are reused if they succeeded, those
    of this very job whatever they gave. `budget`, where given, is reserved before anything is started.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        client: Client,
        slot: str,
        *,
        job_id: str,
        context: str,
        model: str | None = None,
        budget: Budget | None = None,
        on_rollout: Callable[[Request, Rollout], None] | None = None,
    ) -> None:
        self._rollouts = rollouts
        self._client = client
        self._slot = slot
        self._job = job_id
        self._context = context
        self._model = model
        self._budget = budget
        self._on_rollout = on_rollout
        self._candidates: dict[str, str] = {}
        self._paid: dict[str, dict[str, Any]] | None = None
        self.rollouts = 0  # paid by this object
        self.calls = 0  # model calls that they made, as far as the store knows

    async def evaluate(self, requests: Sequence[Request]) -> list[Outcome]:
        """One outcome a request, in order. Raises Unavailable where proxy or collector stay away."""
        paid = await self._known()
        outcomes: dict[int, Outcome] = {}
        new: list[int] = []
        for index, request in enumerate(requests):
            event = paid.get(self._key(request))
            if event is None:
                new.append(index)
            else:
                outcomes[index] = _remembered(request, event)
        granted = len(new) if self._budget is None else self._budget.reserve(len(new))
        for index in new[granted:]:
            outcomes[index] = Outcome(requests[index], 0.0, ok=False, reason="budget")
        fresh = await self._pay([requests[index] for index in new[:granted]])
        outcomes.update(zip(new, fresh, strict=False))
        return [outcomes[index] for index in range(len(requests))]

    async def evaluations(self) -> list[dict[str, Any]]:
        """The journalled rollouts of this very job."""
        paid = await self._known()
        return [event for event in paid.values() if event["job_id"] == self._job]

    async def tried_on(self, tasks: Collection[str]) -> set[str]:
        """Hashes of the candidates that any job held against one of these tasks: each was a chance to be lucky."""
        paid = await self._known()
        held = (event for event in paid.values() if event["arm"] == "candidate" and event["task_id"] in tasks)
        return {event["version_hash"] for event in held}

    async def _pay(self, requests: Sequence[Request]) -> list[Outcome]:
        rollouts: dict[int, Rollout] = {}
        left = list(range(len(requests)))
        for tries in range(1, TRIES + 1):
            if not left:
                break
            await self._run(requests, left, rollouts, last=tries == TRIES)
            left = [index for index in left if _again(rollouts[index], last=tries == TRIES)]
        if left:
            raise Unavailable(
                f"nobody answers at {self._rollouts.base_url}: start `ratchet serve`, then resume the job"
            )
        return [_outcome(request, rollouts[index]) for index, request in enumerate(requests)]

    async def _run(
        self, requests: Sequence[Request], indices: list[int], rollouts: dict[int, Rollout], *, last: bool
    ) -> None:
        asked = [requests[at] for at in indices]
        plans = [Plan(one.task, await self._pin(one.template), one.replicate, template=one.template) for one in asked]

        async def settled(batch: list[tuple[int, Rollout]]) -> None:
            await self._journal([(asked[at], rollout) for at, rollout in batch if not _again(rollout, last=last)])

        for at, rollout in zip(indices, await self._rollouts.run_all(plans, settled), strict=True):
            rollouts[at] = rollout

    async def _journal(self, done: Sequence[tuple[Request, Rollout]]) -> None:
        """On disk before anybody learns of it, so that a resumed job finds it."""
        if not done:
            return
        events = [self._event(request, rollout) for request, rollout in done]
        await patiently(lambda: self._client.events(events))
        paid = await self._known()
        for (request, rollout), event in zip(done, events, strict=True):
            paid[self._key(request)] = event
            self.rollouts += 1
            self.calls += rollout.calls or 0
            if self._on_rollout is not None:
                self._on_rollout(request, rollout)

    async def _pin(self, template: str) -> str:
        """The pins of a prompt, or of the several that a joint one is made of."""
        if template not in self._candidates:
            pins = [
                f"{slot}@{await patiently(partial(self._client.add_candidate, slot, text))}"
                for slot, text in divide(template, self._slot).items()
            ]
            self._candidates[template] = ",".join(pins)
        return self._candidates[template]

    async def _known(self) -> dict[str, dict[str, Any]]:
        """What was paid before, by key."""
        if self._paid is None:
            events = await patiently(self._load)
            self._paid = {}
            for event in events:
                if event["slot"] == self._slot and (event["ok"] or event["job_id"] == self._job):
                    self._paid[event["evaluation_id"].partition(".")[0]] = event
        return self._paid

    def _load(self) -> list[dict[str, Any]]:
        self._client.flush()
        return self._client.evaluations()

    def _key(self, request: Request) -> str:
        """The identity of a paid rollout, the same in every job."""
        task = json.dumps(request.task.data, sort_keys=True)
        parts = [self._slot, version_hash(request.template), request.task.id, task, request.replicate, self._context]
        return "ev-" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def _event(self, request: Request, rollout: Rollout) -> dict[str, Any]:
        return {
            "event": "evaluation",
            "evaluation_id": f"{self._key(request)}.{self._job}",
            "job_id": self._job,
            "slot": self._slot,
            "version_hash": version_hash(request.template),
            "task_id": request.task.id,
            "replicate": request.replicate,
            "arm": request.arm,
            "subset": json.dumps(list(request.subset)) if request.subset else None,
            "episode_id": rollout.episode_id,
            "reward": rollout.reward,
            "ok": rollout.ok,
            "reason": rollout.reason,
            "answer": rollout.answer[:ANSWER_CHARS],
            "seconds": rollout.seconds,
            "input_tokens": rollout.input_tokens,
            "output_tokens": rollout.output_tokens,
            "calls": rollout.calls,
            "cost_usd": rollout.cost_usd,
            "model": self._model,
            "ts_ns": time.time_ns(),
        }


def _again(rollout: Rollout, *, last: bool) -> bool:
    """Whether to try once more. A proxy that stays away is never a prompt's failure; an upstream's error is at last."""
    if rollout.reason == "proxy_unreachable":
        return True
    return not last and not rollout.ok and (rollout.upstream or rollout.reason in INFRASTRUCTURE)


def feedback(task: Task, reason: str | None, detail: str = "") -> str:
    """What a critic may read of a rollout, in words."""
    if reason is not None:
        return f"the rollout failed: {reason}" + (f": {detail[-500:]}" if detail else "")
    return "" if task.expected is None else f"expected: {json.dumps(task.expected, ensure_ascii=False)}"


def tokens(counts: Iterable[int | None]) -> int | None:
    """The sum, None where nothing is known."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _outcome(request: Request, rollout: Rollout) -> Outcome:
    return Outcome(
        request,
        rollout.score,
        ok=rollout.ok,
        reason=rollout.reason,
        answer=rollout.answer[:ANSWER_CHARS],
        feedback=feedback(request.task, rollout.reason, rollout.detail),
        tokens=tokens([rollout.input_tokens, rollout.output_tokens]),
        seconds=rollout.seconds,
        cost_usd=rollout.cost_usd,
    )


def _remembered(request: Request, event: dict[str, Any]) -> Outcome:
    return Outcome(
        request,
        float(event["reward"]) if event["ok"] and event["reward"] is not None else 0.0,
        ok=bool(event["ok"]),
        reason=event["reason"],
        answer=event["answer"] or "",
        feedback=feedback(request.task, event["reason"]),
        tokens=tokens([event["input_tokens"], event["output_tokens"]]),
        seconds=float(event["seconds"] or 0.0),
        cached=True,
        cost_usd=event.get("cost_usd"),
    )
