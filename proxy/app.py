"""The ASGI application: recorded calls are relayed before any framework is touched; everything else is for `cold`."""

from typing import Any
from urllib.parse import unquote

from collector.errors import RatchetError
from collector.journal import Journal
from collector.prices import Prices
from collector.privacy import Policy
from collector.settings import Settings
from proxy import errors, limits
from proxy.auth import Guard
from proxy.dialects.base import Dialect
from proxy.errors import BadRequest
from proxy.identity import read_traceparent
from proxy.options import Options
from proxy.paths import Route, parse
from proxy.prepare import Prompts
from proxy.quick import Quick
from proxy.rates import Meter
from proxy.record import Call, Recorder
from proxy.relay import Relay
from proxy.server import CONNECTION, Cycle
from proxy.table import Table
from proxy.upstream import Upstream
from proxy.versions import Versions


class App:
    """What a worker serves. `cold` is an ASGI application for the routes that aren't relayed, and gets the lifespan."""

    def __init__(
        self,
        settings: Settings,
        journal: Journal,
        versions: Versions,
        upstream: Upstream,
        table: Table,
        cold: Any,
        meter: Meter | None = None,
        prices: Prices | None = None,
    ) -> None:
        self._guard = Guard(settings.server, versions)
        self._cold = cold
        self._copy_limit = int(settings.store.max_answer_mb * (1 << 20))
        prompts, options = Prompts(versions, table), Options.of(settings, meter)
        body_limit = int(settings.server.max_body_mb * (1 << 20))
        redaction = settings.store.redaction
        recorder = Recorder(journal, table, redaction.emails, prices, Policy.of(redaction))
        self._relay = Relay(upstream, prompts, recorder, table, self._guard, body_limit, options)
        self.quick = Quick(
            upstream,
            prompts,
            recorder,
            table,
            self._guard,
            versions,
            self._relay,
            options,
            self._copy_limit,
            body_limit,
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request. A refusal here, before a call is known to be allowed, leaves no span."""
        if scope["type"] == "websocket":
            await _refuse_websocket(scope, receive, send)
            return
        if scope["type"] != "http":
            await self._cold(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            limits.check_headers(scope["headers"])
            self._guard.check_host(headers)
            route = parse(scope["method"], _raw_path(scope))
            if headers.get(b"upgrade", b"").lower() == b"websocket":
                raise _no_websocket()
            if route.dialect is None:
                await self._cold(_unscoped(scope, route), receive, send)
                return
            tenant = self._guard.authorise(headers, "agent")
        except RatchetError as error:
            await errors.respond(send, error)
            return
        call = begin(route, route.dialect, headers, tenant or "")
        call.copy_limit = self._copy_limit
        call.limits = self._guard.limits(tenant)
        connection: Cycle | None = scope.get("extensions", {}).get(CONNECTION)
        if connection is not None:
            self.quick.learn(connection.key, scope, headers, call)
        await self._relay.serve(scope, receive, send, call)


def begin(route: Route, dialect: Dialect, headers: dict[bytes, bytes], tenant: str) -> Call:
    """A call at its very start."""
    trace = read_traceparent(_text(headers.get(b"traceparent")))
    return Call(route, dialect, trace, _text(headers.get(b"x-ratchet-episode")), tenant)


def _unscoped(scope: Any, route: Route) -> Any:
    """The same request under the path it has without its scope."""
    if route.path == _raw_path(scope):
        return scope
    return {**scope, "path": unquote(route.path), "raw_path": route.path.encode("latin-1")}


def _raw_path(scope: Any) -> str:
    raw: bytes | None = scope.get("raw_path")
    return raw.decode("latin-1") if raw else scope["path"]


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1").strip()


def _no_websocket() -> BadRequest:
    return BadRequest("websockets aren't relayed; use HTTP with server-sent events", code="websocket_unsupported")


async def _refuse_websocket(scope: Any, receive: Any, send: Any) -> None:
    """A refusal with a body where the server can send one, else a plain 403."""
    await receive()
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008})
        return
    status, headers, body = errors.reply(_no_websocket())
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})
