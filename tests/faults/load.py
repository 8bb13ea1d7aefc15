"""Mixed traffic: calls that succeed, that fail upstream, and that their clients leave, each in a known episode.

A call says in its own message what the upstream is to do with it, so nothing depends on the order of arrival.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.fake_upstream import Received, Reply, chat, chat_events, error_reply, sse_reply

MIX = ("json", "json", "json", "sse", "sse", "refused", "broken", "reset", "cut", "leave", "leave-stream")
PAUSE = 0.01


@dataclass
class Call:
    """One call and what became of it. `whole`: the client got the complete answer, which acknowledges the call."""

    number: int
    kind: str
    episode: str
    status: int | None = None
    whole: bool = False
    text: str = ""
    span: str | None = None

    @property
    def label(self) -> str:
        return f"call-{self.number}:{self.kind}"


@dataclass
class Script:
    """What the upstream does. A client that means to leave before the answer waits until its call has arrived."""

    loop: asyncio.AbstractEventLoop | None = None
    arrived: dict[str, asyncio.Event] = field(default_factory=dict)

    def __call__(self, request: Received) -> Reply:
        body = request.json
        label = body["messages"][-1]["content"]
        kind = label.partition(":")[2]
        if kind == "leave" and self.loop is not None and label in self.arrived:
            self.loop.call_soon_threadsafe(self.arrived[label].set)
        return _reply(kind)


def _reply(kind: str) -> Reply:
    if kind == "json":
        return chat("Paris")
    if kind == "sse":
        return sse_reply(chat_events("Paris"))
    if kind == "slow":
        return sse_reply([part for event in chat_events("abcdefghij") for part in (event, 0.1)])
    if kind == "refused":
        return error_reply(429, "slow down", "rate_limit_exceeded")
    if kind == "broken":
        return error_reply(500, "no")
    if kind == "reset":
        return Reply(end="reset")
    if kind == "cut":
        return sse_reply(chat_events("Paris")[:3], end="reset")
    if kind == "leave":
        return Reply(end="hang")
    return sse_reply(chat_events("Paris")[:3], end="hang")


async def run(
    url: str,
    calls: Sequence[Call],
    script: Script,
    concurrency: int = 16,
    on_done: Callable[[int], None] = lambda done: None,
) -> None:
    """Make the calls, each under the URL of its episode. `on_done(n)` is told how many are over."""
    script.loop = asyncio.get_running_loop()
    script.arrived.update({call.label: asyncio.Event() for call in calls if call.kind == "leave"})
    waiting = iter(calls)
    done = 0
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as session:

        async def worker() -> None:
            nonlocal done
            for call in waiting:
                await _make(session, url, call, script)
                done += 1
                on_done(done)

        await asyncio.gather(*(worker() for _ in range(concurrency)))


async def _make(session: aiohttp.ClientSession, url: str, call: Call, script: Script) -> None:
    body: dict[str, Any] = {"model": "fake-model", "messages": [{"role": "user", "content": call.label}]}
    if call.kind in ("sse", "slow", "cut", "leave-stream"):
        body["stream"] = True
    sending = asyncio.ensure_future(
        session.post(f"{url}/e/{call.episode}/v1/chat/completions", json=body, headers={"authorization": "Bearer k"})
    )
    if call.kind == "leave":
        arrival = asyncio.ensure_future(script.arrived[call.label].wait())
        await asyncio.wait({sending, arrival}, return_when=asyncio.FIRST_COMPLETED, timeout=30)
        arrival.cancel()
        sending.cancel()
        await asyncio.gather(sending, arrival, return_exceptions=True)
        return
    try:
        async with await sending as response:
            call.status = response.status
            call.span = response.headers.get("x-ratchet-span")
            if call.kind == "leave-stream":
                await response.content.readany()
                response.close()
                return
            call.text = (await response.read()).decode()
            call.whole = "[DONE]" in call.text or not body.get("stream") or response.status >= 400
    except (aiohttp.ClientError, TimeoutError):
        return


def answer(call: Call) -> str:
    """The assistant's text that the client got."""
    if call.kind == "json":
        return str(json.loads(call.text)["choices"][0]["message"]["content"])
    events = [line[6:] for line in call.text.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)
