"""The server's side of a connection: uvicorn's protocol, with fewer system calls, and with word of a hang-up at once.

A head waits for the body that follows it, so that both leave in one write. What is journalled before the last piece of
an answer is sent is therefore with the kernel before the client sees any of that piece.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from collector.errors import RatchetError
from proxy import errors
from proxy.errors import BadRequest, Header, HeadersTooLarge, TooSlow
from proxy.heads import Head, cut
from proxy.limits import MAX_HEADER_BYTES
from proxy.patience import Reading

if TYPE_CHECKING:
    from proxy.quick import Quick, QuickCall

log = logging.getLogger(__name__)

CONNECTION = "ratchet.connection"  # the ASGI extension under which an application finds its Cycle
_HEAD = MAX_HEADER_BYTES + (64 << 10)  # bytes of a head that isn't whole yet; the application counts the rest
_JOIN = 64 << 10  # bytes; more than that is not copied to be joined
_DIGITS = 8  # of the length of a body that is worth the short way
_OK = STATUS_LINE[200][:-2]
_UPGRADING = (b"upgrade", b"connection", b"http2-settings")


class Cycle(RequestResponseCycle):
    """One request and its answer. `on_gone`, where set, is called when the client leaves before the answer is whole."""

    on_gone: Callable[[], None] | None = None
    key: bytes | None = None  # of its head, as `heads.cut` gives it, where its request came in one piece
    _slow = False

    def __init__(self, loop: asyncio.AbstractEventLoop, **given: Any) -> None:
        super().__init__(**given)
        self._loop = loop
        self._head = b""  # until the body comes
        self._read = False

    def gone(self) -> None:
        """The connection has ended."""
        self._head = b""
        if self.on_gone is not None and not self.response_complete:
            self.on_gone()

    def give_up(self) -> None:
        """The rest of the body is not waited for: reading it raises TooSlow."""
        self._slow = True
        self.keep_alive = False
        self.message_event.set()

    def begun(self) -> None:
        """The head of a chunked answer is out already."""
        self.response_started = self.chunked_encoding = True

    async def receive(self) -> Any:
        """ASGI's receive. Raises TooSlow for a body that takes too long to come."""
        if not self.more_body and not self._read and not self.disconnected:  # mostly it is all there
            self._read = True
            self.message_event.clear()
            body, self.body = bytes(self.body), bytearray()
            return {"type": "http.request", "body": body, "more_body": False}
        message = await super().receive()
        if self._slow:
            raise TooSlow
        return message

    async def run_asgi(self, app: Any) -> None:
        """Runs the application. An answer that it leaves unfinished ends unclean: the connection is closed."""
        try:
            await app(self.scope, self.receive, self.send)
        except Exception:  # boundary: a bug in the application must not leave a client waiting
            log.exception("%s %s failed", self.scope["method"], self.scope["path"])
            if not self.response_started:
                await errors.respond(self.send, RatchetError("an internal error of the proxy; its log says more"))
        finally:
            if not self.response_complete:
                self._flush()
                self.transport.close()

    async def send(self, message: Any) -> None:
        """ASGI's send. Raises RuntimeError for what is no HTTP answer."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if self.response_started and not self.response_complete and message["type"] == "http.response.body":
            self._body(message.get("body", b""), message.get("more_body", False))
        elif not self.response_started and message["type"] == "http.response.start":
            self._start(message["status"], message.get("headers", ()))
        else:
            raise RuntimeError(f"the message {message['type']} does not belong here")

    def _start(self, status: int, headers: Any) -> None:
        self.response_started = True
        self.waiting_for_100_continue = False
        given = dict(headers)
        lines = [*map(b": ".join, headers)]
        if b"date" not in given:
            lines += map(b": ".join, self.default_headers)
        if b"content-length" in given:
            self.chunked_encoding = False
            self.expected_content_length = int(given[b"content-length"])
        elif self.scope["method"] != "HEAD" and status not in (204, 304):
            self.chunked_encoding = True
            lines.append(b"transfer-encoding: chunked")
        if b"close" in given.get(b"connection", b"").lower():
            self.keep_alive = False
        elif not self.keep_alive:
            lines.append(b"connection: close")
        head = b"\r\n".join(lines)
        if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1 or b"\0" in head:
            raise RuntimeError("a header holds a line break or a NUL")
        self._head = b"%b%b\r\n\r\n" % (STATUS_LINE[status], head)
        if self.chunked_encoding:  # its body may take long to begin
            self._loop.call_soon(self._flush)

    def _body(self, body: bytes, more: bool) -> None:
        if self.scope["method"] == "HEAD":
            self.expected_content_length = 0
        elif self.chunked_encoding:
            chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            self._write(chunk if more else chunk + b"0\r\n\r\n")
        else:
            self.expected_content_length -= len(body)
            if self.expected_content_length < 0 or (self.expected_content_length and not more):
                raise RuntimeError("the body is not as long as content-length says")
            self._write(body)
        if not more:
            self._end()

    def _end(self) -> None:
        self.response_complete = True
        self._flush()
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()

    def _write(self, data: bytes) -> None:
        head, self._head = self._head, b""
        if len(data) > _JOIN:
            self.transport.writelines((head, data))
        elif head or data:
            self.transport.write(head + data)

    def _flush(self) -> None:
        if self._head:
            self._write(b"")


class Protocol(HttpToolsProtocol):
    """One client's connection. Malformed requests get OpenAI's envelope; a websocket's upgrade is served as a plain
    request, which the application refuses in its own words; any other, such as Java's offer of h2c, is not taken."""

    running: "QuickCall | None" = None  # the call under way that the parser knows nothing of
    _idle_since = 0.0
    _offered = False  # whether the head that was just read asks for an upgrade that isn't taken
    _between = True  # whether the parser is between two requests
    _key: bytes | None = None  # of the head that the parser is about to read
    _last: tuple[bytes, bytes, Head | None] = b"", b"", None  # a known head as it came, around the digits of its length
    _waiting: tuple[Head, int, bytes] | None = None  # a known head that came without its body, and how long that is

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn narrows it
        """asyncio's word for: somebody is there."""
        super().connection_made(transport)
        self._reading = Reading(self.loop.time())
        self._quick: Quick | None = getattr(self.config.app, "quick", None)

    def data_received(self, data: bytes) -> None:
        """asyncio's word for: bytes have come."""
        self._idle_since = self.loop.time()
        if self.running is not None:  # it goes on talking
            self.running.hand_over()
        if self._quick is not None and self._between and self._taken(self._quick, data):
            return
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse(BadRequest("this is no HTTP/1.1 request", code="malformed_request"))
        self._reading.got += len(data)
        if self._reading.head and self._reading.got > _HEAD:
            self._refuse(HeadersTooLarge(f"the head is larger than {_HEAD} bytes"))

    def _taken(self, quick: "Quick", data: bytes) -> bool:
        """Whether these bytes are a usual call's, which then needs no parser; a known head may wait for its body."""
        self._key = None
        if self._waiting is not None:
            (head, length, _), body = self._waiting, data
            if len(body) != length:
                self._read_waiting()
                return False
        elif self.cycle is not None and not self.cycle.response_complete:
            return False
        else:
            found = self._again(data) or self._known(quick, data)
            if found is None:
                return False
            head, length, body = found
            if not body and length:
                self._waiting = head, length, data
                self._reading.begin(self._idle_since)
                self._reading.head, self._reading.got = False, len(data)
                return True
        if len(body) != length or not quick.take(self, head, body):
            self._read_waiting()
            return False
        self._waiting = self._reading.since = None
        return True

    def _again(self, data: bytes) -> tuple[Head, int, bytes] | None:
        """The head, the length and what is there of the body, where the head is that of the request before."""
        before, after, head = self._last
        if head is None or not data.startswith(before):
            return None
        at = len(before)
        stop = data.find(b"\r", at, at + _DIGITS + 1)
        if stop <= at or not data.startswith(after, stop) or not (digits := data[at:stop]).isdigit():
            return None
        return head, int(digits), data[stop + len(after) :]

    def _known(self, quick: "Quick", data: bytes) -> tuple[Head, int, bytes] | None:
        """The same, where the head was seen before, on whatever connection."""
        parts = cut(data)
        if parts is None or not parts[1].isdigit() or len(parts[1]) > _DIGITS:
            return None
        self._key, digits, body = parts
        head = quick.heads.get(self._key)
        if head is None:
            return None
        at = data.find(b"ength: ") + 7  # where `cut` has found it
        self._last = data[:at], data[at + len(digits) : len(data) - len(body)], head
        return head, int(digits), body

    def _read_waiting(self) -> None:
        """Has the parser read the head that waits, after all."""
        if self._waiting is not None:
            (_, _, data), self._waiting = self._waiting, None
            since = self._reading.since
            self._feed(data)
            self._reading.since, self._reading.got = since, len(data)

    def head(self, headers: list[Header], more: bytes, given: Mapping[bytes, bytes]) -> bytes:
        """The head of a running call's answer, a 200; `more` are lines behind `headers`. `given`: those that the
        upstream gave."""
        lines = [_OK, *map(b": ".join, headers), more]
        if b"date" not in given:
            lines += map(b": ".join, self.server_state.default_headers)
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def ended(self) -> None:
        """The running call's answer is out."""
        self.server_state.total_requests += 1
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._wait(self.timeout_keep_alive)

    def resume(self, head: Head, *, begun: bool) -> Cycle:
        """A cycle for a call that was running without one. `begun`: the head of its answer is out."""
        self.on_message_begin()
        self._reading.since, self._reading.head, self._between = None, False, True
        scope = cast(Any, self.scope)
        scope.update(method="POST", path=unquote(head.raw_path.decode("latin-1")), raw_path=head.raw_path)
        scope.update(query_string=head.query, headers=head.headers)
        self.cycle = cycle = self._cycle(keep_alive=True)
        cycle.more_body = False
        if begun:
            cycle.begun()
        return cycle

    def start(self, cycle: Cycle, app: Any) -> None:
        """Runs an application for a cycle."""
        self._start_asgi_task(cycle, app)

    def shutdown(self) -> None:
        """uvicorn's word for: the server ends."""
        if self.running is not None:
            self.running.hand_over()
        self._read_waiting()
        super().shutdown()

    def _feed(self, data: bytes) -> None:
        """Parses. Where the parser stops at an upgrade that isn't taken, it reads the head again without that, and then
        the body, which it would skip. Raises HttpParserError."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stop:
            log.debug("an upgrade was asked for")
            if self._offered:
                self._feed(self._plain_head() + data[stop.args[0] :])

    def _plain_head(self) -> bytes:
        self._offered = False
        first = b"%b %b HTTP/1.1" % (self.parser.get_method(), self.url)
        kept = (pair for pair in self.headers if pair[0] not in _UPGRADING)
        return b"\r\n".join((first, *map(b": ".join, kept), b"", b""))

    def check_pace(self, now: float, patience: float) -> None:
        """Ends a request that takes too long to come; called now and then."""
        if not self._reading.late(now, patience):
            return
        self._read_waiting()
        busy = self.cycle is not None and not self.cycle.response_complete
        if self._reading.head and not busy and self._reading.got:
            self._refuse(TooSlow())
        elif self._reading.head and not busy:
            self.transport.close()
        elif not self._reading.head and busy:
            cast(Cycle, self.cycle).give_up()

    def on_message_begin(self) -> None:
        """Parser: the first byte of a request."""
        super().on_message_begin()
        self._between = False
        self._reading.begin(self.loop.time())

    def on_message_complete(self) -> None:
        """Parser: the last byte of a request."""
        if self._offered:
            return
        super().on_message_complete()
        self._between = True
        self._reading.since = None
        self._reading.head = False

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's word for: it has ended. Ends the call that runs."""
        if self.running is not None:
            self.running.hand_over()
        self._read_waiting()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        if self.cycle is not None:
            cast(Cycle, self.cycle).gone()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Parser: a header."""
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Parser: the head is whole. Starts the application, or queues it behind a pipelined request's."""
        parser, scope = self.parser, self.scope
        self._offered = (
            parser.should_upgrade() and dict(self.headers).get(b"upgrade", b"websocket").lower() != b"websocket"
        )
        if self._offered:
            return
        self._reading.head = False
        version = parser.get_http_version()
        if version != "1.1":
            scope["http_version"] = version
        scope["method"] = parser.get_method().decode("ascii")
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        scope["path"] = unquote(path) if "%" in path else path
        scope["raw_path"] = url.path
        scope["query_string"] = url.query or b""
        before = self.cycle
        # What follows the head of a refused upgrade has no length: it must not be read as a request.
        alive = version != "1.0" and parser.should_keep_alive() and not parser.should_upgrade()
        self.cycle = cycle = self._cycle(alive)
        cycle.key, self._key = self._key, None
        if before is None or before.response_complete:
            self._start_asgi_task(cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))

    def _cycle(self, keep_alive: bool) -> Cycle:
        cycle = Cycle(
            self.loop,
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=(b"expect", b"100-continue") in self.headers,
            keep_alive=keep_alive,
            on_response=self.on_response_complete,
        )
        cast(Any, self.scope)["extensions"] = {CONNECTION: cycle}
        return cycle

    def _should_upgrade(self) -> bool:
        return False

    def on_response_complete(self) -> None:
        """The answer is out: the next pipelined request, else the wait for one. A connection has one timer; that there
        was use meanwhile, it learns when it goes off."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._wait(self.timeout_keep_alive)

    def _wait(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Closes the connection when nobody has used it for the time set."""
        self.timeout_keep_alive_task = None
        busy = self.running is not None or self._waiting is not None
        if busy or (self.cycle is not None and not self.cycle.response_complete):
            return  # its end sets the timer again
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0.01:
            self._wait(left)
        else:
            self.transport.close()

    def _refuse(self, error: RatchetError) -> None:
        """What came can't be served. Where an answer has begun there is no place for another: the connection ends."""
        cycle = self.cycle
        if not self.pipeline and (cycle is None or cycle.response_complete or not cycle.response_started):
            status, headers, body = errors.reply(error)
            lines = [STATUS_LINE[status][:-2], *map(b": ".join, headers), b"connection: close"]
            self.transport.write(b"\r\n".join([*lines, b"", body]))
        self.transport.close()
