"""Many swaps under many streams: no failed call, and no episode, nor any stream, that mixes versions.

RATCHET_SWAPS and RATCHET_STREAMS set the size; `make faults` runs a thousand swaps under fifty streams.
"""

import asyncio
import json
import os
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from tests.fake_upstream import FakeUpstream, Received, Reply, chunk, sse_reply
from tests.faults.test_hot_swap import known_everywhere
from tests.served import Served, served

SWAPS = int(os.environ.get("RATCHET_SWAPS", "20"))
STREAMS = int(os.environ.get("RATCHET_STREAMS", "8"))
CALLS = 3  # of an episode
TEXTS = {1: "You are a geography helper.", 2: "Output ONLY the city.", 3: "One word."}


def echo(request: Received) -> Reply:
    """Streams back the prompt it was sent, a word at a time."""
    words = request.json["messages"][0]["content"].split()
    parts: list[bytes | float] = [chunk({"role": "assistant", "content": ""})]
    for word in words:
        parts += [0.005, chunk({"content": f"{word} "})]
    return sse_reply([*parts, chunk({}, "stop"), b"data: [DONE]\n\n"])


@dataclass
class Traffic:
    """What the streams saw: for each episode its answers, as (versions told, prompt seen)."""

    answers: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    failed: list[str] = field(default_factory=list)
    told: Counter[str] = field(default_factory=Counter)
    over: bool = False

    async def agent(self, session: aiohttp.ClientSession, url: str, name: str) -> None:
        """One episode of some calls after the other."""
        number = 0
        while not self.over:
            number += 1
            for _ in range(CALLS):
                await self._call(session, url, f"{name}-{number}")

    async def _call(self, session: aiohttp.ClientSession, url: str, episode: str) -> None:
        messages = [{"role": "system", "content": TEXTS[1]}, {"role": "user", "content": "Capital of France?"}]
        body = {"model": "m", "stream": True, "messages": messages}
        try:
            async with session.post(f"{url}/e/{episode}/v1/chat/completions", json=body) as response:
                text = (await response.read()).decode()
                told = response.headers["x-ratchet-versions"]
        except aiohttp.ClientError as error:
            self.failed.append(repr(error))
            return
        if response.status != 200 or not text.endswith("data: [DONE]\n\n"):
            self.failed.append(text)
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        seen = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
        self.answers[episode].append((told, seen.strip()))
        self.told[told] += 1


async def drill(server: Served) -> tuple[Traffic, float]:
    """Swaps to one of the versions, each when somebody was served the one before, and the seconds it took."""
    api = f"{server.url}/api/slots/capital"
    traffic = Traffic()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for text in TEXTS.values():
            async with session.post(f"{api}/versions", json={"kind": "prompt", "template": text}) as response:
                assert response.status == 201
        await known_everywhere(server)
        agents = [asyncio.create_task(traffic.agent(session, server.url, f"a{n}")) for n in range(STREAMS)]
        began = time.monotonic()
        for swap in range(SWAPS):
            version = f"capital@{swap % 3 + 1}"
            before = traffic.told[version]
            async with session.post(f"{api}/promote", json={"version": swap % 3 + 1}) as response:
                assert response.status == 200, await response.text()
            async with asyncio.timeout(20):
                while traffic.told[version] == before:
                    await asyncio.sleep(0.002)
        seconds = time.monotonic() - began
        traffic.over = True
        await asyncio.gather(*agents)
    return traffic, seconds


@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [1, 2])
def test_swaps_under_streams_fail_nothing_and_mix_nothing(tmp_path: Path, workers: int) -> None:
    with (
        FakeUpstream(echo) as upstream,
        served(tmp_path / "data", upstream.url, "--workers", str(workers)) as server,
    ):
        traffic, seconds = asyncio.run(drill(server))
        assert traffic.failed == []
        calls = sum(map(len, traffic.answers.values()))
        for answers in traffic.answers.values():
            assert len(set(answers)) == 1, answers
            told, seen = answers[0]
            assert seen == TEXTS[int(told.removeprefix("capital@"))]
        served_versions = {told for answers in traffic.answers.values() for told, _ in answers}
        assert len(served_versions) > 1, "the swaps reached nobody"
        server.client.flush()
        rows = server.client.query(
            "SELECT count(*), count(DISTINCT episode_id), count(DISTINCT (episode_id, prompt_version)), "
            "count(*) FILTER (status <> 'ok') FROM spans_v"
        )["rows"]
        assert rows == [[calls, len(traffic.answers), len(traffic.answers), 0]]
        print(f"\n{workers} worker(s): {SWAPS} swaps in {seconds:.1f} s, {calls} streams, 0 failed, 0 mixed")
