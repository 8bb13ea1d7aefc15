"""A collector behind a real uvicorn on a unix socket, in a thread."""

import asyncio
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn

from collector import api
from collector.__main__ import Server
from collector.service import Collector


@contextmanager
def served(collector: Collector) -> Iterator[httpx.HTTPTransport]:
    """A transport that reaches `collector`; the server is stopped afterwards."""
    with tempfile.TemporaryDirectory(prefix="rt") as folder:
        path = str(Path(folder) / "c.sock")
        app = api.create(collector)
        config = uvicorn.Config(app, uds=path, log_config=None, log_level="warning", access_log=False)
        server = Server(config, app)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
        thread.start()
        end = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < end, "the server did not start in time"
            time.sleep(0.005)
        try:
            yield httpx.HTTPTransport(uds=path)
        finally:
            server.stop()
            thread.join(20)
            assert not thread.is_alive()
