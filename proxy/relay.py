"""One call from end to end: who and what, the upstream's answer, and one span, whatever happens."""

import asyncio
import logging
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

from collector.errors import RatchetError
from proxy import attempts, capture, depth, errors, limits, metrics, translate
from proxy.answer import Answer, judge
from proxy.auth import Guard
from proxy.cache import Cache, Keeper, Kept, key_of
from proxy.client import LENGTH, Client
from proxy.errors import Broken, ClientGone, Header, UpstreamTimeout
from proxy.hangup import HangUp
from proxy.http1_response import Response
from proxy.identity import identify
from proxy.joining import RETRIES, Running, is_retry
from proxy.options import Options
from proxy.packing import unpack
from proxy.prepare import Body, Prompts, aim, read_answer, with_usage
from proxy.record import Call, Recorder
from proxy.streaming import Streaming
from proxy.table import Table
from proxy.upstream import Request, Upstream, headers_for

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Begun:
    """A call that Quick began and leaves to the Relay. `streaming`: its head, and some of its events, are out. `bug`:
    what it ends with."""

    client: Client
    call: Call
    request: Request
    response: Response
    streaming: Streaming | None = None
    bug: Exception | None = None


class Relay:
    """Serves recorded calls. Every call that gets here leaves exactly one span, whatever happens to it."""

    def __init__(
        self,
        upstream: Upstream,
        prompts: Prompts,
        recorder: Recorder,
        table: Table,
        guard: Guard,
        body_limit: int,
        options: Options,
    ) -> None:
        self._options = options
        self._upstream = upstream
        self._prompts = prompts
        self._recorder = recorder
        self._table = table
        self._guard = guard
        self._limit = body_limit
        self.calls = limits.Calls()
        metrics.INFLIGHT.set_function(lambda: self.calls.running)

    async def serve(self, scope: Any, receive: Any, send: Any, call: Call) -> None:
        """From the request's body to the span. The recorder writes a call once, so the `finally` catches all that ended
        before its regular moment of writing: just ahead of the answer's last byte."""
        client = Client(send, call, self._recorder)
        await self._ended(self._counted(scope, receive, client, call), receive, client, call)

    async def go_on(self, begun: Begun, scope: Any, receive: Any, _send: Any) -> None:
        """From where Quick left a call to the span."""
        await self._ended(self._rest(scope, begun), receive, begun.client, begun.call)

    async def _ended(self, work: Awaitable[None], receive: Any, client: Client, call: Call) -> None:
        """The work, and whatever end it comes to."""
        try:
            await work
        except ClientGone:
            call.end("cancelled")
        except asyncio.CancelledError:
            call.end("cancelled", "shutdown")
            raise
        except Broken as broken:
            # Returning without a last body message makes the server close the connection: an unclean end, as upstream.
            call.end("error", broken.error.code)
        except RatchetError as error:
            await _refuse(receive, client, call, error)
        except Exception:  # boundary: a bug of ours must end as an answer and a span
            log.exception("the call %s failed", call.span_id)
            await _refuse(receive, client, call, RatchetError("an internal error of the proxy; its log says more"))
        finally:
            self._recorder.write(call)
            if client.running is not None:
                self._options.joining.remove(client.running)
            if call.metered:
                self._options.settle(call)

    async def _counted(self, scope: Any, receive: Any, client: Client, call: Call) -> None:
        with self.calls:
            await self._relay(scope, receive, client, call)

    async def _rest(self, scope: Any, begun: Begun) -> None:
        """Its request is out, and it is counted already."""
        call, client = begun.call, begun.client
        try:
            with HangUp(scope, client.running) as hang_up:
                if begun.bug is not None:
                    raise begun.bug
                if begun.streaming is not None:
                    await begun.streaming.follow(hang_up)
                else:
                    await self._asked(hang_up, client, call, begun.request)
        finally:
            self.calls.running -= 1
            begun.response.abort()

    async def _relay(self, scope: Any, receive: Any, client: Client, call: Call) -> None:
        given: list[Header] = scope["headers"]
        headers = dict(given)
        raw = await limits.read_body(receive, headers.get(LENGTH), self._limit)
        call.request_bytes = len(raw)
        joined = self._options.joining.find(call, raw) if is_retry(headers) else None
        if joined is not None:
            await _join(scope, client, call, joined)
            return
        client.running = self._options.joining.add(call, raw, client, awaited=RETRIES in headers)
        with HangUp(scope, client.running) as hang_up:
            request = await self._prepare(scope, given, headers, raw, call)
            if call.limits is not None:
                self._options.admit(call)
            if self._options.cache is not None:
                await self._cached(self._options.cache, hang_up, client, call, request)
            elif self._options.total is None:
                await self._exchange(hang_up, client, call, request)
            else:
                await self._in_time(self._options.total, hang_up, client, call, request)

    async def _exchange(self, hang_up: HangUp, client: Client, call: Call, request: Request) -> None:
        changed = with_usage(call, request.body)
        if changed is not None:
            request.body, request.stripping = changed, True
        await self._asked(hang_up, client, call, request)

    async def _asked(self, hang_up: HangUp, client: Client, call: Call, request: Request) -> None:
        answer = await self._send(request, call)
        try:
            await _answer(hang_up, client, call, answer, request.stripping)
        finally:
            answer.close()

    async def _in_time(
        self, seconds: float | None, hang_up: HangUp, client: Client, call: Call, request: Request
    ) -> None:
        """The same, within the time that a whole call may take."""
        try:
            async with asyncio.timeout(seconds):
                await self._exchange(hang_up, client, call, request)
        except TimeoutError as error:
            late = UpstreamTimeout("the call took too long (upstream.total_timeout)")
            raise (Broken(late) if client.started else late) from error

    async def _cached(self, kept: Cache, hang_up: HangUp, client: Client, call: Call, request: Request) -> None:
        """From the cache where it has the answer, else from the upstream and into the cache."""
        key = key_of(call, request)
        found = kept.get(key) if key is not None else None
        if found is not None:
            await _replay(hang_up, client, call, found)
            return
        keeper = Keeper(kept, key, client.send) if key is not None else None
        if keeper is not None:
            client.send = keeper.send
        await self._in_time(self._options.total, hang_up, client, call, request)
        if keeper is not None:
            keeper.keep(call)

    async def _prepare(
        self, scope: Any, given: list[Header], headers: dict[bytes, bytes], raw: bytes, call: Call
    ) -> Request:
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
        plain = unpack(raw, encoding, self._limit) if encoding not in ("identity", "") else None
        body = Body(raw if plain is None else plain)
        depth.check(body.raw, body.parsed)
        if body.parsed is not None:
            call.body = body.parsed
            call.reading = call.dialect.read(body.parsed)
            call.stream = call.reading.stream
        find_episode(call, self._table)
        await self._prompts.apply(call, body, _text(headers.get(b"x-ratchet-slot")))
        target = self._upstream.route(_service(call), call.reading.model)
        aim(call, body, target.provider, target.model)
        keyed, unpacked = self._guard.keyed, plain is not None
        sent = headers_for(target, given, keyed=keyed, unpacked=unpacked)
        query = scope.get("query_string", b"").decode("latin-1")
        request = Request(target, scope["method"], call.route.tail, query, sent, body.raw)
        if self._upstream.shared(_service(call), call.reading.model):
            request.once, request.service = True, _service(call)
            request.given, request.keyed, request.unpacked = given, keyed, unpacked
        return request

    async def _send(self, request: Request, call: Call) -> Answer:
        try:
            if request.once:
                return await attempts.send(self._upstream, request, call, self._attempt)
            return await self._attempt(request, call)
        finally:
            call.attempts = request.attempts

    async def _attempt(self, request: Request, call: Call) -> Answer:
        trained = request.target.train or bool(self._options.trained)
        if trained and call.body is not None and capture.wanted(call, request.target, self._options.trained):
            request.body, call.hidden = capture.ask(request.body, call.body, call.dialect.operation)
        if request.target.params is not None:
            return await translate.send(request, call.dialect.operation)
        return await self._upstream.send(request)


async def _join(scope: Any, client: Client, call: Call, joined: Running) -> None:
    """The answer of the call that this retry repeats. That call's span is the record of both."""
    call.written = True
    metrics.JOINED.inc()
    with HangUp(scope):
        await joined.follow(client.send)


async def _replay(hang_up: HangUp, client: Client, call: Call, kept: Kept) -> None:
    """An answer that was kept, as it was then."""
    hang_up.release()
    metrics.CACHED.inc()
    call.cached, call.attempts, call.cost_usd = True, 0, 0.0
    call.summary, call.stream = kept.summary, kept.stream
    call.first_byte()
    call.end("ok")
    if kept.stream:
        await client.start(kept.status, kept.headers)
        await client.last(kept.body)
    else:
        await client.whole(kept.status, kept.headers, kept.body)


async def _refuse(receive: Any, client: Client, call: Call, error: RatchetError) -> None:
    """Our own answer in place of the upstream's, unless a part of that is out already."""
    call.end("error", error.code)
    if client.started:
        return
    lingers = isinstance(error, errors.TooLarge) and error.unread
    await client.whole(*errors.reply(error), more=lingers)
    if lingers:
        await limits.drain(receive)
        await client.last(b"")


async def _answer(hang_up: HangUp, client: Client, call: Call, answer: Answer, stripping: bool) -> None:
    if answer.stream:
        call.stream = True
        await Streaming(client, call, answer, stripping).run(hang_up)
    elif call.dialect.operation == "other":
        await _pass_through(hang_up, client, call, answer)
    else:
        await _whole(hang_up, client, call, answer)


async def _whole(hang_up: HangUp, client: Client, call: Call, answer: Answer) -> None:
    """An answer that is read and recorded; one too long for that is passed on as it comes."""
    body, more = await _read(answer, call.copy_limit)
    if more:
        call.truncated = True
        await _pass_through(hang_up, client, call, answer, body)
        return
    hang_up.release()
    call.first_byte()
    call.cost_usd = answer.cost_usd
    copy = answer.decoded(body)
    read_answer(call, copy, answer.status)
    if call.hidden is not None and copy is not None and answer.encoding in ("identity", ""):
        body = capture.hide(body, call.hidden)
    await client.whole(answer.status, answer.headers, body)


async def _read(answer: Answer, limit: int) -> tuple[bytes, bool]:
    """The whole body, or what there was of it when it got longer than `limit`, and whether more follows."""
    if answer.length is not None and answer.length <= limit:
        return await answer.read(), False
    parts: list[bytes] = []
    size = 0
    async for chunk in answer.chunks():
        parts.append(chunk)
        size += len(chunk)
        if size > limit:
            return b"".join(parts), True
    return b"".join(parts), False


async def _pass_through(hang_up: HangUp, client: Client, call: Call, answer: Answer, held: bytes = b"") -> None:
    """Bodies of any kind and size: forwarded as they come, one piece behind, so that the last one leaves after the
    record was written."""
    await client.start(answer.status, answer.headers)
    try:
        async for chunk in answer.chunks():
            call.first_byte()
            if held:
                await client.body(held)
            held = chunk
    except RatchetError as error:
        raise Broken(error) from error
    hang_up.release()
    judge(call, answer.status)
    await client.last(held)


def find_episode(call: Call, table: Table) -> None:
    """By all that the call says. Raises BadRequest."""
    route, body = call.route, call.body or {}
    call.identity = identify(route.episode, call.named, call.trace, body, call.reading, table, call.tenant)


def _service(call: Call) -> str:
    """Anthropic's other paths, such as messages/count_tokens, go where its messages go."""
    return "anthropic" if call.route.tail.startswith("messages/") else call.dialect.service


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1").strip()
