"""One worker: `python -P -m proxy.worker N`, its settings on stdin. Serves calls on a listener that it inherits.

What is heavy is imported late, and torch, DuckDB and LiteLLM not at all: a worker that died is back in a moment.
"""

import asyncio
import contextlib
import gc
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
import uvicorn

from collector import calm
from collector.errors import RatchetError
from collector.journal import FOLDER, Journal
from collector.lifeline import follow
from collector.settings import Settings
from proxy.patience import patrol

if TYPE_CHECKING:
    from collector.prices import Prices
    from proxy.routes.base import Context
    from proxy.table import Table
    from proxy.versions import Versions

log = logging.getLogger("ratchet.worker")
M = TypeVar("M")

DRAIN = 30  # seconds that running calls get after SIGTERM
ORPHANED = 0.5  # seconds to end in after the supervisor's death, whatever is running
KEEP_ALIVE = 75  # seconds; longer than clients keep idle connections, so that none is closed under a request
GARBAGE = 10_000  # containers that may be made before cycles among them are looked for
CANCEL = 2.0  # seconds that cancelled calls get to write their record
ELSEWHERE = ("collector_away", "collector_refused")  # an outpost's word: the collector is not starting along with us
PATIENCE = {True: 15.0, False: 1.0}  # seconds to wait for the first deployments: at the server's start, at a restart


@dataclass(frozen=True)
class Spec:
    """What the supervisor says: file descriptors, paths, settings. `first`: this is no restart."""

    index: int
    listen_fd: int
    alive_fd: int
    runtime: Path
    collector_socket: Path
    first: bool
    settings: Settings
    otlp_fd: int | None = None


def read_spec(raw: bytes) -> Spec:
    """The spec out of its JSON."""
    given: dict[str, Any] = orjson.loads(raw)
    return Spec(
        given["index"],
        given["listen_fd"],
        given["alive_fd"],
        Path(given["runtime"]),
        Path(given["collector_socket"]),
        given["first"],
        Settings.model_validate(given["settings"]),
        given.get("otlp_fd"),
    )


class Server(calm.Server):
    """A server whose end is asked for by `drain` or `abandon`, not by signal handlers of its own. `patience`: seconds
    for a request to arrive."""

    patience = 30.0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the worker: uvicorn would raise them again before the journal is sealed."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """A second has passed. Looks for slow clients."""
        patrol(self.server_state.connections, asyncio.get_running_loop().time(), self.patience)
        return await super().on_tick(counter)

    def drain(self) -> None:
        """Take no more connections, let running calls end."""
        self.should_exit = True

    def abandon(self) -> None:
        """The supervisor is dead: cut off what runs, so that it is recorded before the end."""
        self.config.timeout_graceful_shutdown = 0
        self.should_exit = True


async def serve(spec: Spec, ready: Any) -> None:
    """Serve until SIGTERM or the supervisor's death; on return the journal is sealed. `ready()` is called once."""
    from proxy import translate
    from proxy.app import App
    from proxy.auth import Guard
    from proxy.link import Link
    from proxy.rates import Meter
    from proxy.routes import cold
    from proxy.routes.base import Context
    from proxy.upstream import Upstream
    from proxy.versions import Versions

    settings, data_dir = spec.settings, spec.settings.store.data_dir
    link = Link(spec.collector_socket)
    upstream = Upstream(settings)
    versions = Versions(link.snapshot, data_dir / "deployments.json", link.candidate)
    versions.load_cache()
    journal = Journal(data_dir / FOLDER, f"worker{spec.index}")
    with (
        _table(data_dir, spec.runtime, settings.server.workers == 1) as table,
        socket.socket(fileno=spec.listen_fd) as listener,
    ):
        guard = Guard(settings.server, versions)
        context = Context(settings, journal, versions, upstream, link, guard, spec.runtime, spec.index)
        prices = _prices(settings)
        meter = _mapped(lambda folder: Meter(folder / "limits.tab", spec.index), data_dir, spec.runtime)
        app = App(settings, journal, versions, upstream, table, cold(context), meter, prices)
        server = Server(_config(app, context))
        server.patience = settings.server.slow_client_timeout
        _obey(server, context, spec.alive_fd, spec.runtime)
        await _first_deployments(versions, server, PATIENCE[spec.first])
        watching = asyncio.create_task(versions.watch())
        _settle_memory()
        ready()
        try:
            otlp = [] if spec.otlp_fd is None else [socket.socket(fileno=spec.otlp_fd)]
            await server.serve(sockets=[listener, *otlp])
            await _let_end(server)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await upstream.close()
            await translate.close()
            await link.close()
            await asyncio.to_thread(journal.close)


def _settle_memory() -> None:
    """What is there now stays: the garbage collector need not walk it again, nor look every seven hundred objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE, 20, 20)


def _table(data_dir: Path, runtime: Path, alone: bool) -> "Table":
    """The workers' shared table of episodes."""
    from proxy.table import Table

    return _mapped(lambda folder: Table(folder / "episodes.tab", alone=alone), data_dir, runtime)


def _mapped(make: Callable[[Path], M], data_dir: Path, runtime: Path) -> M:
    """What the workers share in a mapped file; where the disk has no room for it, it lasts as long as the server."""
    try:
        return make(data_dir)
    except OSError as error:
        log.error("%s cannot be used (%s): what it holds is forgotten when the server ends", data_dir, error.strerror)
        return make(runtime)


def _prices(settings: Settings) -> "Prices":
    """Own prices at once; LiteLLM's map a moment later, read beside the loop."""
    from collector.prices import Prices, price_of, read

    own = {}
    for entry in settings.models:
        provider, _, name = str(entry.litellm_params["model"]).partition("/")
        price = price_of({**entry.litellm_params, **entry.model_info})
        if price is not None:
            own[provider, name] = price
    prices = Prices(own)
    threading.Thread(target=lambda: prices.learn(read()), name="prices", daemon=True).start()
    return prices


def _config(app: Any, context: "Context") -> uvicorn.Config:
    from proxy.routes.ops import Count, publish
    from proxy.server import Protocol

    count = Count(context)

    async def each_second() -> None:
        count.update()
        if context.settings.server.workers > 1:
            await asyncio.to_thread(publish, context)

    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        backlog=2048,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=DRAIN,
        callback_notify=each_second,
        timeout_notify=0,
    )


def _obey(server: Server, context: "Context", alive_fd: int, runtime: Path) -> None:
    """End in order on SIGTERM, at once when the supervisor is gone; Ctrl-C is the supervisor's to handle."""
    loop = asyncio.get_running_loop()

    def drain() -> None:
        context.draining = True
        server.drain()

    def orphaned() -> None:
        shutil.rmtree(runtime, ignore_errors=True)  # nobody else is left to do it
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            loop.call_soon_threadsafe(server.abandon)
        time.sleep(ORPHANED)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loop.add_signal_handler(signal.SIGTERM, drain)
    follow(alive_fd, orphaned)


async def _first_deployments(versions: "Versions", server: Server, patience: float) -> None:
    """Wait for the collector's own snapshot; without it, serve from the cache: being up comes first."""
    deadline = time.monotonic() + patience
    while True:
        try:
            await versions.refresh()
        except RatchetError as error:
            if server.should_exit:
                return
            if time.monotonic() < deadline and error.code not in ELSEWHERE:
                await asyncio.sleep(0.02)
                continue
            revision = versions.current.revision
            log.warning("the collector does not answer (%s): serving revision %d from the cache", error.code, revision)
        return


async def _let_end(server: Server) -> None:
    """uvicorn cancels what is left when its patience ends, and does not wait for it: the records are still to come."""
    if server.server_state.tasks:
        await asyncio.wait(set(server.server_state.tasks), timeout=CANCEL)


def _say_ready() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()


def main() -> None:
    """The process."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    spec = read_spec(sys.stdin.buffer.read())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:  # each call holds two connections
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(spec, _say_ready))
        logging.shutdown()
        os._exit(0)  # all is sealed and closed: taking an interpreter apart would only cost time


if __name__ == "__main__":
    main()
