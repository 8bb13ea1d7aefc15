"""A whole proxy worker in a thread: uvicorn on a free port, the real App, a journal that keeps its lines in memory."""

import asyncio
import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from collector.model import Exchange
from collector.prices import Prices
from collector.settings import Settings
from proxy import translate
from proxy.app import App
from proxy.rates import Meter
from proxy.server import Protocol
from proxy.table import Table
from proxy.upstream import Upstream
from proxy.versions import Versions

DEFAULTS = {
    one.name: None if one.default is dataclasses.MISSING else one.default for one in dataclasses.fields(Exchange)
}


class Lines:
    """Stands in for the journal."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        self.times: list[float] = []

    def append(self, event: str, body: Any) -> None:
        assert event == "span"
        self.spans.append({**DEFAULTS, **body})
        self.times.append(time.monotonic())


class Registry:
    """Stands in for the collector: what its deployments and candidates answer."""

    def __init__(self) -> None:
        self.slots: dict[str, Any] = {}
        self.log: list[dict[str, Any]] = []
        self.candidates: dict[tuple[str, str], str] = {}
        self.fetches = 0

    def add(self, slot: str, *templates: str, match: dict[str, str] | None = None) -> None:
        entry = self.slots.setdefault(slot, {"kind": "prompt", "match": match or {}, "versions": []})
        for text in templates:
            number = len(entry["versions"]) + 1
            entry["versions"].append(
                {"version": number, "template": text, "hash": sha256(text.encode()).hexdigest()[:12]}
            )
            if number == 1:
                self.promote(slot, {"1": 1.0})

    def promote(self, slot: str, arms: dict[str, float]) -> None:
        line = {"revision": len(self.log) + 1, "slot": slot, "action": "promote", "arms": arms, "ts_ns": 1}
        self.log.append(line)

    def candidate(self, slot: str, text: str) -> str:
        ident = "c-" + sha256(text.encode()).hexdigest()[:12]
        self.candidates[slot, ident] = text
        return ident

    def snapshot(self) -> dict[str, Any]:
        return {"revision": len(self.log), "slots": self.slots, "log": list(self.log)}

    async def fetch(self, after: int | None, seconds: float) -> dict[str, Any]:
        self.fetches += 1
        until = time.monotonic() + seconds
        while after is not None and len(self.log) <= after and time.monotonic() < until:
            await asyncio.sleep(0.005)
        return self.snapshot()

    async def fetch_candidate(self, slot: str, candidate: str) -> str | None:
        return self.candidates.get((slot, candidate))


async def cold(scope: Any, receive: Any, send: Any) -> None:
    """Stands in for the other routes: answers with the path it was given."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    body = f"cold {scope['method']} {scope['path']}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


class Worker:
    """A running worker. `url` ends in /v1, `root` doesn't; `spans` is what was recorded so far."""

    def __init__(
        self, settings: Settings, registry: Registry, folder: Path, environ: dict[str, str], prices: Prices
    ) -> None:
        self._prices = prices
        self.lines = Lines()
        self.registry = registry
        self._settings = settings
        self._folder = folder
        self._environ = environ
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.root = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.url = self.root + "/v1"
        # A client costs more to make than a call; connections aren't kept, so that none outlives a test.
        self.client = httpx.Client(verify=False, timeout=20, limits=httpx.Limits(max_keepalive_connections=0))
        self.versions: Versions
        self.server: uvicorn.Server

    @property
    def spans(self) -> list[dict[str, Any]]:
        return self.lines.spans

    def span(self, index: int = -1, count: int | None = None) -> dict[str, Any]:
        """One span; waits until there are `count`."""
        if count is not None:
            wait_for(lambda: len(self.spans) >= count)
            assert len(self.spans) == count
        return self.spans[index]

    def catch_up(self) -> None:
        """Waits until the worker knows the registry's last revision."""
        wait_for(lambda: self.versions.current.revision == len(self.registry.log))

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(60)
        wait_for(lambda: self.server.started)

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self._thread.join(30)

    async def _main(self) -> None:
        self.versions = Versions(self.registry.fetch, self._folder / "deployments.json", self.registry.fetch_candidate)
        upstream = Upstream(self._settings, self._environ)
        table = Table(self._folder / "episodes.tab")
        meter = Meter(self._folder / "limits.tab")
        lines: Any = self.lines
        app = App(self._settings, lines, self.versions, upstream, table, cold, meter, self._prices)
        config = uvicorn.Config(
            app,
            http=Protocol,
            log_level="critical",
            access_log=False,
            server_header=False,
            date_header=False,
            lifespan="on",
        )
        self.server = uvicorn.Server(config)
        self.server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        watch = asyncio.ensure_future(self.versions.watch())
        self._ready.set()
        await self.server.serve([self._socket])
        watch.cancel()
        await upstream.close()
        await translate.close()
        table.close()
        meter.close()


@contextlib.contextmanager
def worker(
    folder: Path,
    upstream: str,
    /,
    registry: Registry | None = None,
    environ: dict[str, str] | None = None,
    prices: Prices | None = None,
    **settings: Any,
) -> Iterator[Worker]:
    """A worker whose default upstream is `upstream`; `settings` are further sections."""
    sections = {**settings, "upstream": {"default": upstream, "anthropic": upstream, **settings.get("upstream", {})}}
    running = Worker(
        Settings.model_validate(sections), registry or Registry(), folder, environ or {}, prices or Prices()
    )
    running.start()
    running.catch_up()
    try:
        yield running
    finally:
        running.stop()


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Until it holds; fails after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.002)
