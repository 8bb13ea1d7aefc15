"""An HTTP/1.1 client for the upstream side: requests as bytes, answers as they come, connections kept per origin.

It does what a relay needs and no more: no redirects, cookies, decompression or forward proxies (where the
environment names one, aiohttp does it). Certificates are verified against the system's trust store.
"""

import asyncio
import re
import ssl
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from proxy.dial import dial
from proxy.http1_errors import ClosedEarly, ConnectFailed, ConnectTimeout, InvalidRequest, TlsFailed
from proxy.http1_protocol import Connection
from proxy.http1_response import Header, Response

TLS_SHUTDOWN_SECONDS = 1.0
KNOWN_NAMES = 1024  # names already found valid are remembered, up to so many
OWN_HEADERS = frozenset({b"host", b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"expect"})
BODY_METHODS = frozenset({b"POST", b"PUT", b"PATCH"})

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_PATH = re.compile(rb"[!-~]*")
_PORTS = {"http": 80, "https": 443}


class Origin(NamedTuple):
    """Where connections go: they are kept and shared per origin."""

    host: str
    port: int
    tls: bool


@dataclass(frozen=True, slots=True)
class Target:
    """A base URL, parsed once: the origin, the path in front of every path, the Host line."""

    origin: Origin
    prefix: bytes
    host_line: bytes

    @classmethod
    def parse(cls, base: str) -> "Target":
        """Reads `http(s)://host[:port][/prefix]`. Raises InvalidRequest, also for credentials or a query."""
        try:
            url = urlsplit(base)
            port = _PORTS[url.scheme] if url.port is None else url.port
            host = (url.hostname or "").encode("idna").decode()
            prefix = url.path.rstrip("/").encode("ascii")
        except (KeyError, ValueError):
            raise InvalidRequest(f"not a base URL: {_safe(base)}") from None
        if not host or "@" in url.netloc or url.query or url.fragment or not _PATH.fullmatch(prefix):
            raise InvalidRequest(f"a base URL is http(s)://host[:port][/path] and no more: {_safe(base)}")
        shown = f"[{host}]" if ":" in host else host
        if port != _PORTS[url.scheme]:
            shown = f"{shown}:{port}"
        return cls(Origin(host, port, url.scheme == "https"), prefix, b" HTTP/1.1\r\nhost: %b" % shown.encode())


class Client:
    """A client with its pool; belongs to the event loop it is first used in.

    `connect_timeout`: seconds for name, address and TLS together. `read_timeout`: seconds that an answer may stand
    still; also the whole time for a head once it has begun. `idle_seconds`, `max_idle`: how long and how many unused
    connections are kept per origin. `tls`: the context for https, else the system's with verification.
    `resend`: whether a request that went to a stale connection is sent again unasked.
    Timeouts are looked after by one timer for all connections, so they may fire a quarter (at most 1 s) late.
    """

    def __init__(
        self,
        *,
        connect_timeout: float = 10.0,
        read_timeout: float = 600.0,
        idle_seconds: float = 15.0,
        max_idle: int = 256,
        tls: ssl.SSLContext | None = None,
        resend: bool = True,
    ) -> None:
        self.connect_timeout = connect_timeout
        self.read_timeout = read_timeout
        self.idle_seconds = idle_seconds
        self.max_idle = max_idle
        self.resend = resend
        self._tls = tls
        self._tick = min(1.0, read_timeout / 4, idle_seconds / 4)
        self._idle: defaultdict[Origin, list[Connection]] = defaultdict(list)
        self._live: dict[Connection, Origin] = {}
        self._names: set[bytes] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False
        self._empty: asyncio.Future[None] | None = None

    @property
    def connections(self) -> int:
        """Connections that exist, idle ones included."""
        return len(self._live)

    @property
    def idle(self) -> int:
        """Connections that wait for a request."""
        return sum(map(len, self._idle.values()))

    async def request(
        self,
        method: bytes,
        target: Target,
        path: bytes,
        headers: Sequence[Header],
        body: bytes = b"",
        *,
        fresh: bool = False,
    ) -> Response:
        """Sends one request and returns when the head of its answer is there.

        `path` (with its query) is put behind the target's prefix as it is. `headers` go out in order and case as
        given, after Host; framing headers are the client's own. A request whose kept connection turns out to be
        stale (ended at once, not one byte of an answer) is sent again, once, on a fresh one; `fresh` asks for such a
        connection from the start.
        Raises TransportError. A cancelled caller closes the connection.
        """
        head = self._head(method, target, path, headers, body)
        headless = method == b"HEAD"
        kept = None if fresh else self.ready(target.origin)
        if kept is not None:
            response = kept.send(head, body, headless=headless)
            try:
                await response.head()
                return response
            except ClosedEarly as error:
                if not error.stale or not self.resend:
                    raise
        connection = await self._connect(target.origin)
        response = connection.send(head, body, headless=headless)
        response.retried = kept is not None
        await response.head()
        return response

    async def close(self, grace: float = 0.0) -> None:
        """Takes no more requests, gives running answers `grace` seconds, then closes every connection."""
        self._closed = True
        for connection in tuple(self._live):
            if not connection.busy:
                connection.close()
        if grace > 0:
            await self._emptied(grace)
        for connection in tuple(self._live):
            connection.abort(ClosedEarly("the client was closed"))
        await self._emptied(TLS_SHUTDOWN_SECONDS)
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def ready(self, origin: Origin) -> Connection | None:
        """A kept connection to send on at once; None where one would have to be made."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.open:
                return connection
        return None

    def unused(self, connection: Connection) -> None:
        """Takes back what `ready` gave."""
        self._on_idle(connection)

    def _head(self, method: bytes, target: Target, path: bytes, headers: Sequence[Header], body: bytes) -> bytes:
        lines = self.lines(method, target, path, headers)
        if body or method in BODY_METHODS:
            return b"%b\r\ncontent-length: %d\r\n\r\n" % (lines, len(body))
        return lines + b"\r\n\r\n"

    def lines(self, method: bytes, target: Target, path: bytes, headers: Sequence[Header]) -> bytes:
        """A head but for the body's length and the empty line. Raises InvalidRequest."""
        names = self._names
        if not names.issuperset(dict(headers)):
            for name, _ in headers:
                self._learn(name)
        if method not in names:
            self._learn(method)
        if not _PATH.fullmatch(path):
            raise InvalidRequest("a path is made of visible ASCII characters")
        lines = b"\r\n".join([target.host_line, *map(b": ".join, headers)])
        if lines.count(b"\n") != len(headers) + 1 or lines.count(b"\r") != len(headers) + 1 or b"\0" in lines:
            raise InvalidRequest("a header value holds a line break or a NUL")
        return method + b" " + (target.prefix + path or b"/") + lines

    def _learn(self, name: bytes) -> None:
        if not _TOKEN.fullmatch(name):
            raise InvalidRequest(f"not a header name or method: {name[:40]!r}")
        if name.lower() in OWN_HEADERS:
            raise InvalidRequest(f"the header {name.decode()} is the client's own")
        if len(self._names) < KNOWN_NAMES:
            self._names.add(name)

    async def _connect(self, origin: Origin) -> Connection:
        if self._closed:
            raise ConnectFailed("the client is closed")
        where = f"{origin.host}:{origin.port}"
        try:
            async with asyncio.timeout(self.connect_timeout):
                connection = await self._open(origin, where)
        except TimeoutError:
            raise ConnectTimeout(f"no connection to {where} within {self.connect_timeout:g} s") from None
        if self._closed:
            connection.abort(ClosedEarly("the client was closed"))
            raise ConnectFailed("the client is closed")
        return connection

    async def _open(self, origin: Origin, where: str) -> Connection:
        loop = asyncio.get_running_loop()
        if origin.tls and self._tls is None:
            self._tls = await loop.run_in_executor(None, _verifying)
        try:
            sock = await dial(origin.host, origin.port)
        except OSError as error:
            raise ConnectFailed(f"cannot connect to {where}: {error.strerror or error}") from error
        connection = Connection(loop, self._on_idle, self._on_lost)
        try:
            await loop.create_connection(
                lambda: connection,
                sock=sock,
                ssl=self._tls if origin.tls else None,
                server_hostname=origin.host if origin.tls else None,
                ssl_shutdown_timeout=TLS_SHUTDOWN_SECONDS if origin.tls else None,
            )
        except TimeoutError:
            raise
        except OSError as error:  # the address has answered, so it is the handshake
            raise TlsFailed(f"no TLS connection to {where}: {error}") from error
        finally:
            if not connection.open:
                sock.close()
        if not connection.open:
            raise ConnectFailed(f"{where} ended the connection at once")
        self._live[connection] = origin
        self._watch(loop)
        return connection

    def _on_idle(self, connection: Connection) -> None:
        idle = self._idle[self._live[connection]]
        if self._closed or len(idle) >= self.max_idle:
            connection.close()
        else:
            idle.append(connection)

    def _on_lost(self, connection: Connection) -> None:
        origin = self._live.pop(connection, None)
        idle = self._idle.get(origin) if origin is not None else None
        if idle and connection in idle:
            idle.remove(connection)
        if not self._live and self._empty is not None and not self._empty.done():
            self._empty.set_result(None)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._sweeper is None:
            self._sweeper = loop.call_later(self._tick, self._sweep, loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._sweeper = None
        now = loop.time()
        for connection in tuple(self._live):
            connection.check(now, self.read_timeout, self.idle_seconds)
        if self._live:
            self._watch(loop)

    async def _emptied(self, seconds: float) -> None:
        if self._live:
            self._empty = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._empty], timeout=seconds)
            self._empty = None


def _verifying() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _safe(url: str) -> str:
    return url.rsplit("@", 1)[-1].split("?")[0]
