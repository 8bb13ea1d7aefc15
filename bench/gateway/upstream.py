"""The scripted upstream, a process: answers every chat call at once, as cheaply as Python can. Prints its port.

A stream leaves one event a turn of the loop, without pauses; for a request that says so, 2 ms apart.
"""

import asyncio
from typing import Any

import httptools
import uvloop

from bench.gateway import payloads

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\nx-request-id: req_5f1c2a7be0\r\n"
_REPLY = payloads.reply()
JSON = _HEAD % b"application/json" + b"content-length: %d\r\n\r\n" % len(_REPLY) + _REPLY
SSE = _HEAD % b"text/event-stream; charset=utf-8" + b"transfer-encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"


def _chunked(usage: bool) -> list[bytes]:
    return [b"%x\r\n%b\r\n" % (len(event), event) for event in payloads.events(usage)]


EVENTS = {usage: _chunked(usage) for usage in (False, True)}
_STREAM = (b'"stream":true', b'"stream": true')
_USAGE = (b'"include_usage":true', b'"include_usage": true')
_PACED = payloads.PACED.encode()


class Answering(asyncio.Protocol):
    """One connection, kept open for as many requests as come."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._parser = httptools.HttpRequestParser(self)
        self._body: list[bytes] = []
        self._left: list[bytes] = []
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is here."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Some of a request."""
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """Some of a body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """A whole request: answer it."""
        body = b"".join(self._body)
        self._body.clear()
        if not any(mark in body for mark in _STREAM):
            self._transport.write(JSON)
            return
        self._transport.write(SSE)
        events = EVENTS[any(mark in body for mark in _USAGE)]
        self._next(events, 0, payloads.PAUSE if _PACED in body else 0.0)

    def _next(self, events: list[bytes], at: int, pause: float) -> None:
        if self._transport.is_closing():
            return
        last = at + 1 == len(events)
        self._transport.write(events[at] + LAST if last else events[at])
        if last:
            return
        if pause and 0 < at <= len(events) - 4:
            self._loop.call_later(pause, self._next, events, at + 1, pause)
        else:
            self._loop.call_soon(self._next, events, at + 1, pause)


async def main() -> None:
    """Serve until killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Answering(loop), "127.0.0.1", 0, backlog=1024)
    print(f"port {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
