"""Replay: a logged request sent again through the proxy, with the candidate pinned in its URL, and graded."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from collector.client import Client
from collector.errors import BadInput
from optimize.grade import GradeError, Grader
from optimize.logged import LoggedTask, answer_of
from optimize.patience import patiently
from optimize.rollout import Plan, Rollout, Settled, as_they_end, settled_already
from optimize.runner import task_part

DETAIL_CHARS = 500


class Resend:
    """Sends logged requests again. What was not recorded of them (a response format, stop words) is not sent.

    `api_key` is what the upstream, or the server where it wants keys, is given. `timeout` is in seconds, per request.
    `priced`: ask the store what each call cost.
    """

    def __init__(
        self,
        client: Client,
        base_url: str,
        slot: str,
        grade: Grader,
        *,
        api_key: str | None = None,
        grade_source: str = "code",
        concurrency: int = 4,
        timeout: float = 120.0,
        run_id: str | None = None,
        priced: bool = False,
    ) -> None:
        self.client = client
        self._base_url = base_url.rstrip("/")
        self._slot = slot
        self._grade = grade
        self._api_key = api_key
        self._source = grade_source
        self._free = asyncio.Semaphore(concurrency)
        self._timeout = timeout
        self._run_id = (run_id or secrets.token_hex(4)).replace("-", "")[-8:]
        self._priced = priced

    @property
    def base_url(self) -> str:
        """The proxy."""
        return self._base_url

    async def run_all(self, plans: Sequence[Plan], on_settled: Settled | None = None) -> list[Rollout]:
        """See Rollouts."""
        import httpx

        async with httpx.AsyncClient(timeout=self._timeout, trust_env=False) as http:
            return await as_they_end([self._one(http, plan) for plan in plans], settled_already, on_settled)

    async def _one(self, http: Any, plan: Plan) -> Rollout:
        if not isinstance(plan.task, LoggedTask):
            raise BadInput(f"the task {plan.task.id} is no logged call", param="tasks")
        async with self._free:
            episode = f"run-{self._run_id}-{task_part(plan.task.id)}-{plan.replicate}-{secrets.token_hex(4)}"
            began = time.monotonic()
            reply, reason, detail = await self._send(http, plan, plan.task, episode)
            seconds = round(time.monotonic() - began, 3)
        answer = "" if reply is None else _answer(reply)
        reward: float | None = None
        if reason is None:
            reward, reason, detail = await self._graded(plan.task, answer)
        usage = (reply or {}).get("usage") or {}
        if reward is not None:
            body = {"episode_id": episode, "value": reward, "source": self._source}
            await patiently(lambda: self.client.reward({**body, "idempotency_key": f"{episode}:reward"}))
        return Rollout(
            task_id=plan.task.id,
            episode_id=episode,
            reward=reward,
            ok=reason is None,
            reason=reason,
            answer=answer,
            seconds=seconds,
            calls=None if reply is None else 1,
            input_tokens=usage.get("prompt_tokens"),
            output_tokens=usage.get("completion_tokens"),
            detail=detail,
            cost_usd=await patiently(lambda: self._cost(episode)) if self._priced else None,
        )

    async def _send(
        self, http: Any, plan: Plan, task: LoggedTask, episode: str
    ) -> tuple[dict[str, Any] | None, str | None, str]:
        """`(reply, reason, detail)`: a reason is why there is no usable reply."""
        import httpx

        scope = f"/e/{episode}/with/{plan.pin}" if plan.pin else f"/e/{episode}"
        headers = {"x-ratchet-slot": self._slot}
        if self._api_key:
            headers["authorization"] = f"Bearer {self._api_key}"
        url = f"{self._base_url}{scope}/v1/chat/completions"
        try:
            async with asyncio.timeout(self._timeout):
                answer = await http.post(url, json=task.request, headers=headers)
        except (TimeoutError, httpx.TimeoutException):
            return None, "timeout", f"no answer within {self._timeout:g} s"
        except httpx.TransportError as error:
            return None, "proxy_unreachable", str(error)
        if answer.status_code == 429 or answer.status_code >= 500:
            return None, "upstream", f"{answer.status_code}: {answer.text[:DETAIL_CHARS]}"
        if not answer.is_success:
            return None, "crash", f"{answer.status_code}: {answer.text[:DETAIL_CHARS]}"
        if plan.pin and plan.pin not in answer.headers.get("x-ratchet-versions", "").split(","):
            return None, "not_injected", f"the request has no prompt of the slot {self._slot} that could be replaced"
        with contextlib.suppress(ValueError):
            reply = answer.json()
            if isinstance(reply, dict) and reply.get("choices"):
                return reply, None, ""
        return None, "upstream", f"no chat completion: {answer.text[:DETAIL_CHARS]}"

    async def _graded(self, task: LoggedTask, answer: str) -> tuple[float | None, str | None, str]:
        try:
            reward = await asyncio.to_thread(self._grade, task, answer)
        except GradeError as error:
            return None, "grader", error.message
        return (reward, None, "") if reward is not None else (None, "no_reward", "the grader gave no reward")

    def _cost(self, episode: str) -> float | None:
        self.client.flush()
        spans = self.client.spans(1, episode_id=episode)["spans"]
        return spans[0].get("cost_usd") if spans else None


def _answer(reply: dict[str, Any]) -> str:
    message = reply["choices"][0].get("message") or {}
    return answer_of(message) if isinstance(message, dict) else json.dumps(message)
