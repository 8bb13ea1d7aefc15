"""Waiting out a collector that restarts: infrastructure is retried, and only infrastructure."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from collector.errors import Unavailable

Answer = TypeVar("Answer")
PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each further try


async def patiently(ask: Callable[[], Answer]) -> Answer:
    """`ask()` in a thread, again after each pause while it raises Unavailable; the last Unavailable is raised."""
    for pause in PAUSES:
        try:
            return await asyncio.to_thread(ask)
        except Unavailable:
            await asyncio.sleep(pause)
    return await asyncio.to_thread(ask)
