"""A promotion under load: no failed call, the new version within a second, and no episode that mixes versions."""

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from tests.fake_upstream import FakeUpstream, Received, Reply, chat
from tests.faults import processes
from tests.patience import within
from tests.served import Served, served

OLD, NEW = "You are a geography helper.", "You are a geography helper. Output ONLY the city."
BEFORE, AFTER = 0.7, 1.6  # seconds of load


@dataclass(frozen=True)
class Answer:
    """One answered call: when it was sent, in which episode, under which version, and the prompt the upstream saw."""

    sent: float
    episode: str
    versions: str
    seen: str
    status: int


@dataclass
class Traffic:
    answers: list[Answer] = field(default_factory=list)
    over: bool = False

    async def new_episodes(self, session: aiohttp.ClientSession, url: str, name: str) -> None:
        number = 0
        while not self.over:
            number += 1
            await self._call(session, url, f"{name}-{number}")

    async def one_episode(self, session: aiohttp.ClientSession, url: str, name: str) -> None:
        while not self.over:
            await self._call(session, url, name)

    async def _call(self, session: aiohttp.ClientSession, url: str, episode: str) -> None:
        messages = [{"role": "system", "content": OLD}, {"role": "user", "content": "Capital of France?"}]
        sent = time.monotonic()
        body = {"model": "fake-model", "messages": messages}
        async with session.post(f"{url}/e/{episode}/v1/chat/completions", json=body) as response:
            answer = await response.json()
            seen = answer["choices"][0]["message"]["content"] if response.status == 200 else str(answer)
            self.answers.append(Answer(sent, episode, response.headers["x-ratchet-versions"], seen, response.status))
        await asyncio.sleep(0.002)


def echo_prompt(request: Received) -> Reply:
    return chat(request.json["messages"][0]["content"])


@asynccontextmanager
async def traffic(url: str) -> AsyncIterator[Traffic]:
    running = Traffic()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        tasks = [asyncio.create_task(running.new_episodes(session, url, f"new-{i}")) for i in range(6)]
        tasks += [asyncio.create_task(running.one_episode(session, url, f"long-{i}")) for i in range(4)]
        yield running
        running.over = True
        await asyncio.gather(*tasks)


async def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        assert response.status < 300, await response.text()
        answer: dict[str, Any] = await response.json()
        return answer


async def known_everywhere(server: Served) -> None:
    """Wait until every worker knows the slot."""

    def known() -> None:
        processes.until(lambda: httpx.get(f"{server.url}/readyz").status_code == 200, 60, "a worker knows the slot")

    await asyncio.to_thread(processes.on_each_worker, server.process.pid, known)


async def promote_under_load(server: Served) -> tuple[list[Answer], float]:
    """The answers, and the moment at which the promotion was acknowledged."""
    slot = f"{server.url}/api/slots/capital"
    for text in (OLD, NEW):
        await post(f"{slot}/versions", {"kind": "prompt", "template": text})
    await known_everywhere(server)
    async with traffic(server.url) as running:
        await asyncio.sleep(BEFORE)
        await post(f"{slot}/promote", {"version": 2})
        promoted = time.monotonic()
        await asyncio.sleep(AFTER)
    return running.answers, promoted


@pytest.mark.parametrize("workers", [1, 2])
def test_a_promotion_reaches_new_episodes_within_a_second(tmp_path: Path, workers: int) -> None:
    with (
        FakeUpstream(echo_prompt) as upstream,
        served(tmp_path / "data", upstream.url, "--workers", str(workers)) as server,
    ):
        answers, promoted = asyncio.run(promote_under_load(server))
        assert {answer.status for answer in answers} == {200}
        assert {(answer.versions, answer.seen) for answer in answers} == {("capital@1", OLD), ("capital@2", NEW)}

        by_episode: dict[str, set[str]] = defaultdict(set)
        for answer in answers:
            by_episode[answer.episode].add(answer.versions)
        assert all(len(versions) == 1 for versions in by_episode.values())
        assert {v for episode, vs in by_episode.items() if episode.startswith("long") for v in vs} == {"capital@1"}

        fresh = [answer for answer in answers if answer.episode.startswith("new")]
        first = min(answer.sent for answer in fresh if answer.versions == "capital@2") - promoted
        last_old = max(answer.sent for answer in fresh if answer.versions == "capital@1") - promoted
        print(
            f"\n{workers} worker(s), {len(answers)} calls: first episode with the new version {first * 1000:+.0f} ms, "
            f"last one with the old {last_old * 1000:+.0f} ms after the promotion was acknowledged"
        )
        assert first < within(1.0)
        assert last_old < within(1.0)
        server.client.flush()
        rows = server.client.query("SELECT prompt_version, input_messages FROM spans_v", limit=100_000)["rows"]
        assert len(rows) == len(answers)
        assert {(version, json.loads(text)[0]["content"]) for version, text in rows} == {(1, OLD), (2, NEW)}
