"""`/api/*`: authorised here, answered by the collector; bytes are passed on as they are."""

import logging
from typing import Any

import aiohttp
from starlette.types import Receive, Scope, Send
from yarl import URL

from proxy import limits
from proxy.errors import ClientGone
from proxy.hangup import HangUp
from proxy.link import BASE, FAILURES, down
from proxy.routes.base import Context, headers_of

log = logging.getLogger(__name__)

_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer", b"upgrade")
) | {b"transfer-encoding"}
# Keys stay here: the collector knows none, its socket is private to this server's user.
_NOT_SENT = _HOP | {b"host", b"content-length", b"expect", b"cookie", b"authorization", b"x-api-key"}


class Forward:
    """An ASGI application for one path of the collector."""

    def __init__(self, context: Context) -> None:
        self._context = context
        # Seconds without a byte: longer than any poll or query takes, so that only a collector that hangs gets there.
        self._patience = context.settings.store.query_timeout + 30

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward one request. Raises Unavailable while the collector is down, before anything was answered."""
        headers = headers_of(scope)
        self._context.guard.authorise(headers, "admin")
        body = await limits.read_body(receive, headers.get(b"content-length"), self._context.body_limit)
        if scope["path"].endswith("/api/flush"):
            self._context.journal.seal()  # what is asked for is mostly here: no need to wait until it is due
        try:
            with HangUp(scope):
                await self._forward(scope, body, send)
        except ClientGone:
            return

    async def _forward(self, scope: Scope, body: bytes, send: Send) -> None:
        begun = False
        try:
            async with self._request(scope, body) as response:
                kept = [(name.lower(), value) for name, value in response.raw_headers if name.lower() not in _HOP]
                begun = True
                await send({"type": "http.response.start", "status": response.status, "headers": kept})
                async for chunk in response.content.iter_any():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except FAILURES as error:
            if not begun:
                raise down(error) from error
            # Returning in the middle makes the server close the connection, so that nobody takes a part for the whole.
            log.warning("the collector broke off its answer to %s: %s", scope["path"], type(error).__name__)

    def _request(self, scope: Scope, body: bytes) -> Any:
        path: str = scope["raw_path"].decode("latin-1")
        query: str = scope["query_string"].decode("latin-1")
        sent = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in scope["headers"]
            if name not in _NOT_SENT
        ]
        return self._context.link.session.request(
            scope["method"],
            URL(f"{BASE}{path}?{query}" if query else BASE + path, encoded=True),
            data=body or None,
            headers=sent,
            allow_redirects=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=self._patience),
        )
