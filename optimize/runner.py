"""Runs an unmodified agent once per task: each task its own process and its own episode, rewards settled in batches."""

import asyncio
import contextlib
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from collector.client import Client
from collector.errors import NotFound
from optimize.dataset import Task
from optimize.grade import GradeError, Grader
from optimize.patience import patiently
from optimize.process import Finished, run_process
from optimize.rollout import Plan, Rollout, Settled, as_they_end
from optimize.sandbox import Room, bare

DETAIL_CHARS = 2000
# Linux refuses a longer string in an environment (128 KiB with its name); such a task comes on stdin alone.
TASK_BYTES_IN_ENVIRONMENT = 100_000
# Newest episodes of all runs; a constant, so that no query is made of text. What it misses is asked for one by one.
RECENT = """
select episode_id, steps, input_tokens, output_tokens, cost_usd, errors, reward from episodes_v
where episode_id like 'run-%' order by start_ns desc
"""


@dataclass(frozen=True)
class _Attempt:
    """A run of the process, not yet settled with the store."""

    plan: Plan
    episode_id: str
    reason: str | None
    detail: str
    answer: str
    seconds: float


class Runner:
    """Runs `command` per task against the proxy at `base_url`.

    `api_key` is what the agent sends as OPENAI_API_KEY (its own upstream key, or a Ratchet key where the server wants
    one). `grade` judges what the agent itself sent no reward for. `timeout` is in seconds, per rollout.
    """

    def __init__(
        self,
        command: Sequence[str],
        client: Client,
        base_url: str,
        *,
        api_key: str | None = None,
        grade: Grader | None = None,
        grade_source: str = "code",
        concurrency: int = 4,
        timeout: float = 120.0,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        sandbox: bool = False,
        run_id: str | None = None,
    ) -> None:
        self.command = list(command)
        self.client = client
        self.base_url = base_url.rstrip("/")
        self._api_key = api_key
        self._grade = grade
        self._grade_source = grade_source
        self._free = asyncio.Semaphore(concurrency)
        self._timeout = timeout
        self._cwd = cwd
        self._env = dict(os.environ if env is None else env)
        self._sandbox = sandbox
        self._run_id = re.sub(r"[^A-Za-z0-9]", "", run_id or secrets.token_hex(4))[-8:]

    async def run(self, task: Task, *, pin: str | None = None, episode_id: str | None = None) -> Rollout:
        """One rollout. Never raises for an agent's failure; raises Unavailable where the collector stays away."""
        return (await self.run_all([Plan(task, pin, episode_id=episode_id)]))[0]

    async def run_all(self, plans: Sequence[Plan], on_settled: Settled | None = None) -> list[Rollout]:
        """See Rollouts. While one batch waits for the store, the next agents run."""
        return await as_they_end([self._attempt(plan) for plan in plans], self._settle, on_settled)

    async def _attempt(self, plan: Plan) -> _Attempt:
        async with self._free:
            episode = plan.episode_id or self._new_episode(plan)
            began = time.monotonic()
            try:
                finished = await self._process(plan, episode)
            except OSError as error:
                return _Attempt(plan, episode, "crash", f"cannot start {self.command[0]}: {error}", "", 0.0)
            seconds = time.monotonic() - began
            reason, detail = self._judge_end(finished)
            if reason == "crash" and not await self._proxy_answers():
                reason = "proxy_unreachable"
            return _Attempt(plan, episode, reason, detail, finished.stdout.rstrip("\r\n"), seconds)

    async def _process(self, plan: Plan, episode: str) -> Finished:
        env = self._environment(plan, episode)
        with contextlib.ExitStack() as stack:
            command, cwd = self.command, self._cwd
            if self._sandbox:
                room = stack.enter_context(Room())
                command, env, cwd = room.dress(command, self._cwd or Path.cwd()), room.environment(env), room.path
            return await run_process(command, stdin=plan.task.json + "\n", env=env, cwd=cwd, seconds=self._timeout)

    def _new_episode(self, plan: Plan) -> str:
        return f"run-{self._run_id}-{task_part(plan.task.id)}-{plan.replicate}-{secrets.token_hex(4)}"

    def _environment(self, plan: Plan, episode: str) -> dict[str, str]:
        scope = f"/e/{episode}/with/{plan.pin}/v1" if plan.pin else f"/e/{episode}/v1"
        env = bare(self._env) if self._sandbox else dict(self._env)
        key = self._api_key or self._env.get("OPENAI_API_KEY") or "ratchet"  # clients refuse to start without a key
        host = urlsplit(self.base_url).hostname or ""
        no_proxy = ",".join(filter(None, [env.get("NO_PROXY") or env.get("no_proxy"), host]))
        if len(plan.task.json.encode()) <= TASK_BYTES_IN_ENVIRONMENT:
            env["RATCHET_TASK"] = plan.task.json
        return {
            **env,
            "OPENAI_BASE_URL": self.base_url + scope,
            "OPENAI_API_BASE": self.base_url + scope,  # the name that older clients read
            "OPENAI_API_KEY": key,
            "RATCHET_URL": self.base_url,
            "RATCHET_EPISODE": episode,
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }

    def _judge_end(self, finished: Finished) -> tuple[str | None, str]:
        if finished.timed_out:
            return "timeout", f"ended after {self._timeout:g} s; {tail(finished.stderr)}".rstrip("; ")
        if finished.returncode != 0:
            return "crash", f"exit code {finished.returncode}: {tail(finished.stderr)}".rstrip(": ")
        return None, ""

    async def _proxy_answers(self) -> bool:
        parts = urlsplit(self.base_url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            async with asyncio.timeout(2):
                _, writer = await asyncio.open_connection(parts.hostname, port)
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    async def _settle(self, attempts: Sequence[_Attempt]) -> list[Rollout]:
        """Join what the store knows with what the grader says, and post the grader's rewards."""
        known = await patiently(lambda: self._look_up([attempt.episode_id for attempt in attempts]))
        rollouts = await asyncio.gather(
            *(self._finish(attempt, known.get(attempt.episode_id, {})) for attempt in attempts)
        )
        graded: list[Mapping[str, Any]] = [
            self._reward_body(rollout.episode_id, rollout.reward)
            for rollout in rollouts
            if rollout.ok and known.get(rollout.episode_id, {}).get("reward") is None and rollout.reward is not None
        ]
        if graded:
            await patiently(lambda: self.client.reward(graded))
        return rollouts

    async def _finish(self, attempt: _Attempt, known: Mapping[str, Any]) -> Rollout:
        reward, reason, detail = known.get("reward"), attempt.reason, attempt.detail
        if reason is None and reward is None:
            reward, reason, detail = await self._graded(attempt)
        return Rollout(
            task_id=attempt.plan.task.id,
            episode_id=attempt.episode_id,
            reward=reward,
            ok=reason is None,
            reason=reason,
            answer=attempt.answer,
            seconds=round(attempt.seconds, 3),
            calls=known.get("steps"),
            input_tokens=known.get("input_tokens"),
            output_tokens=known.get("output_tokens"),
            detail=detail,
            cost_usd=known.get("cost_usd"),
            upstream=reason == "crash"
            and bool(known.get("errors"))
            and await self._upstream_failed(attempt.episode_id),
        )

    async def _upstream_failed(self, episode: str) -> bool:
        """Whether the episode's last call failed for want of the model: no answer, too many calls, a server error."""
        spans = (await patiently(lambda: self.client.spans(1, episode_id=episode)))["spans"]
        status = spans[0]["http_status"] if spans else None
        return bool(spans) and spans[0]["status"] == "error" and (status is None or status == 429 or status >= 500)

    async def _graded(self, attempt: _Attempt) -> tuple[float | None, str | None, str]:
        if self._grade is None:
            return None, "no_reward", "the agent sent no reward and no grader was given"
        try:
            reward = await asyncio.to_thread(self._grade, attempt.plan.task, attempt.answer)
        except GradeError as error:
            return None, "grader", error.message
        if reward is None:
            return None, "no_reward", "the agent sent no reward and the grader gave none"
        return reward, None, ""

    def _reward_body(self, episode: str, value: float) -> dict[str, Any]:
        key = f"{episode}:reward"
        return {"episode_id": episode, "value": value, "source": self._grade_source, "idempotency_key": key}

    def _look_up(self, episodes: Sequence[str]) -> dict[str, dict[str, Any]]:
        """{episode: {"steps", "input_tokens", "output_tokens", "reward"}} of those that the store knows."""
        self.client.flush()
        found = self.client.query(RECENT, limit=len(episodes) * 4 + 100)
        rows = [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
        known = {row["episode_id"]: row for row in rows if row["episode_id"] in set(episodes)}
        for episode in episodes:
            if episode not in known:
                with contextlib.suppress(NotFound):  # no call and no reward
                    known[episode] = _summary(self.client.episode(episode))
        return known


def _summary(episode: Mapping[str, Any]) -> dict[str, Any]:
    steps = episode["steps"]
    totals = {
        name: sum(counts) if (counts := [step[name] for step in steps if step[name] is not None]) else None
        for name in ("input_tokens", "output_tokens")
    }
    return {"steps": len(steps), **totals, "reward": episode.get("reward")}


def task_part(task_id: str) -> str:
    """What of a task's id is in the ids of its episodes."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", task_id)[:64]


def tail(text: str) -> str:
    """The end of a stream, for people."""
    return text.strip()[-DETAIL_CHARS:]
