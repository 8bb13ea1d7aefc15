"""An answer as it comes in: status, headers, and body chunks handed over without a queue."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from proxy.http1_errors import ClosedEarly, ProtocolError, TransportError

Header = tuple[bytes, bytes]

HIGH_WATER = 256 * 1024  # bytes of body kept for a slow reader before the connection stops reading
UNLIMITED = 1 << 62


class Source(Protocol):
    """The connection behind an answer that is not whole yet."""

    def resume(self) -> None:
        """Reads on."""

    def abort(self, error: TransportError) -> None:
        """Closes at once; whoever waits for the answer gets `error`."""


class Response:
    """One answer. `status`, `headers` (order and case as sent) are there from the start; the body comes by `read()`
    or by iterating. Leave no answer half read: read to the end, or `abort()`; `async with` does that by itself.

    `on_error`, where set, makes of a TransportError what reading raises in its place. `retried` says that the request
    was sent a second time, because the kept connection it went to first was stale. `listener`, where set, is called
    when something new is there, in place of whoever awaits it.
    Trailers are dropped, interim (1xx) answers skipped, content encodings left as they are.
    """

    __slots__ = (
        "_source",
        "_waiter",
        "_whole",
        "buffered",
        "complete",
        "error",
        "headers",
        "limit",
        "listener",
        "on_error",
        "paused",
        "pieces",
        "retried",
        "status",
    )

    def __init__(self, source: Source) -> None:
        self.status = 0
        self.headers: list[Header] = []
        self.retried = False
        self.buffered = 0  # bytes of `pieces`
        self.limit = HIGH_WATER
        self.on_error: Callable[[TransportError], Exception] | None = None
        self.listener: Callable[[], None] | None = None
        self.pieces: list[bytes] = []  # of the body, not read yet; the connection adds to them, and calls `wake`
        self.paused = False  # whether the connection has stopped reading until `resume`
        self.complete = False  # whether the last byte has arrived
        self.error: TransportError | None = None  # why it has ended before it was whole
        self._source: Source | None = source
        self._waiter: asyncio.Future[None] | None = None
        self._whole = False

    async def read(self, limit: int | None = None) -> bytes:
        """What is left of the body. Raises TransportError; ProtocolError when it is more than `limit` bytes."""
        self.limit = UNLIMITED if limit is None else limit
        self._whole = True
        if self.buffered > self.limit:
            self.over_limit()
        elif self._source is not None:
            self._source.resume()
        while not self.complete and self.error is None:
            await self._wait()
        if self.error is not None:
            raise self._told(self.error)
        return self._take()

    def __aiter__(self) -> "Response":
        return self

    async def __anext__(self) -> bytes:
        """The bytes that came since the last call, as one. What came before an error is given before it is raised."""
        while not self.pieces:
            if self.error is not None:
                raise self._told(self.error)
            if self.complete:
                raise StopAsyncIteration
            await self._wait()
        chunk = self._take()
        if self._source is not None:
            self._source.resume()
        return chunk

    def abort(self) -> None:
        """Nobody wants the rest: the connection is closed at once. Nothing happens when the answer is whole."""
        if self._source is not None:
            self._source.abort(ClosedEarly("given up by the caller"))

    async def __aenter__(self) -> "Response":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def take(self) -> bytes:
        """What has come of the body since the last time; empty where nothing has."""
        pieces = self.pieces
        if len(pieces) == 1:
            self.buffered = 0
            return pieces.pop()
        return self._take() if pieces else b""

    def resume(self) -> None:
        """What was taken leaves room for more."""
        if self._source is not None:
            self._source.resume()

    @property
    def pausing(self) -> bool:
        """Whether the reader is so far behind that the connection should stop reading."""
        return self.buffered > self.limit and not self._whole

    def over_limit(self) -> None:
        """The body is more than `read` was told to take."""
        error = ProtocolError(f"the body is longer than {self.limit} bytes", self.buffered)
        if self._source is not None:
            self._source.abort(error)
        else:
            self.error = error

    def wake(self) -> None:
        """New pieces are there, for one who waits. (A listener is called without this detour.)"""
        waiter = self._waiter
        if waiter is not None and not self._whole and not waiter.done():
            waiter.set_result(None)

    def finish(self, error: TransportError | None = None) -> None:
        """The answer is whole, or ended by `error`; the connection is no more this answer's."""
        self._source = None
        self.error = error
        self.complete = error is None
        if self.listener is not None:
            self.listener()
        elif (waiter := self._waiter) is not None and not waiter.done():
            waiter.set_result(None)

    async def head(self) -> None:
        """Returns once status and headers are there. Raises TransportError."""
        while not self.status:
            if self.error is not None:
                raise self.error
            await self._wait()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            self._waiter = None

    def _told(self, error: TransportError) -> Exception:
        if self.on_error is None:
            return error
        told = self.on_error(error)
        told.__cause__ = error
        return told

    def _take(self) -> bytes:
        chunks = self.pieces
        whole = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self.buffered = 0
        return whole
