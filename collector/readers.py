"""Threads of their own for what reads the store: slow queries may fill them, and hold up nothing else."""

import asyncio
import functools
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.responses import Response

from collector.errors import Unavailable

_THREADS = 4
_WAITING = 64


class Readers:
    """A few threads, and a bound on how many calls may wait for one."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="reader")
        self._under_way = 0
        self._lock = threading.Lock()

    async def run(self, read: Callable[[], Response]) -> Response:
        """What `read` returns. Raises Unavailable where too many wait already."""
        with self._lock:
            if self._under_way >= _THREADS + _WAITING:
                raise Unavailable("too many queries are waiting; try again", code="busy")
            self._under_way += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, read)
        finally:
            with self._lock:
                self._under_way -= 1

    def close(self) -> None:
        """Let the threads end; what is under way is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def pooled(endpoint: Callable[..., Response]) -> Callable[..., Awaitable[Response]]:
    """An endpoint, called by name with `collector`, that runs in the collector's own threads for readers."""

    @functools.wraps(endpoint)
    async def run(**given: Any) -> Response:
        readers: Readers = given["collector"].readers
        return await readers.run(functools.partial(endpoint, **given))

    return run
