"""The long poll by which workers learn the registry: all that a starting server is asked for."""

import asyncio
from typing import Any

from starlette.concurrency import run_in_threadpool

from collector.service import Collector

MAX_SECONDS = 25.0


async def poll(
    collector: Collector, closing: asyncio.Event, after: int | None, serial: int | None, seconds: float
) -> dict[str, Any]:
    """The registry's snapshot. With `after`, waits (<= 25 s) until it is another than the caller's."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    stop = collector.on_change(lambda: loop.call_soon_threadsafe(changed.set))
    try:
        snapshot = await run_in_threadpool(collector.snapshot)
        news = after != snapshot["revision"] or serial not in (None, snapshot["serial"])
        if news or closing.is_set():
            return snapshot
        waits = {asyncio.create_task(changed.wait()), asyncio.create_task(closing.wait())}
        await asyncio.wait(waits, timeout=min(seconds, MAX_SECONDS), return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        return await run_in_threadpool(collector.snapshot)
    finally:
        stop()
