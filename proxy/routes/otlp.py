"""`POST /v1/traces` and `/v1/logs`: spans and evaluations of self-instrumented agents, journalled by the worker.

Answered only once on disk. One thread decodes, so that calls under way hardly notice; what waits for it is bounded in
bytes, and over that the answer is 503 with Retry-After, which OpenTelemetry's exporters obey.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from collector import otlp
from collector.errors import RatchetError, Unavailable
from collector.intake import Rights, Taken, take
from proxy import limits, metrics
from proxy.errors import BadRequest, Forbidden
from proxy.packing import unpack
from proxy.routes.base import Context, Endpoint, headers_of

MAX_WAITING_BYTES = 64 << 20


class Intake:
    """The receiver of one worker."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, "otlp")

    def endpoint(self, signal: otlp.Signal) -> Endpoint:
        """The route of one signal."""

        async def serve(request: Request) -> Response:
            return await self._serve(request, signal)

        return serve

    async def _serve(self, request: Request, signal: otlp.Signal) -> Response:
        headers = headers_of(request.scope)
        rights = self._rights(headers, signal)
        kind = otlp.PROTOBUF
        try:
            kind = otlp.media_type(_text(headers, b"content-type"))
            body = await self._body(request, headers)
            taken = await self._take(body, kind, signal, rights)
        except RatchetError as error:
            return _failed(kind, error)
        metrics.count_otlp(signal, taken.spans, taken.rewards, taken.rejected, taken.ignored)
        return Response(otlp.answer(kind, signal, taken.rejected, taken.message), media_type=kind)

    def _rights(self, headers: dict[bytes, bytes], signal: otlp.Signal) -> Rights:
        """A key with `agent` writes spans, one with `reward` evaluations. Raises for one that may do neither."""
        found = Rights(self._may(headers, "agent"), self._may(headers, "reward"))
        if not found.spans and (signal == "traces" or not found.rewards):
            self._context.guard.authorise(headers, "agent")
        return found

    def _may(self, headers: dict[bytes, bytes], scope: str) -> bool:
        try:
            self._context.guard.authorise(headers, scope)
        except Forbidden:
            return False
        return True

    async def _body(self, request: Request, headers: dict[bytes, bytes]) -> bytes:
        most = self._context.body_limit
        body = await limits.read_body(request.receive, headers.get(b"content-length"), most)
        encoding = _text(headers, b"content-encoding").lower()
        if encoding in ("", "identity"):
            return body
        whole = unpack(body, encoding, most)
        if whole is None:
            raise BadRequest(f"content-encoding: {encoding[:40]} isn't known here; use gzip", param="content-encoding")
        return whole

    async def _take(self, body: bytes, kind: str, signal: otlp.Signal, rights: Rights) -> Taken:
        if self._waiting and self._waiting + len(body) > MAX_WAITING_BYTES:
            raise Unavailable("too much telemetry at once; try again in a second", code="overloaded")
        self._waiting += len(body)
        store = partial(take, rules=self._context.settings.store.redaction)
        work = asyncio.get_running_loop().run_in_executor(
            self._thread, store, self._context.journal, body, kind, signal, rights
        )
        work.add_done_callback(lambda _: self._done(len(body)))
        return await asyncio.shield(work)  # who leaves does not stop what is being written

    def _done(self, size: int) -> None:
        self._waiting -= size


def _text(headers: dict[bytes, bytes], name: bytes) -> str:
    return headers.get(name, b"").decode("latin-1").strip()


def _failed(kind: str, error: RatchetError) -> Response:
    """The official body of a failure. Senders try again after a 503, and after nothing else."""
    retry = error.status == 503
    body = otlp.failure(kind, error.message, error.envelope(), retry=retry)
    return Response(body, error.status, {"retry-after": "1"} if retry else None, media_type=kind)
