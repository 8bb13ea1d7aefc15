"""uvicorn's server, awake once a second instead of ten times: an idle process costs next to nothing."""

import asyncio
from typing import Any

import uvicorn

_SECOND = 1.0
_TICKS = 10  # what uvicorn counts in a second


class Server(uvicorn.Server):
    """Ends as soon as `should_exit` is set, from whatever thread."""

    def __init__(self, config: uvicorn.Config) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()
        self._exits = False
        super().__init__(config)

    @property
    def should_exit(self) -> bool:
        """Whether it was told to end."""
        return self._exits

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        self._exits = value
        if value and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ended.set)

    async def serve(self, sockets: Any = None) -> None:
        """Serve until `should_exit`."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def main_loop(self) -> None:
        """Tick until the end."""
        counter = 0
        while not await self.on_tick(counter):
            counter += _TICKS
            timer = asyncio.get_running_loop().call_later(_SECOND, self._ended.set)
            await self._ended.wait()
            timer.cancel()
            if not self.should_exit:
                self._ended.clear()
