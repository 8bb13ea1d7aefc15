"""What runs in the collector's place on a host whose collector is elsewhere (`store.collector`).

The same routes on the same socket, so workers know no difference: a request is passed on with this host's key, and is
answered 503 while the collector is away. Calls and rewards don't come this way: workers write them to the journal, and
`shipper.py` sends that.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from yarl import URL

from collector import journal
from collector.errors import Conflict, RatchetError, Unavailable, told
from collector.lock import DirectoryLock, has_store
from collector.settings import Settings, without_credentials
from collector.shipper import Shipper, host_id, refusal

AWAY, REFUSED = "collector_away", "collector_refused"  # codes of what is answered in the collector's place
_FLUSH_SECONDS = 5.0
_DRAIN_SECONDS = 15.0
_HOP = frozenset(("connection", "keep-alive", "te", "trailer", "upgrade", "transfer-encoding", "proxy-connection"))
_NOT_KEPT = _HOP | {"date", "server"}  # said by our own server
_NOT_SENT = _HOP | {"host", "content-length", "authorization"}
_FAILURES = (aiohttp.ClientError, TimeoutError, OSError)

log = logging.getLogger(__name__)


class Outpost:
    """The data directory of such a host, held until `close`. Raises Conflict when it is in use, or holds a store."""

    def __init__(self, settings: Settings) -> None:
        if idle := ignored(settings):
            log.warning("not used here, but in the collector's own configuration: %s", ", ".join(idle))
        store = settings.store
        self.url = store.collector or ""
        self.shown = without_credentials(self.url)
        self.data_dir = store.data_dir
        self.started_ns = time.time_ns()
        self._key = "" if store.collector_key is None else store.collector_key.get_secret_value()
        # Seconds without a byte: longer than any poll or query takes, so that only a collector that hangs gets there.
        self._patience = store.query_timeout + 30
        self._lock = DirectoryLock(self.data_dir)
        try:
            self._refuse_a_store()
            self.journal = self.data_dir / journal.FOLDER
            self.journal.mkdir(mode=0o700, exist_ok=True)
            self.host = host_id(self.data_dir)
        except BaseException:
            self._lock.release()
            raise
        self.app = Starlette(
            routes=[
                Route("/shipper", self._stats),
                Route("/api/identity", self._identity),
                Route("/api/flush", self._flush, methods=["POST"]),
                Route("/api/{path:path}", _Endpoint(self)),
            ],
            exception_handlers={RatchetError: _on_ratchet_error},
            lifespan=self._live,
        )

    def close(self) -> None:
        """Release the directory."""
        self._lock.release()

    def _refuse_a_store(self) -> None:
        if has_store(self.data_dir):
            raise Conflict(
                f"store.collector: {self.data_dir} holds a store of its own; give this host another data directory, "
                "and bring what the store holds over with `ratchet export` and `ratchet import`",
                param="store.collector",
            )

    @contextlib.asynccontextmanager
    async def _live(self, app: Starlette) -> AsyncIterator[None]:
        app.state.closing = asyncio.Event()
        async with aiohttp.ClientSession(
            headers={"authorization": f"Bearer {self._key}"} if self._key else None,
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=self._patience),
        ) as self.session:
            self.shipper = Shipper(self.journal, self.host, self.session, self.url)
            sending = asyncio.create_task(self.shipper.run())
            yield
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await self.shipper.drain(_DRAIN_SECONDS)

    async def _stats(self, _request: Request) -> Response:
        return _json({"collector": self.shown, "host": self.host, **await self.shipper.stats()})

    async def _identity(self, _request: Request) -> Response:
        """Of this host: commands find by it the server that has a data directory open."""
        about = {"data_dir": str(self.data_dir.resolve()), "started_ns": self.started_ns, "collector": self.shown}
        return _json({**about, "host": self.host})

    async def _flush(self, _request: Request) -> Response:
        """Sends what was written before, then has the collector load it."""
        left = await self.shipper.flush(_FLUSH_SECONDS)
        async with self.ask("POST", "/api/flush", b"", {}) as response:
            body = await response.read()
        if response.status != 200:
            return Response(body, response.status, media_type="application/json")
        found = orjson.loads(body)
        return _json({**found, "pending": found["pending"] + left})

    @contextlib.asynccontextmanager
    async def ask(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The collector's answer. Raises Unavailable where there is none, or where it refuses this host."""
        try:
            async with self.session.request(
                method, URL(self.url + path, encoded=True), data=body or None, headers=headers, allow_redirects=False
            ) as response:
                if response.status in (401, 403):
                    message, _ = told(await response.read())
                    raise Unavailable(refusal(message), code=REFUSED)
                yield response
        except _FAILURES as error:
            raise Unavailable(
                f"the collector at {self.shown} does not answer; calls and rewards are still taken here, this request "
                f"was not: try again ({type(error).__name__})",
                code=AWAY,
            ) from error


class _Endpoint:
    """An ASGI application that passes a request on, and its answer back as it comes."""

    def __init__(self, outpost: Outpost) -> None:
        self._outpost = outpost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; given up when its client leaves or the host ends."""
        request = Request(scope, receive)
        body = await request.body()
        passing = asyncio.create_task(self._pass(request, body, send))
        ends = {asyncio.create_task(_gone(receive)), asyncio.create_task(request.app.state.closing.wait())}
        try:
            await asyncio.wait({passing, *ends}, return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                passing.result()
        finally:
            for task in (passing, *ends):
                task.cancel()
            await asyncio.gather(passing, *ends, return_exceptions=True)

    async def _pass(self, request: Request, body: bytes, send: Send) -> None:
        raw = request.scope["raw_path"].decode("latin-1")
        query = request.scope["query_string"].decode("latin-1")
        headers = {name: value for name, value in request.headers.items() if name not in _NOT_SENT}
        path, begun = f"{raw}?{query}" if query else raw, False
        try:
            async with self._outpost.ask(request.method, path, body, headers) as response:
                kept = [(name.lower(), value) for name, value in response.raw_headers]
                kept = [(name, value) for name, value in kept if name.decode() not in _NOT_KEPT]
                begun = True
                await send({"type": "http.response.start", "status": response.status, "headers": kept})
                async for chunk in response.content.iter_any():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except Unavailable:
            if not begun:
                raise
            # Returning in the middle makes the server close the connection: nobody takes a part for the whole.
            log.warning("the collector broke off its answer to %s", raw)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def ignored(settings: Settings) -> list[str]:
    """The sections that this host's file sets though only the collector acts on them."""
    default = Settings()
    return [
        name for name in ("slots", "rewards", "gate", "export") if getattr(settings, name) != getattr(default, name)
    ]


def _json(value: Any, status: int = 200) -> Response:
    headers = {"retry-after": "1"} if status == 503 else None
    return Response(orjson.dumps(value), status, headers, media_type="application/json")


async def _on_ratchet_error(_request: Request, error: Exception) -> Response:
    if not isinstance(error, RatchetError):
        raise error
    return _json(error.envelope(), error.status)
