"""Spans of what happens in this process instead of behind the proxy: rollouts of functions, calls of the optimizer."""

import asyncio
import json
import secrets
import time
from pathlib import Path
from typing import Any

from collector import redact
from collector.client import Client, Local
from collector.journal import FOLDER, Journal
from collector.model import Exchange
from optimize.rollout import Plan, Rollout


class SpanWriter:
    """Writes spans into the journal of `data_dir`: through the open store, or beside the server that has it open."""

    def __init__(self, client: Client, data_dir: Path, *, emails: bool = False) -> None:
        self._own = None if isinstance(client, Local) else Journal(data_dir / FOLDER, "optimize")
        self._journal = client.collector.journal if isinstance(client, Local) else self._own
        self._emails = emails

    def close(self) -> None:
        """Seal what this object opened."""
        if self._own is not None:
            self._own.close()

    async def rollout(self, slot: str, plan: Plan, rollout: Rollout, start_ns: int) -> None:
        """One rollout of a function: the prompt it was given, the task, and how it ended."""
        await self._write(
            span_id=secrets.token_hex(8),
            trace_id=secrets.token_hex(16),
            episode_id=rollout.episode_id,
            episode_source="function",
            start_ns=start_ns,
            end_ns=time.time_ns(),
            operation="invoke_agent",
            route="",
            status="ok" if rollout.ok else "error",
            source="optimize",
            error_type=rollout.reason,
            prompt_slot=slot,
            prompt_candidate=None if plan.pin is None else plan.pin.rpartition("@")[2],
            propensity=1.0,
            input_messages=_messages(
                {"role": "system", "content": plan.template or ""}, {"role": "user", "content": plan.task.json}
            ),
            attributes=json.dumps({"detail": rollout.detail}) if rollout.detail else None,
        )

    async def call(self, episode: str, model: str, messages: list[dict[str, str]], start_ns: int, **ended: Any) -> None:
        """One call of the optimizer's model; `ended` are the columns that its end filled in."""
        await self._write(
            span_id=secrets.token_hex(8),
            trace_id=secrets.token_hex(16),
            episode_id=episode,
            episode_source="job",
            start_ns=start_ns,
            end_ns=time.time_ns(),
            operation="chat",
            route="chat/completions",
            source="optimize",
            request_model=model,
            input_messages=_messages(*messages),
            **ended,
        )

    async def _write(self, **fields: Any) -> None:
        journal = self._journal
        if journal is not None:
            span = redact.exchange(Exchange(**fields), self._emails)
            await asyncio.wrap_future(journal.append_durable("span", span))


def _messages(*messages: dict[str, str]) -> str:
    return json.dumps(list(messages), ensure_ascii=False)
