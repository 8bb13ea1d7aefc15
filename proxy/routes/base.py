"""What the cold routes share: what they work with, who may call them, and errors in OpenAI's envelope."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from collector.errors import RatchetError
from collector.journal import Journal
from collector.settings import Settings
from proxy.auth import Guard
from proxy.errors import reply
from proxy.link import Link
from proxy.upstream import Upstream
from proxy.versions import Versions


class WrongMethod(RatchetError):
    """405: the path is known, the method is not."""

    status = 405
    code = "method_not_allowed"


@dataclass
class Context:
    """What a worker's cold routes work with. `draining`: no new calls are taken, running ones end."""

    settings: Settings
    journal: Journal
    versions: Versions
    upstream: Upstream
    link: Link
    guard: Guard
    runtime: Path  # what the processes of this server share: counters
    index: int = 0  # of this worker
    draining: bool = False

    @property
    def body_limit(self) -> int:
        """Bytes that a body may have."""
        return int(self.settings.server.max_body_mb * (1 << 20))


Handler = Callable[[Context, Request], Awaitable[Response]]
Endpoint = Callable[[Request], Awaitable[Response]]


def guarded(context: Context, scope: str, handler: Handler) -> Endpoint:
    """The handler as an endpoint that answers only to a key with `scope`, where keys are configured."""

    async def endpoint(request: Request) -> Response:
        context.guard.authorise(headers_of(request.scope), scope)
        return await handler(context, request)

    return endpoint


def headers_of(scope: Any) -> dict[bytes, bytes]:
    """The headers by name; of repeated ones the last."""
    return dict(scope["headers"])


def json_response(value: Any, status: int = 200) -> Response:
    """`value` as JSON."""
    return Response(orjson.dumps(value), status, media_type="application/json")


def error_response(error: RatchetError) -> Response:
    """The error in OpenAI's envelope."""
    status, headers, body = reply(error)
    response = Response(body, status)
    response.raw_headers = headers
    return response
