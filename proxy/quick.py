"""The usual call, without a task: a JSON body behind a head that was read before, a plain target, a connection ready.

It is the same work in the same order as in `relay.py`, by the same functions, but in one go: from the request's bytes
to the upstream's connection, and from the answer's bytes to the client's. Whatever isn't as usual ends it. Before
anything was sent, the request goes to the parser as any other does; later on, the call is handed over to the Relay as
it stands: when its client leaves, goes on talking or reads too slowly, the upstream fails, the answer is packed, very
long or no 200, an SDK's retry joins, or the server ends.
"""

import functools
import logging
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from collector.errors import RatchetError
from proxy import depth, prepare
from proxy.auth import Guard
from proxy.client import LENGTH, Client
from proxy.dialects.base import Reading
from proxy.errors import Header
from proxy.heads import Head, Heads
from proxy.http1_protocol import Connection
from proxy.http1_response import HIGH_WATER, Response
from proxy.identity import NO_TRACE, give_back
from proxy.limits import Calls
from proxy.openings import Opening
from proxy.options import Options
from proxy.prepare import Body, Prompts, parse
from proxy.record import Call, Recorder
from proxy.relay import Begun, Relay, find_episode
from proxy.reply import RawReply, is_stream, passed_on
from proxy.streaming import Streaming
from proxy.table import Table
from proxy.upstream import Plain, Request, Upstream, headers_for
from proxy.versions import Versions

if TYPE_CHECKING:
    from proxy.server import Protocol

log = logging.getLogger(__name__)


_MODELS = 64  # whose plans are kept for each head


class Plan(NamedTuple):
    """Where a call goes, and its head but for the length."""

    plain: Plain
    lines: bytes


class Quick:
    """Takes the usual calls of one worker. `heads` holds the heads that it knows."""

    def __init__(
        self,
        upstream: Upstream,
        prompts: Prompts,
        recorder: Recorder,
        table: Table,
        guard: Guard,
        versions: Versions,
        relay: Relay,
        options: Options,
        copy_limit: int,
        body_limit: int,
    ) -> None:
        self.heads = Heads()
        self.recorder = recorder
        self.relay = relay
        self.joining = options.joining
        self.calls: Calls = relay.calls
        self._enabled = options.cache is None and options.total is None and not options.trained
        self._upstream = upstream
        self._prompts = prompts
        self._table = table
        self._guard = guard
        self._versions = versions
        self._copy_limit = copy_limit
        self._body_limit = body_limit

    def learn(self, key: bytes | None, scope: Any, headers: dict[bytes, bytes], call: Call) -> None:
        """A call goes the long way: whether the next one with such a head need not. `key`: as `heads.cut` gives it."""
        if key is not None and self._enabled and key not in self.heads:
            self.heads.learn(key, scope, headers, call.route)

    def take(self, protocol: "Protocol", head: Head, raw: bytes) -> bool:
        """Begins a call, if it is a usual one; else False, and nothing has happened."""
        plan: Plan | None = None
        connection: Connection | None = None
        try:
            now = self._versions.current
            if head.seen != now.serial:
                head.allowed(self._guard, now.serial)
            fits = len(raw) <= self._body_limit and self.calls.running < self.calls.most and not head.limited
            parsed = parse(raw) if fits else None
            if parsed is None or "prompt_id" in parsed:
                return False
            opening = head.openings.find(raw, parsed.get("model"))
            reading = None if opening is None else opening.read(parsed)
            if reading is None:
                depth.check(raw, parsed)
                reading = head.dialect.read(parsed)
            plan = head.plans.get(reading.model) or self._plan(head, reading.model)
            if plan is None:
                return False
            connection = self._upstream.ready(plan.plain)
            if connection is None:
                return False
            body = Body(raw, parsed)
            call = self._prepared(head, body, reading, plan, opening)
        except RatchetError:
            call = None
        except Exception:  # boundary: a bug of ours must end as an answer and a span, which the long way sees to
            log.exception("a call could not be taken the short way")
            call = None
        if call is None or plan is None or connection is None:
            if connection is not None:
                self._upstream.unused(connection)
            return False
        protocol.running = QuickCall(self, protocol, head, call, raw, body, plan, connection)
        return True

    def _prepared(self, head: Head, body: Body, reading: Reading, plan: Plan, opening: Opening | None) -> Call | None:
        """The call, its body as it goes upstream. None where something would have to be awaited. Raises BadRequest."""
        raw, table = body.raw, self._table
        call = Call(head.route, head.dialect, NO_TRACE, head.named, head.tenant)
        call.copy_limit = self._copy_limit
        call.request_bytes = len(raw)
        call.body, call.reading, call.stream = body.parsed, reading, reading.stream
        find_episode(call, table)
        try:
            if self._prompts.at_once(call, body, opening):
                if opening is None:
                    head.openings.learn(raw, reading, head.dialect, self._versions.current)
                target = plan.plain.target
                prepare.aim(call, body, target.provider, target.model)
                if reading.stream:
                    changed = prepare.with_usage(call, body.raw)
                    if changed is not None:
                        body.raw, body.stripping = changed, True
                return call
        except Exception:
            give_back(table, call.identity)
            raise
        give_back(table, call.identity)
        return None

    def _plan(self, head: Head, model: str | None) -> Plan | None:
        """Where such calls for a model go, and the head they go with: it says the same as long as the deployments do.
        None where that is no plain target. Raises InvalidRequest."""
        plain = self._upstream.plain(head.dialect.service, model)
        if plain is None:
            return None
        sent = headers_for(plain.target, head.headers, keyed=self._guard.keyed, unpacked=False)
        plan = Plan(plain, self._upstream.lines(plain, head.route.tail, head.query.decode("latin-1"), sent))
        if len(head.plans) < _MODELS:
            head.plans[model] = plan
        return plan

    def request(self, call: Call, head: Head, plain: Plain, body: bytes) -> Request:
        """What was sent, as the Relay wants it."""
        sent = headers_for(plain.target, head.headers, keyed=self._guard.keyed, unpacked=False)
        return Request(plain.target, "POST", call.route.tail, head.query.decode("latin-1"), sent, body)


class QuickCall:
    """One call under way."""

    __slots__ = ("_begun", "_body", "_head", "_plan", "_protocol", "_quick", "_response", "_streaming",
                 "call", "raw")  # fmt: skip

    def __init__(
        self,
        quick: Quick,
        protocol: "Protocol",
        head: Head,
        call: Call,
        raw: bytes,
        body: Body,
        plan: Plan,
        connection: Connection,
    ) -> None:
        """Sends it: `body` as it is to go upstream, `raw` is what came."""
        self.call = call
        self.raw = raw
        self._quick = quick
        self._protocol = protocol
        self._head = head
        self._body = body
        self._plan = plan
        self._streaming: Streaming | None = None
        self._begun: Client | None = None  # the client, once a stream has begun
        sent = body.raw
        self._response = response = connection.send(b"%b\r\ncontent-length: %d\r\n\r\n" % (plan.lines, len(sent)), sent)
        response.listener = self._heard
        quick.calls.running += 1
        quick.joining.running.add(self)

    @property
    def open(self) -> bool:
        """Whether its answer has not begun, so that a retry can join it."""
        return self._streaming is None

    def _heard(self) -> None:
        """The upstream has said something, or has ended."""
        response = self._response
        try:
            if response.error is not None or self._protocol.flow.write_paused:
                self.hand_over()
            elif (streaming := self._streaming) is not None:
                run = None if response.complete else streaming.in_the_middle(response.pieces)
                if run is None:
                    self._stream(streaming)
                else:
                    response.pieces.clear()
                    response.buffered = 0
                    self.call.response_bytes += len(run)
                    self._protocol.transport.write(b"%x\r\n%b\r\n" % (len(run), run))
                    if response.paused:
                        response.resume()
            elif response.status:
                self._head_came(response)
        except Exception as bug:  # noqa: BLE001 - boundary: a bug of ours ends as an answer and a span: the Relay's
            self.hand_over(bug)

    def _head_came(self, response: Response) -> None:
        """The head of the answer is there, and maybe all of it."""
        headers = passed_on(response.headers)
        given = dict(headers)
        long = response.buffered > HIGH_WATER or response.buffered > self.call.copy_limit
        if response.status != 200 or long or b"content-encoding" in given:
            self.hand_over()
        elif is_stream(given.get(b"content-type", b"")):
            if LENGTH in given:
                self.hand_over()
            else:
                self._begin_stream(given)
        elif response.complete:
            self._whole(headers, given, response.take())

    def _whole(self, headers: list[Header], given: dict[bytes, bytes], body: bytes) -> None:
        call, protocol = self.call, self._protocol
        call.first_byte()
        prepare.read_answer(call, body, 200)
        call.http_status, call.response_bytes = 200, len(body)
        self._quick.recorder.write(call)
        if LENGTH not in given:
            headers.append((LENGTH, b"%d" % len(body)))
        protocol.transport.write(protocol.head(headers, call.lines(), given) + body)
        self._end()

    def _begin_stream(self, given: dict[bytes, bytes]) -> None:
        call = self.call
        answer: Any = RawReply(self._response)
        client = Client(None, call, self._quick.recorder)
        client.started = call.stream = True
        call.http_status = 200
        streaming = Streaming(client, call, answer, self._body.stripping)
        lines = call.lines() + b"\r\ntransfer-encoding: chunked"
        self._stream(streaming, self._protocol.head(streaming.headers, lines, given), client)

    def _stream(self, streaming: Streaming, head: bytes = b"", client: Client | None = None) -> None:
        """Some of a stream; with `client` its beginning, behind its head."""
        call, response = self.call, self._response
        complete = response.complete
        chunk = response.take()
        run, ends = streaming.pass_on(chunk, complete) if chunk else (b"", False)
        if complete and not ends:
            run, ends = run + streaming.end(), True
        call.response_bytes += len(run)
        if ends:
            self._quick.recorder.write(call)
        if run:
            head += b"%x\r\n%b\r\n" % (len(run), run)
        if complete:
            head += b"0\r\n\r\n"
        if head:
            self._protocol.transport.write(head)
        if client is not None:
            self._begun, self._streaming = client, streaming
        if complete:
            self._end()
        elif response.paused:
            response.resume()

    def _end(self) -> None:
        self._leave()
        self._quick.calls.running -= 1
        self._protocol.ended()

    def _leave(self) -> None:
        self._response.listener = None
        self._protocol.running = None
        self._quick.joining.running.discard(self)

    def hand_over(self, bug: Exception | None = None) -> Any:
        """The Relay goes on from here, beginning with `bug` where there is one. Returns what a retry joins."""
        self._leave()
        quick, call = self._quick, self.call
        cycle = self._protocol.resume(self._head, begun=self._begun is not None)
        client = self._begun if self._begun is not None else Client(None, call, quick.recorder)
        client.send = cycle.send
        client.running = quick.joining.add(call, self.raw, client, awaited=self._head.awaited)
        request = quick.request(call, self._head, self._plan.plain, self._body.raw)
        request.under_way, request.stripping = self._response, self._body.stripping
        request.ago = (time.perf_counter_ns() - call.began) / 1e9
        begun = Begun(client, call, request, self._response, self._streaming, bug)
        self._protocol.start(cycle, functools.partial(quick.relay.go_on, begun))
        return client.running
