"""One HTTP/1.1 connection to an upstream: one request at a time, its answer parsed as it arrives (httptools).

llhttp, strict as it comes, refuses what could be read in two ways: both length and chunked, two lengths, signs and
spaces in sizes, folded or bare-LF lines. What it leaves to its caller is here: caps, interim answers, bodies that
end with the connection, codings other than chunked, answers that nobody asked for.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, cast

import httptools

from proxy.http1_errors import ClosedEarly, ProtocolError, ReadTimeout, TransportError
from proxy.http1_response import Header, Response

MAX_HEAD = 64 * 1024  # bytes of headers, and bytes in a row of trailers or chunk framing without any body
MAX_HEADERS = 256
PIECE = 256 * 1024  # a larger request body is written piece by piece, as the socket takes it
STALE_SECONDS = 1.0  # a kept connection that ends this soon after the request had been given up before it


class Connection(asyncio.Protocol):
    """One connection. `on_idle(connection)` is called when it can take another request, `on_lost(connection)` once
    when it has ended; `used_at` is the loop's time of the last progress."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_idle: "Callable[[Connection], None]",
        on_lost: "Callable[[Connection], None]",
    ) -> None:
        self._now = loop.time
        self._on_idle = on_idle
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpResponseParser(self)
        self._response: Response | None = None
        self._headless = False  # the answer has no body whatever its headers say: HEAD
        self._whole = False
        self._interim = False
        self._progress = False
        self._reusable = True
        self._coded = False
        self._trailers: list[Header] = []  # they are dropped
        self._headers = self._trailers  # where the next header belongs
        self._pieces: list[bytes] = []  # where the next piece of a body belongs
        self._served = 0
        self._seen = 0
        self._idle_bytes = 0
        self._sent_at = 0.0
        self._unsent: memoryview | None = None
        self._may_write = True
        self._paused = False
        self.used_at = loop.time()

    @property
    def busy(self) -> bool:
        """Whether an answer is awaited or under way."""
        return self._response is not None

    @property
    def open(self) -> bool:
        """Whether a request can still be sent."""
        return self._transport is not None and self._reusable and not self._transport.is_closing()

    def send(self, head: bytes, body: bytes, *, headless: bool = False) -> Response:
        """Sends one request; the answer is to be awaited with `Response.head()`."""
        transport = self._transport
        if transport is None:
            raise ClosedEarly("the connection has ended")
        response = self._response = Response(self)
        self._headless = headless
        self._headers = response.headers
        self._pieces = response.pieces
        self._seen = self._idle_bytes = 0
        self._whole = self._interim = self._coded = self._progress = False
        self._sent_at = self.used_at = self._now()
        if len(body) <= PIECE:
            transport.write(head + body)
        else:
            transport.write(head)
            self._unsent = memoryview(body)
            self._write_on()
        return response

    def check(self, now: float, read_timeout: float, idle_seconds: float) -> None:
        """Ends it when its answer stood still for `read_timeout` seconds, or nobody used it for `idle_seconds`."""
        still = now - self.used_at
        if self._response is None:
            if still >= idle_seconds:
                self.close()
        elif still >= read_timeout and not self._paused:
            self.abort(ReadTimeout(f"no byte of an answer for {read_timeout:g} s", self._seen))

    def close(self) -> None:
        """Ends an idle connection, saying goodbye where the protocol has a word for it."""
        self._reusable = False
        if self._transport is not None:
            self._transport.close()

    def abort(self, error: TransportError) -> None:
        """Closes at once; whoever waits for the answer gets `error`."""
        self._reusable = False
        self._unsent = None
        response, self._response = self._response, None
        if response is not None:
            response.finish(error)
        if self._transport is not None:
            self._transport.abort()

    def resume(self) -> None:
        """Reads on after a pause."""
        if self._paused and self._transport is not None:
            self._paused = False
            if self._response is not None:
                self._response.paused = False
            self.used_at = self._now()
            self._transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's word for: connected."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Parses one read; wakes the reader once, however many pieces it held."""
        response = self._response
        if response is None:
            self.abort(ProtocolError("bytes that nobody asked for"))
            return
        self._seen += len(data)
        pieces = self._pieces
        before = len(pieces)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if not self._whole:
                self.abort(_refusal(error, self._seen))
                return
            self._reusable = False
        if len(pieces) > before:
            response.buffered += sum(map(len, pieces[before:]))
            self._progress = True
        if self._whole:
            self._finish(response)
        elif self._progress:
            self._progress = False
            self._idle_bytes = 0
            self.used_at = self._now()
            if response.buffered > response.limit:
                self._too_much(response)
            if response.listener is not None:
                response.listener()
            else:
                response.wake()
        else:
            self._idle_bytes += len(data)
            if self._idle_bytes > MAX_HEAD:
                self.abort(ProtocolError(f"more than {MAX_HEAD} bytes of headers or framing", self._seen))

    def _too_much(self, response: Response) -> None:
        """More has come than its reader wants to have waiting."""
        if response.pausing:
            self._pause()
        else:
            response.over_limit()

    def eof_received(self) -> None:
        """The server sends no more: the end of a body that has no other end, else too early."""
        response = self._response
        if response is not None and response.status and not self._framed(response) and self._said_goodbye():
            self._reusable = False
            self._finish(response)

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio's word for: it has ended, by whichever side."""
        self._reusable = False
        self._transport = self._parser = self._unsent = None
        response, self._response = self._response, None
        if response is not None:
            stale = self._served > 0 and not self._seen and self._now() - self._sent_at < STALE_SECONDS
            why = f"the upstream ended the connection before its answer was whole{f' ({error})' if error else ''}"
            response.finish(ClosedEarly(why, self._seen, stale=stale))
        self._on_lost(self)

    def pause_writing(self) -> None:
        """The socket takes no more for now."""
        self._may_write = False

    def resume_writing(self) -> None:
        """The socket takes more."""
        self._may_write = True
        self.used_at = self._now()
        self._write_on()

    def on_message_begin(self) -> None:
        """Parser: a status line. After a whole answer it is one that nobody asked for."""
        if self._whole:
            raise ProtocolError("bytes after the answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Parser: a header, or after the head a trailer, which is dropped."""
        self._headers.append((name, value))
        if len(name) == 17 and name.lower() == b"transfer-encoding":
            if self._headers is self._trailers:
                return
            if self._coded or value.strip().lower() != b"chunked":
                raise ProtocolError(f"transfer-encoding {value[:40]!r} is not understood", self._seen)
            self._coded = True

    def on_headers_complete(self) -> None:
        """Parser: the head is whole, of the answer or of an interim one."""
        response, parser = self._response, self._parser
        if response is None:
            return
        status = parser.get_status_code()
        version = parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise ProtocolError(f"HTTP/{version} was not asked for", self._seen)
        if status < 200:
            self._interim_head(response, status)
            return
        if len(response.headers) > MAX_HEADERS:
            raise ProtocolError(f"more than {MAX_HEADERS} headers", self._seen)
        if self._seen > MAX_HEAD and sum(len(name) + len(value) + 4 for name, value in response.headers) > MAX_HEAD:
            raise ProtocolError(f"more than {MAX_HEAD} bytes of headers", self._seen)
        if status >= 400 and self._unsent is not None:  # it wants no more of the body
            self._unsent = None
            self._reusable = False
        response.status = status
        self._headers = self._trailers
        self._trailers.clear()
        self._progress = True
        if self._headless:
            self._whole = True
            raise ProtocolError("no body to parse")  # the only way to tell httptools, whose connection is spent then

    def on_body(self, chunk: bytes) -> None:
        """Parser: a piece of the body."""
        self._pieces.append(chunk)

    def on_message_complete(self) -> None:
        """Parser: the end, by length, by the last chunk or because there is no body."""
        if self._interim:
            self._interim = False
            return
        self._whole = True
        if not self._parser.should_keep_alive():
            self._reusable = False

    def _interim_head(self, response: Response, status: int) -> None:
        if status not in range(100, 200) or status == 101:
            raise ProtocolError(f"status {status} was not asked for", self._seen)
        self._interim = True
        self._coded = False
        self._headers = response.headers = []
        self.used_at = self._now()

    def _framed(self, response: Response) -> bool:
        return self._coded or any(name.lower() == b"content-length" for name, _ in response.headers)

    def _said_goodbye(self) -> bool:
        """Over TLS an end without its alert may be an attacker's cut (RFC 9112, 9.8); asyncio tells both alike."""
        session = self._transport.get_extra_info("ssl_object") if self._transport is not None else None
        if session is None:
            return True
        try:
            return not session.read(1)
        except ssl.SSLZeroReturnError:
            return True
        except ssl.SSLError:
            return False

    def _finish(self, response: Response) -> None:
        self._response = None
        response.finish()
        transport = self._transport
        if transport is None:
            return
        # Bytes of the request that the server has not taken would delay the next one for as long as it likes.
        if self._reusable and not transport.get_write_buffer_size() and not transport.is_closing():
            self._served += 1
            self.used_at = self._now()
            if self._paused:
                self.resume()
            self._on_idle(self)
        else:
            self._reusable, self._unsent = False, None
            transport.abort()

    def _pause(self) -> None:
        if not self._paused and self._transport is not None:
            self._paused = True
            if self._response is not None:
                self._response.paused = True
            self._transport.pause_reading()

    def _write_on(self) -> None:
        while self._may_write and self._unsent is not None and self._transport is not None:
            piece, rest = self._unsent[:PIECE], self._unsent[PIECE:]
            self._unsent = rest if rest else None
            self._transport.write(piece)


def _refusal(error: Exception, seen: int) -> ProtocolError:
    cause = error.__context__
    if isinstance(cause, ProtocolError):
        return cause
    return ProtocolError(f"the upstream's answer is not HTTP/1.1: {error}", seen)
