"""What the collector's socket leads to: the registry's poll at once, the API once it is made.

FastAPI is a third of what a start imports, and the workers that wait for the first snapshot need none of it.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from urllib.parse import parse_qsl

import orjson
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from collector import polling
from collector.service import Collector

_LATER = 3.0  # seconds after the start at which the API is made, if nobody has asked for it by then
_ASKED = re.compile(rb"(?:(?:after|serial)=\d{1,18}|timeout=[1-5]?\d(?:\.\d{1,3})?)(?:&|$)")


def create(collector: Collector) -> Starlette:
    """The application. `app.state.closing` (asyncio.Event) ends waiting polls when it is set."""
    app = Starlette(lifespan=_lifespan)
    app.state.front = Front(collector, app)
    app.router.default = app.state.front
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    app.state.closing = asyncio.Event()
    timer = asyncio.get_running_loop().call_later(_LATER, app.state.front.make)
    yield
    timer.cancel()


class Front:
    """Takes the calls of `app`."""

    def __init__(self, collector: Collector, app: Starlette) -> None:
        self._collector = collector
        self._state = app.state
        self._made: asyncio.Task[ASGIApp] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the plainest form of the poll, hand all else on."""
        if scope["method"] == "GET" and scope["path"] == "/api/deployments" and self._made is None:
            query = scope["query_string"]
            if not _ASKED.sub(b"", query):
                await self._poll(dict(parse_qsl(query.decode())), scope, receive, send)
                return
        api = await asyncio.shield(self.make())
        await api(scope, receive, send)

    def make(self) -> "asyncio.Task[ASGIApp]":
        """The API, being made in a thread from the first call on."""
        if self._made is None:
            self._made = asyncio.create_task(asyncio.to_thread(self._create))
        return self._made

    def _create(self) -> ASGIApp:
        from collector import api

        made = api.create(self._collector)
        made.state.closing = self._state.closing
        return made

    async def _poll(self, asked: dict[str, str], scope: Scope, receive: Receive, send: Send) -> None:
        after, serial = (int(asked[name]) if name in asked else None for name in ("after", "serial"))
        seconds = float(asked.get("timeout", polling.MAX_SECONDS))
        snapshot = await polling.poll(self._collector, self._state.closing, after, serial, seconds)
        await Response(orjson.dumps(snapshot), media_type="application/json")(scope, receive, send)
