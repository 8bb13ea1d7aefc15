"""Rollouts of a training job, each written down as it is settled, so that a resumed job pays none twice."""

import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from collector.client import Client
from collector.errors import Unavailable
from optimize.patience import patiently
from optimize.rollout import INFRASTRUCTURE, Plan, Rollout
from optimize.runner import Runner

TRIES = 3
ANSWER_CHARS = 4000


class Paid:
    """Runs plans that were not run before under the same `phase`; keeps all in one file of lines."""

    def __init__(
        self, path: Path, client: Client, slot: str, job_id: str, on_rollout: Callable[[Rollout], Awaitable[None]]
    ) -> None:
        self._path, self._client, self._slot, self._job = path, client, slot, job_id
        self._on_rollout = on_rollout
        self._known: dict[str, Rollout] = dict(_read(path))

    async def run(
        self, runner: Runner, plans: Sequence[Plan], phase: str, *, judged: str | None = None
    ) -> list[Rollout]:
        """One rollout a plan, in order. `judged`: the policy's hash where the rollouts are an evaluation (they are
        journalled, so that a later job knows what these tasks have seen). Raises Unavailable where the way to the
        model stays blocked.
        """
        left = [plan for plan in plans if _key(phase, plan) not in self._known]
        for _ in range(TRIES):
            if not left:
                break
            current = left

            async def settled(batch: list[tuple[int, Rollout]], current: list[Plan] = current) -> None:
                await self._keep([(current[at], rollout) for at, rollout in batch], phase, judged)

            await runner.run_all(current, settled)
            left = [plan for plan in plans if _key(phase, plan) not in self._known]
        if left:
            raise Unavailable("the agent's calls cannot reach the model: see that server and engine run, then resume")
        return [self._known[_key(phase, plan)] for plan in plans]

    async def _keep(self, batch: Sequence[tuple[Plan, Rollout]], phase: str, judged: str | None) -> None:
        done = [(plan, rollout) for plan, rollout in batch if rollout.reason not in INFRASTRUCTURE]
        if judged is not None and done:
            events = [self._event(plan, rollout, phase, judged) for plan, rollout in done]
            await patiently(lambda: self._client.events(events))
        with self._path.open("a") as file:
            for plan, rollout in done:
                key = _key(phase, plan)
                self._known[key] = rollout = replace(rollout, answer=rollout.answer[:ANSWER_CHARS])
                file.write(json.dumps({"key": key, **asdict(rollout)}) + "\n")
        for _, rollout in done:
            await self._on_rollout(rollout)

    def _event(self, plan: Plan, rollout: Rollout, phase: str, judged: str) -> dict[str, Any]:
        identity = hashlib.sha256(json.dumps([self._job, _key(phase, plan)]).encode()).hexdigest()[:24]
        same = ("task_id", "episode_id", "reward", "ok", "reason", "seconds", "input_tokens", "output_tokens", "calls")
        return {
            "event": "evaluation",
            "evaluation_id": f"ev-{identity}.{self._job}",
            "job_id": self._job,
            "slot": self._slot,
            "version_hash": judged,
            "replicate": plan.replicate,
            "arm": "baseline" if phase.endswith("before") else "candidate",
            "answer": rollout.answer[:ANSWER_CHARS],
            "ts_ns": time.time_ns(),
            **{name: getattr(rollout, name) for name in same},
        }


def _key(phase: str, plan: Plan) -> str:
    return f"{phase} {plan.task.id} {plan.replicate}"


def _read(path: Path) -> list[tuple[str, Rollout]]:
    """What was kept; a last line that was cut off is not."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    names = {one.name for one in fields(Rollout)}
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        found.append((entry["key"], Rollout(**{name: value for name, value in entry.items() if name in names})))
    return found
