"""The parser under chance: any cut of any answer reads the same; rubbish neither hangs nor keeps a connection."""

import asyncio
from collections.abc import Coroutine
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.http1_errors import TransportError
from proxy.http1_protocol import Connection
from proxy.http1_response import Header, Response
from tests.unit.proxy.scripted import Peer, Wire, call, pair, run

NAMES = st.text("abcdefgXYZ-_09", min_size=1, max_size=12).map(lambda text: b"h" + text.encode())
VALUES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=20).map(
    lambda text: text.encode("latin-1")
)
HEADERS = st.lists(st.tuples(NAMES, VALUES), max_size=8)
PIECES = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
WORDS = [
    b"HTTP/1.1 ",
    b"200 OK",
    b"100 ",
    b"\r\n",
    b"\r\n\r\n",
    b"content-length: ",
    b"transfer-encoding: chunked",
    b"5",
]
WORDS += [
    b"5",
    b"connection: close",
    b"0\r\n\r\n",
    b"hello",
    b"HTTP/1.1 200 OK\r\n",
    b": ",
    b";",
    b"-1",
    b"\0",
    b"\n",
    b"ff",
]


class Line:
    """One connection without a network, and what its pool was told."""

    def __init__(self) -> None:
        self.idle = self.lost = 0
        self.wire = Wire()
        self.connection = Connection(asyncio.get_running_loop(), self._on_idle, self._on_lost)
        self.connection.connection_made(self.wire)

    def _on_idle(self, _: Connection) -> None:
        self.idle += 1

    def _on_lost(self, _: Connection) -> None:
        self.lost += 1

    def feed(self, data: bytes, cuts: list[int]) -> None:
        """`data` cut at `cuts`; as a transport does, nothing is delivered after closing."""
        edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
        for start, end in pairwise(edges):
            if start < end and not self.wire.closed:
                self.connection.data_received(data[start:end])

    def end(self) -> None:
        """The server's end of it."""
        if not self.wire.closed:
            self.connection.eof_received()
        self.connection.connection_lost(None)


def answer(status: int, headers: list[Header], pieces: list[bytes], framing: str, trailers: list[Header]) -> bytes:
    """The bytes of a valid answer."""
    lines = [b"HTTP/1.1 %d Reason" % status, *(b"%b: %b" % pair for pair in headers)]
    body = b"".join(pieces)
    if framing == "length":
        lines.append(b"Content-Length: %d" % len(body))
    elif framing == "chunked":
        lines.append(b"Transfer-Encoding: chunked")
        body = b"".join(b"%x;e=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n"
        body += b"".join(b"%b: %b\r\n" % pair for pair in trailers) + b"\r\n"
    return b"\r\n".join([*lines, b"", body])


async def outcome(response: Response) -> tuple[int, list[Header], bytes] | str:
    """What a caller gets."""
    try:
        await response.head()
        return response.status, response.headers, await response.read()
    except TransportError as error:
        return type(error).__name__


@settings(deadline=None)
@given(
    status=st.sampled_from([200, 201, 206, 400, 404, 429, 500, 503]),
    headers=HEADERS,
    pieces=PIECES,
    framing=st.sampled_from(["length", "chunked", "close"]),
    trailers=HEADERS,
    interim=st.integers(0, 2),
    cuts=st.lists(st.integers(0, 10_000), max_size=30),
    again=st.booleans(),
)
def test_any_cut_of_any_answer_reads_the_same(
    status: int,
    headers: list[Header],
    pieces: list[bytes],
    framing: str,
    trailers: list[Header],
    interim: int,
    cuts: list[int],
    again: bool,
) -> None:
    async def promise() -> None:
        line = Line()
        early = b"HTTP/1.1 103 Early\r\nlink: x\r\n\r\n" * interim
        whole = early + answer(status, headers, pieces, framing, trailers)
        for turn in range(1, 3 if again and framing != "close" else 2):
            response = line.connection.send(b"GET / HTTP/1.1\r\n\r\n", b"")
            line.feed(whole, cuts)
            if framing == "close":
                assert not response.complete
                line.end()
                assert (line.idle, line.lost) == (0, 1)
            else:
                assert (line.idle, line.wire.closed) == (turn, False)
            got = await outcome(response)
            assert isinstance(got, tuple)
            assert (got[0], got[2]) == (status, b"".join(pieces))
            assert [pair for pair in got[1] if pair[0].startswith(b"h")] == headers

    run(promise(), "asyncio")


@settings(deadline=None)
@given(headers=HEADERS, pieces=PIECES, framing=st.sampled_from(["length", "chunked"]), cut=st.integers(0, 10_000))
def test_an_answer_without_its_last_byte_is_never_taken_for_whole(
    headers: list[Header], pieces: list[bytes], framing: str, cut: int
) -> None:
    async def promise() -> None:
        line = Line()
        whole = answer(200, headers, pieces, framing, [])
        response = line.connection.send(b"GET / HTTP/1.1\r\n\r\n", b"")
        line.feed(whole[: cut % len(whole)], [cut // 2])
        line.end()
        assert await outcome(response) == "ClosedEarly"

    run(promise(), "asyncio")


def rubbish() -> st.SearchStrategy[bytes]:
    """Bytes, half of them made of what an answer is made of."""
    return st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(WORDS), max_size=25).map(b"".join))


@settings(deadline=None, max_examples=300)
@given(data=rubbish(), cuts=st.lists(st.integers(0, 500), max_size=6))
def test_rubbish_reads_the_same_however_it_is_cut_and_its_connection_is_lost_once(data: bytes, cuts: list[int]) -> None:
    async def one(places: list[int]) -> tuple[int, list[Header], bytes] | str:
        line = Line()
        response = line.connection.send(b"GET / HTTP/1.1\r\n\r\n", b"")
        line.feed(data, places)
        line.end()
        assert line.lost == 1 and not line.connection.open and not line.connection.busy
        return await outcome(response)

    async def promise() -> None:
        assert await one(cuts) == await one([])

    run(promise(), "asyncio")


@settings(deadline=None, max_examples=40)
@given(answers=st.lists(rubbish(), min_size=1, max_size=5))
def test_rubbish_over_a_socket_ends_every_call_and_leaves_no_connection(answers: list[bytes]) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.writer.write(answers[peer.number % len(answers)])
        await peer.writer.drain()

    async def promise() -> None:
        async with pair(script, read_timeout=2) as (client, server):
            calls: list[Coroutine[Any, Any, Any]] = [call(client, server) for _ in answers]
            for result in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(result, TransportError | tuple), result

    run(promise())
