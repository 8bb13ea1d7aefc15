"""The collector's process: `python -P -m collector --socket PATH --config JSON [--parent-fd N]`; where the collector is
elsewhere (`store.collector`), what stands in for it.

Serves the API on a unix socket. SIGTERM and SIGINT end it cleanly (seal, load, checkpoint, exit 0); with `--parent-fd`,
the end of file on that pipe, which the death of the parent causes, ends it within a second.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette

from collector import calm
from collector.errors import RatchetError
from collector.lifeline import follow
from collector.settings import Settings

_GRACE_SECONDS = 5
_ORPHAN_SECONDS = 0.5

log = logging.getLogger("collector")


class Server(calm.Server):
    """A server which tells waiting polls that it is about to stop."""

    def __init__(self, config: uvicorn.Config, app: Starlette) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal: end the polls first, they would hold the shutdown up."""
        self.stop()
        super().handle_exit(sig, frame)

    def stop(self) -> None:
        """End polls and serving; from any thread."""
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: self._app.state.closing.set())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until told to stop. Returns the exit code: 0, or 1 where it could not start."""
    options = _options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each look at an engine, otherwise
    text = sys.stdin.read() if options.config == "-" else options.config
    settings = Settings.model_validate_json(text)
    try:
        app, close = _begin(settings)
    except RatchetError as error:
        log.error("%s", error.message)
        return 1
    try:
        _serve(app, options.socket, options.parent_fd)
    finally:
        close()
    return 0


def _begin(settings: Settings) -> tuple[Starlette, Callable[[], None]]:
    """The application, and how to close what is behind it. Imports what is needed: an outpost does without DuckDB."""
    if settings.store.collector is not None:
        from collector.outpost import Outpost

        outpost = Outpost(settings)
        return outpost.app, outpost.close
    from collector import front
    from collector.service import Collector

    collector = Collector(settings)
    return front.create(collector), collector.close


def _serve(app: Starlette, socket: str, parent_fd: int | None) -> None:
    config = uvicorn.Config(
        app,
        uds=socket,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    server = Server(config, app)
    # uvicorn raises the signal again when it is done: ours to have survived, for the final load.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    if parent_fd is not None:
        follow(parent_fd, lambda: _orphaned(server.stop))
    asyncio.run(server.serve())


def _orphaned(stop: Callable[[], None]) -> None:
    log.warning("the parent is gone")
    stop()
    # Everything acknowledged is in the journal: a final load that takes longer may as well wait for the next start.
    end = threading.Timer(_ORPHAN_SECONDS, lambda: os._exit(1))
    end.daemon = True
    end.start()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="collector")
    parser.add_argument("--socket", required=True, help="path of the unix socket to serve on")
    parser.add_argument("--config", required=True, help="the settings as JSON, or - to read them from standard input")
    parser.add_argument("--parent-fd", type=int, help="a pipe whose end of file means that the parent has died")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    os.umask(0o077)  # DuckDB makes its files for everybody to read, and the data directory may be older than we are
    code = main()
    logging.shutdown()
    # All is closed. When an interpreter ends, the binding of DuckDB prints what it leaked, on the user's screen.
    os._exit(code)
