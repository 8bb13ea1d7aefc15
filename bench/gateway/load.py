"""The load generator: keep-alive connections that ask again as soon as they are answered, as cheaply as Python can."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import httptools

from bench.gateway.payloads import MODEL, Scenario
from bench.gateway.stats import quantile

PATIENCE = 60.0  # seconds for the calls under way at the end
# What the OpenAI SDK for Python sends, beside host, key and length.
SDK_HEADERS = (
    ("accept", "application/json"),
    ("accept-encoding", "gzip, deflate"),
    ("content-type", "application/json"),
    ("user-agent", "OpenAI/Python 2.8.1"),
    ("x-stainless-arch", "x64"),
    ("x-stainless-async", "false"),
    ("x-stainless-lang", "python"),
    ("x-stainless-os", "Linux"),
    ("x-stainless-package-version", "2.8.1"),
    ("x-stainless-read-timeout", "600"),
    ("x-stainless-retry-count", "0"),
    ("x-stainless-runtime", "CPython"),
    ("x-stainless-runtime-version", "3.11.7"),
)


@dataclass(frozen=True)
class Address:
    """Where to send calls: `path` is that of chat completions, `headers` what this target wants beside the SDK's,
    `model` how it wants the model to be named."""

    port: int
    path: str = "/v1/chat/completions"
    headers: tuple[tuple[str, str], ...] = ()
    model: str = MODEL

    def body(self, body: bytes) -> bytes:
        """The body of a call, with this target's name of the model."""
        return body.replace(b'"' + MODEL.encode() + b'"', b'"' + self.model.encode() + b'"', 1)

    def request(self, body: bytes) -> bytes:
        """The whole request."""
        body = self.body(body)
        head = [f"POST {self.path} HTTP/1.1", f"host: 127.0.0.1:{self.port}"]
        head += [f"{name}: {value}" for name, value in (*SDK_HEADERS, *self.headers)]
        head.append(f"content-length: {len(body)}")
        return "\r\n".join(head).encode() + b"\r\n\r\n" + body


@dataclass
class Seen:
    """What a load saw: seconds of each call and to its first body byte, after warm-up; `sent` counts every call that
    was sent, `failed` those that had no 200, or no answer at all."""

    sent: int = 0
    failed: int = 0
    walls: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0
    error: str | None = None

    @property
    def measures(self) -> dict[str, float]:
        """Milliseconds and calls a second. Empty where no call was answered."""
        if not self.walls:
            return {}
        return {
            "rps": len(self.walls) / (self.ended - self.began),
            "p50_ms": quantile(self.walls, 0.5) * 1e3,
            "p99_ms": quantile(self.walls, 0.99) * 1e3,
            "ttft_ms": quantile(self.firsts, 0.5) * 1e3,
        }


class Plan:
    """What is still to be asked: shared by the connections of one load. The first `warm` calls are not timed."""

    def __init__(self, scenario: Scenario, raw: bytes, scale: float) -> None:
        self.raw = raw
        self.stream = scenario.stream
        self.seen = Seen()
        self._warm = 2 * scenario.concurrency
        self._calls = scenario.calls + self._warm
        self._seconds = scenario.seconds * scale
        self._answered = 0

    @property
    def more(self) -> bool:
        """Whether more calls are to be sent: a target that only fails is left alone."""
        seen = self.seen
        if seen.sent >= self._calls or seen.failed > 10 + self._warm:
            return False
        return not seen.began or time.perf_counter() - seen.began < self._seconds

    def answered(self, wall: float, first: float, now: float) -> None:
        """A good answer."""
        self._answered += 1
        if self._answered == self._warm:
            self.seen.began = now
        elif self._answered > self._warm:
            self.seen.walls.append(wall)
            self.seen.firsts.append(first)
            self.seen.ended = now


class Asking(asyncio.Protocol):
    """One connection. `done` resolves when it asks no more."""

    def __init__(self, plan: Plan, loop: asyncio.AbstractEventLoop) -> None:
        self.done: asyncio.Future[None] = loop.create_future()
        self._plan = plan
        self._parser = httptools.HttpResponseParser(self)
        self._transport: Any = None
        self._sent = 0.0
        self._first = 0.0
        self._ended = b""
        self._asking = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask at once."""
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        if not self._plan.more:
            self._transport.close()
            self._finish()
            return
        self._plan.seen.sent += 1
        self._asking = True
        self._first = 0.0
        self._ended = b""
        self._sent = time.perf_counter()
        self._transport.write(self._plan.raw)

    def data_received(self, data: bytes) -> None:
        """Some of an answer."""
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """Some of a body."""
        if not self._first:
            self._first = time.perf_counter()
        self._ended = body

    def on_message_complete(self) -> None:
        """A whole answer."""
        now = time.perf_counter()
        self._asking = False
        status = self._parser.get_status_code()
        if status != 200 or (self._plan.stream and b"[DONE]" not in self._ended):
            self._fail(f"status {status}: {self._ended[:200]!r}")
        else:
            self._plan.answered(now - self._sent, self._first - self._sent, now)
        if self._parser.should_keep_alive():
            self._ask()
        else:
            self._transport.close()
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        """By either side."""
        if self._asking:
            self._asking = False
            self._fail(f"the connection was closed under a call: {exc}")
        self._finish()

    def _fail(self, why: str) -> None:
        self._plan.seen.failed += 1
        self._plan.seen.error = why

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def drive(address: Address, scenario: Scenario, scale: float = 1.0) -> Seen:
    """Put the scenario's load on a target; `scale` stretches its duration. A connection that the target closes between
    two calls is opened again. Raises TimeoutError when calls stay unanswered."""
    plan = Plan(scenario, address.request(scenario.body), scale)
    loop = asyncio.get_running_loop()

    async def one() -> None:
        while plan.more:
            _, asking = await loop.create_connection(lambda: Asking(plan, loop), "127.0.0.1", address.port)
            await asking.done

    limit = scenario.seconds * scale + PATIENCE
    await asyncio.wait_for(asyncio.gather(*(one() for _ in range(scenario.concurrency))), limit)
    return plan.seen
