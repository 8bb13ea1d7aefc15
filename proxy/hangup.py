"""A client that goes away before its answer is whole."""

import asyncio
from types import TracebackType
from typing import Any, Self

from proxy.errors import ClientGone
from proxy.joining import Running
from proxy.server import CONNECTION, Cycle

GRACE = 0.7  # seconds that a call goes on for an SDK which hung up, because SDKs try again after half a second


class HangUp:
    """While it is entered, a client that goes away cancels the block, which then ends in ClientGone.

    The server's Protocol tells; under another ASGI server nobody is noticed to leave before something is sent.
    """

    def __init__(self, scope: Any, running: Running | None = None) -> None:
        """`running`: goes on for others who joined it, until they have left too."""
        self._running = running
        self._connection: Cycle | None = scope.get("extensions", {}).get(CONNECTION)
        self._gone = self._released = False

    def __enter__(self) -> Self:
        self._block = asyncio.current_task()
        if self._connection is not None:
            self._connection.on_gone = self._leave
            if self._connection.disconnected:
                self._leave()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        if self._gone and self._block is not None:
            self._block.uncancel()
            raise ClientGone from None

    def release(self) -> None:
        """Stops watching: from here on the answer is written, whether somebody hears it or not."""
        self._released = True
        if self._connection is not None:
            self._connection.on_gone = None
        if self._running is not None:
            self._running.cancel = None

    def _leave(self) -> None:
        """Ends the call, or leaves it to those who joined it; a retry that is to be expected has a moment to do so."""
        running = self._running
        if running is None or not (running.leave() or running.awaited):
            self._cancel()
            return
        running.cancel = self._cancel
        if not running.joined:
            asyncio.get_running_loop().call_later(GRACE, self._give_up)

    def _give_up(self) -> None:
        if not self._released and self._running is not None and not self._running.joined:
            self._cancel()

    def _cancel(self) -> None:
        if self._running is not None:
            self._running.over = True
        self._gone = True
        if self._block is not None:
            self._block.cancel()
