"""One event stream on its way: forwarded as it comes, copied within bounds, and recorded before its end."""

import re

import orjson

from collector.errors import RatchetError
from proxy import capture, sse
from proxy.answer import Answer, judge
from proxy.client import Client, without_length
from proxy.dialects.base import Dialect
from proxy.errors import Broken, Header
from proxy.hangup import HangUp
from proxy.record import Call

_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')  # in a chunk that tells nothing but the usage


class Streaming:
    """Relays one event stream. Whole events are forwarded as they come; the one that a client may take for the end is
    held back until the record is written."""

    def __init__(self, client: Client, call: Call, answer: Answer, stripping: bool) -> None:
        self._client = client
        self._call = call
        self._answer = answer
        self._plain = answer.encoding in ("identity", "")
        self._stripping = stripping and self._plain
        # What may be the last event has this in it; streams with several marks are looked into more closely.
        self._mark = call.dialect.marks[0] if len(call.dialect.marks) == 1 else b""
        self._simple = False  # whether what comes next may be the middle of the stream: it has begun, nothing waits
        self._splitter = sse.Splitter()
        self._copy: list[bytes] = []
        self._copied = 0
        self._ends = False

    @property
    def headers(self) -> list[Header]:
        """The answer's, without a length that won't be true."""
        shorter = self._stripping or self._call.hidden is not None
        return without_length(self._answer.headers) if shorter else self._answer.headers

    async def run(self, hang_up: HangUp) -> None:
        """Until the upstream's end. Raises ClientGone, or Broken when the upstream breaks off."""
        await self._client.start(self._answer.status, self.headers)
        await self.follow(hang_up)

    async def follow(self, hang_up: HangUp) -> None:
        """The same once the head is out. Raises as `run` does."""
        try:
            async for chunk in self._answer.chunks():
                complete = self._answer.complete
                run, ends = self.pass_on(chunk, complete)
                if not ends:
                    if run:
                        await self._client.body(run)
                    continue
                if complete:
                    hang_up.release()
                    await self._client.last(run)
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

    def in_the_middle(self, pieces: list[bytes]) -> bytes | None:
        """The run that came, where it is whole events none of which can be the last: then it is kept, and to be
        forwarded as it is. None for anything else, and nothing has happened."""
        if len(pieces) != 1 or not self._simple:
            return None
        run = pieces[0]
        copied = self._copied + len(run)
        if copied > self._call.copy_limit or not run.endswith(b"\n\n") or self._mark in run:
            return None
        if self._stripping and b'"usage"' in run and run.count(b'"usage"') != run.count(b'"usage":null'):
            return None
        self._copied = copied
        self._copy.append(run)
        return run

    def pass_on(self, chunk: bytes, complete: bool) -> tuple[bytes, bool]:
        """What is to be forwarded of a chunk, the last one where it is `complete`; and whether a client may take that
        for the end: then the call is to be recorded first."""
        self._call.first_byte()
        run = self._take(chunk)
        self._simple = self._plain and self._call.hidden is None and not self._splitter.rest and bool(self._mark)
        if not self._ends:
            return run, False
        self._ends = False
        self._sum_up()
        return run + self._rest if complete else run, True

    def end(self) -> bytes:
        """What is left to be forwarded where the answer has ended; the call is to be recorded first."""
        self._sum_up()
        return self._rest

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
        self._keep(run, at)
        if self._call.hidden is not None and self._plain:
            run = capture.hide_run(run, self._call.hidden)
            at = _suspect(run, self._call.dialect, self._stripping)
        if at < 0:
            return run
        rest, self._ends = _last(run[at:], self._call.dialect, self._stripping)
        return run[:at] + rest

    def _keep(self, run: bytes, at: int) -> None:
        """Copies what is to be recorded: of a stream beyond all measure its beginning, in whole events, and what
        tells of its end, from `at` on."""
        room = self._call.copy_limit - self._copied
        self._copied += len(run)
        if len(run) > room:
            self._call.truncated = True
            blank = run.rfind(b"\n\n", 0, room) if room > 0 else -1
            fits = blank + 2 if blank >= 0 else 0
            run = run[:fits] + (run[max(at, fits) :] if at >= 0 else b"")
        if run:
            self._copy.append(run)

    def _sum_up(self) -> None:
        """Reads the copy, once: at the event that ends the stream, or where the stream was cut."""
        if self._call.written:
            return
        copy = self._answer.decoded(b"".join((*self._copy, self._splitter.rest))) or b""
        parser = self._call.dialect.parser()
        parser.read(copy)
        self._call.summary = parser.summary()
        self._call.cost_usd = self._answer.cost_usd
        judge(self._call, self._answer.status)


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
