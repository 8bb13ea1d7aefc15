"""One call from end to end: forwards bytes as they come, keeps a copy, and records before the last byte leaves."""

import asyncio
import logging
import re
from types import TracebackType
from typing import Any, Protocol, Self

import orjson

from collector.errors import RatchetError
from proxy import attempts, capture, depth, errors, inject, limits, metrics, sse, translate
from proxy.auth import Guard
from proxy.cache import Cache, Keeper, Kept, key_of
from proxy.dialects.base import Dialect, Summary
from proxy.errors import Broken, ClientGone, Header, UpstreamTimeout
from proxy.identity import identify
from proxy.joining import RETRIES, Running, is_retry
from proxy.options import Options
from proxy.packing import unpack
from proxy.prepare import Body, Prompts, parse
from proxy.record import Call, Recorder
from proxy.server import CONNECTION, Cycle
from proxy.table import Table
from proxy.upstream import Request, Upstream, headers_for

log = logging.getLogger(__name__)
_LENGTH = b"content-length"
GRACE = 0.7  # seconds that a call goes on for an SDK which hung up, because SDKs try again after half a second
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')  # in a chunk that tells nothing but the usage


class Answer(Protocol):
    """An upstream's answer, relayed raw or translated."""

    status: int
    headers: list[Header]
    stream: bool
    encoding: str
    length: int | None
    complete: bool
    cost_usd: float | None

    async def read(self) -> bytes:
        """The whole body."""

    def chunks(self) -> Any:
        """The body as it arrives (an async iterator of bytes)."""

    def decoded(self, body: bytes) -> bytes | None:
        """A readable copy."""

    def close(self) -> None:
        """Lets go of it, finished or not."""


class HangUp:
    """While it is entered, a client that goes away cancels the block, which then ends in ClientGone.

    The server's Protocol tells; under another ASGI server nobody is noticed to leave before something is sent.
    """

    def __init__(self, scope: Any, running: Running | None = None) -> None:
        """`running`: goes on for others who joined it, until they have left too."""
        self._running = running
        self._connection: Cycle | None = scope.get("extensions", {}).get(CONNECTION)
        self._gone = self._released = False

    def __enter__(self) -> Self:
        self._block = asyncio.current_task()
        if self._connection is not None:
            self._connection.on_gone = self._leave
            if self._connection.disconnected:
                self._leave()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        if self._gone and self._block is not None:
            self._block.uncancel()
            raise ClientGone from None

    def release(self) -> None:
        """Stops watching: from here on the answer is written, whether somebody hears it or not."""
        self._released = True
        if self._connection is not None:
            self._connection.on_gone = None
        if self._running is not None:
            self._running.cancel = None

    def _leave(self) -> None:
        """Ends the call, or leaves it to those who joined it; a retry that is to be expected has a moment to do so."""
        running = self._running
        if running is None or not (running.leave() or running.awaited):
            self._cancel()
            return
        running.cancel = self._cancel
        if not running.joined:
            asyncio.get_running_loop().call_later(GRACE, self._give_up)

    def _give_up(self) -> None:
        if not self._released and self._running is not None and not self._running.joined:
            self._cancel()

    def _cancel(self) -> None:
        if self._running is not None:
            self._running.over = True
        self._gone = True
        if self._block is not None:
            self._block.cancel()


class Client:
    """The client's side of one call. What ends an answer is sent after the call was recorded."""

    def __init__(self, send: Any, call: Call, recorder: Recorder) -> None:
        self.send = send
        self._call = call
        self._recorder = recorder
        self.started = False
        self.running: Running | None = None

    async def start(self, status: int, headers: list[Header]) -> None:
        """The head of the answer; the call's own headers are added."""
        self.started = True
        self._call.http_status = status
        await self.send({"type": "http.response.start", "status": status, "headers": headers + self._call.headers()})

    async def body(self, chunk: bytes) -> None:
        """A piece of the body that more follows."""
        self._call.response_bytes += len(chunk)
        await self.send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def last(self, chunk: bytes, more: bool = False) -> None:
        """The piece with which the answer is complete for a client; records first. `more`: the connection isn't."""
        self._call.response_bytes += len(chunk)
        self._recorder.write(self._call)
        await self.send({"type": "http.response.body", "body": chunk, "more_body": more})

    async def whole(self, status: int, headers: list[Header], body: bytes, more: bool = False) -> None:
        """A whole answer; records first."""
        self._call.http_status, self._call.response_bytes = status, len(body)
        self._recorder.write(self._call)
        length = (_LENGTH, b"%d" % len(body))
        await self.start(status, headers if length in headers else [*_without_length(headers), length])
        await self.send({"type": "http.response.body", "body": body, "more_body": more})


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
        self._calls = limits.Calls()
        metrics.INFLIGHT.set_function(lambda: self._calls.running)

    async def serve(self, scope: Any, receive: Any, send: Any, call: Call) -> None:
        """From the request's body to the span. The recorder writes a call once, so the `finally` catches all that ended
        before its regular moment of writing: just ahead of the answer's last byte."""
        client = Client(send, call, self._recorder)
        try:
            with self._calls:
                await self._relay(scope, receive, client, call)
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

    async def _relay(self, scope: Any, receive: Any, client: Client, call: Call) -> None:
        given: list[Header] = scope["headers"]
        headers = dict(given)
        raw = await limits.read_body(receive, headers.get(_LENGTH), self._limit)
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
        stripping = call.dialect.usage_option and call.reading.stream and _add_usage(call, request)
        answer = await self._send(request, call)
        try:
            await _answer(hang_up, client, call, answer, stripping)
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
        call.identity = identify(
            call.route.episode, call.named, call.trace, body.parsed or {}, call.reading, self._table, call.tenant
        )
        await self._prompts.apply(call, body, _text(headers.get(b"x-ratchet-slot")))
        target = self._upstream.route(_service(call), call.reading.model)
        call.provider = target.provider
        model = call.upstream_model = call.adapter.served if call.adapter else target.model
        if model is not None and body.parsed is not None:
            body.raw = inject.replace(body.raw, body.parsed, ("model",), model)
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
    reply = parse(copy) if copy else None
    if reply is not None:
        call.summary = call.dialect.summarise(reply)
    _judge(call, answer.status)
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
    _judge(call, answer.status)
    await client.last(held)


class Streaming:
    """Relays one event stream. Whole events are forwarded as they come; the one that a client may take for the end is
    held back until the record is written."""

    def __init__(self, client: Client, call: Call, answer: Answer, stripping: bool) -> None:
        self._client = client
        self._call = call
        self._answer = answer
        self._plain = answer.encoding in ("identity", "")
        self._stripping = stripping and self._plain
        self._splitter = sse.Splitter()
        self._copy: list[bytes] = []
        self._copied = 0
        self._ends = False

    async def run(self, hang_up: HangUp) -> None:
        """Until the upstream's end. Raises ClientGone, or Broken when the upstream breaks off."""
        shorter = self._stripping or self._call.hidden is not None
        headers = _without_length(self._answer.headers) if shorter else self._answer.headers
        await self._client.start(self._answer.status, headers)
        try:
            async for chunk in self._answer.chunks():
                self._call.first_byte()
                run = self._take(chunk)
                if not self._ends:
                    if run:
                        await self._client.body(run)
                    continue
                self._ends = False
                self._sum_up()
                if self._answer.complete:
                    hang_up.release()
                    await self._client.last(run + self._rest)
                    return
                await self._client.last(run, more=True)
        except RatchetError as error:  # the head is out, so this can't become an error answer any more
            if not self._call.written:  # else the end had been told already, and nothing is missing
                await self._client.body(self._rest)
                raise Broken(error) from error
        finally:
            self._sum_up()
        hang_up.release()
        await self._client.last(self._rest)

    @property
    def _rest(self) -> bytes:
        """What is left of an event that was never ended."""
        rest, hidden = self._splitter.rest, self._call.hidden
        return rest if hidden is None or not self._plain else capture.hide_run(rest, hidden)

    def _take(self, chunk: bytes) -> bytes:
        """What is to be forwarded of it now, and in `_ends` whether a client may take that for the end."""
        run = self._splitter.feed(chunk) if self._plain else chunk
        if not run or self._call.written:
            return run
        at = _suspect(run, self._call.dialect, self._stripping) if self._plain else -1
        self._copied += len(run)
        if at >= 0 or self._copied <= self._call.copy_limit:
            self._copy.append(run)
        else:  # a stream beyond all measure: its beginning is recorded, and what tells of its end
            self._call.truncated = True
        if self._call.hidden is not None and self._plain:
            run = capture.hide_run(run, self._call.hidden)
            at = _suspect(run, self._call.dialect, self._stripping)
        if at < 0:
            return run
        rest, self._ends = _last(run[at:], self._call.dialect, self._stripping)
        return run[:at] + rest

    def _sum_up(self) -> None:
        """Reads the copy, once: at the event that ends the stream, or where the stream was cut."""
        if self._call.written:
            return
        copy = self._answer.decoded(b"".join((*self._copy, self._splitter.rest))) or b""
        parser = self._call.dialect.parser()
        values = sse.values(copy)
        if values is None:
            for event in sse.events(copy):
                parser.feed(event)
        else:
            for value in values:
                parser.take(value)
        self._call.summary = parser.summary()
        self._call.cost_usd = self._answer.cost_usd
        _judge(self._call, self._answer.status)


def _suspect(run: bytes, dialect: Dialect, stripping: bool) -> int:
    """Where the first event begins that may be the last one, or the usage chunk to strip; -1 if there is none."""
    first = len(run)
    for mark in dialect.marks:
        if mark in run:
            first = min(first, run.index(mark))
    if stripping and (empty := _NO_CHOICES.search(run)) is not None:
        first = min(first, empty.start())
    if first == len(run):
        return -1
    before = -1 if b"\r" in run else run.rfind(b"\n\n", 0, first)
    return before + 2 if before >= 0 else 0


def _last(run: bytes, dialect: Dialect, stripping: bool) -> tuple[bytes, bool]:
    """The run, with `stripping` without the usage chunk that the client didn't ask for; and whether it holds the event
    that ends the stream."""
    kept: list[bytes] = []
    ends = False
    for block in sse.blocks(run):
        event = sse.read(block)
        if event is not None and stripping and _only_usage(event):
            continue
        ends = ends or (event is not None and dialect.ends(event))
        kept.append(block)
    return b"".join(kept), ends


def _only_usage(event: sse.Event) -> bool:
    """Whether a chunk is the one that `include_usage` adds: usage, and no choices."""
    if b'"usage"' not in event.data:
        return False
    try:
        chunk = orjson.loads(event.data)
    except orjson.JSONDecodeError:
        return False
    return isinstance(chunk, dict) and chunk.get("choices") == [] and isinstance(chunk.get("usage"), dict)


def _add_usage(call: Call, request: Request) -> bool:
    """Asks for the usage of a stream; True: its chunk is to be stripped again."""
    if call.body is None:
        return False
    changed = inject.ask_for_usage(request.body, call.body)
    if changed is None:
        return False
    request.body = changed
    return True


def _judge(call: Call, status: int) -> None:
    """An answer of 400 or more is an error, and so is one that tells of an error in a stream."""
    summary: Summary = call.summary
    if status >= 400:
        call.end("error", summary.error_type or f"http_{status}")
    elif summary.error_type is not None:
        call.end("error", summary.error_type)
    else:
        call.end("ok")


def _service(call: Call) -> str:
    """Anthropic's other paths, such as messages/count_tokens, go where its messages go."""
    return "anthropic" if call.route.tail.startswith("messages/") else call.dialect.service


def _without_length(headers: list[Header]) -> list[Header]:
    return [pair for pair in headers if pair[0] != _LENGTH]


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1").strip()
