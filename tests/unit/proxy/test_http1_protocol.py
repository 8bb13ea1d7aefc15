"""The upstream client against slow, broken and hostile servers: what is refused, what is cut off, what never leaks."""

import asyncio
import contextlib

import pytest

from proxy.http1_errors import ClosedEarly, ProtocolError, ReadTimeout
from proxy.http1_protocol import MAX_HEAD, MAX_HEADERS, Connection
from proxy.http1_response import HIGH_WATER
from tests.unit.proxy.scripted import CHUNKED, OK, Peer, Wire, answering, call, on_loops, pair, saying, until


@on_loops
async def test_a_slow_reader_makes_the_server_wait_and_loses_nothing() -> None:
    size = 8 << 20
    sent = 0

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        peer.writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(size >> 16):
            peer.writer.write(b"x" * (1 << 16))
            await peer.writer.drain()
            sent += 1 << 16
        await peer.gone()

    async with pair(script) as (client, server):
        response = await client.request(b"POST", server.target, b"/", [])
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.03)
        assert sent < size
        assert HIGH_WATER < response.buffered < 4 * HIGH_WATER
        assert sum([len(chunk) async for chunk in response]) == size
        assert client.idle == 1


@on_loops
async def test_read_takes_any_size_unless_it_is_given_a_limit() -> None:
    big = b"HTTP/1.1 200 OK\r\ncontent-length: 3000000\r\n\r\n" + b"x" * 3_000_000
    async with pair(answering(big)) as (client, server):
        assert len((await call(client, server))[1]) == 3_000_000
        assert client.idle == 1
        response = await client.request(b"POST", server.target, b"/", [])
        with pytest.raises(ProtocolError, match="longer than 1000000 bytes"):
            await response.read(limit=1_000_000)
        await until(lambda: client.connections == 0)
    async with pair(answering(OK)) as (client, server):
        response = await client.request(b"POST", server.target, b"/", [])
        with pytest.raises(ProtocolError, match="longer than 1 bytes"):
            await response.read(limit=1)


@on_loops
@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", "present with"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n0\r\n\r\n", "present with"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nhi", "Duplicate"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nhi", "Duplicate"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\nhi", "Content-Length"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2, 2\r\n\r\nhi", "Content-Length"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\nhi", "overflow"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "not understood"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, gzip\r\n\r\n0\r\n\r\n", "not understood"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", "understood"),
        (b"HTTP/1.1 101 Switching\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n\x81\x05", "status 101"),
        (b"HTTP/1.1 000 OK\r\n\r\n", "status 0"),
        (b"HTTP/1.1 99 OK\r\n\r\n", "status"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "status"),
        (b"HTTP/2.0 200 OK\r\n\r\n", "HTTP/2.0"),
        (b"HTTP/0.9 200 OK\r\n\r\n", "HTTP/0.9"),
        (b"HTTP/1.1 200 OK\ncontent-length: 0\n\n", "not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\ncontent-length: 0\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nA: b\0c\r\n\r\n", "not HTTP/1.1"),
        (b"<html>no</html>\r\n\r\n", "not HTTP/1.1"),
        (b"GET / HTTP/1.1\r\nhost: you\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * (MAX_HEADERS + 1) + b"\r\n", "256 headers"),
        (b"HTTP/1.1 200 OK\r\na: " + b"b" * MAX_HEAD + b"\r\ncontent-length: 0\r\n\r\n", "65536 bytes"),
    ],
)
async def test_an_answer_that_could_be_read_in_two_ways_or_is_none_is_refused(answer: bytes, why: str) -> None:
    async with pair(saying(answer, stay=True)) as (client, server):
        with pytest.raises(ProtocolError, match=why):
            await call(client, server)
        await until(lambda: client.connections == 0)


@on_loops
@pytest.mark.parametrize(
    "bad",
    [b"zz\r\nhello\r\n", b"-5\r\nhello\r\n", b"ffffffffffffffffff\r\n", b"5\r\nhelloXX0\r\n\r\n", b"5 \r\nhello\r\n"],
)
async def test_a_bad_chunk_ends_the_answer_and_the_connection(bad: bytes) -> None:
    async with pair(saying(CHUNKED, b"2\r\nhi\r\n", bad, stay=True)) as (client, server):
        response = await client.request(b"POST", server.target, b"/", [])
        got = []
        with pytest.raises(ProtocolError):
            async for chunk in response:
                got.append(chunk)
        assert b"".join(got).startswith(b"hi")
        await until(lambda: client.connections == 0)


@on_loops
@pytest.mark.parametrize(
    "flood",
    [
        (b"HTTP/1.1 200 OK\r\n", b"a: b\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"a"),
        (b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
        (b"HTTP/1.1 200 ", b"A"),
        (CHUNKED + b"0\r\n", b"a: b\r\n"),
        (CHUNKED + b"0\r\n", b"a"),
        (CHUNKED + b"1;", b"a"),
    ],
)
async def test_headers_trailers_and_framing_without_end_are_cut_off(flood: tuple[bytes, bytes]) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(flood[0])
        while True:
            await peer.send(flood[1] * 2000)

    async with pair(script) as (client, server):
        with pytest.raises(ProtocolError) as caught:
            await call(client, server)
        assert caught.value.bytes_seen < 4 * MAX_HEAD
        await until(lambda: client.connections == 0)


@on_loops
async def test_framing_between_pieces_of_a_body_does_not_add_up() -> None:
    pieces = [piece for _ in range(70) for piece in (b"2;" + b"x" * 1000, b"\r\nhi\r\n")]
    async with pair(saying(CHUNKED, *pieces, b"0\r\n\r\n", stay=True)) as (client, server):
        assert (await call(client, server))[1] == b"hi" * 70
        assert client.idle == 1


@on_loops
async def test_an_answer_one_byte_at_a_time_is_the_same_answer() -> None:
    answer = b"HTTP/1.1 103 E\r\nL: 1\r\n\r\n" + CHUNKED[:-2] + b"A:\r\nB: c\r\n\r\n5\r\nhello\r\n0\r\nT: 1\r\n\r\n"
    async with pair(saying(*(bytes([byte]) for byte in answer), stay=True)) as (client, server):
        response, body = await call(client, server)
        assert (body, client.idle) == (b"hello", 1)
        assert response.headers == [(b"transfer-encoding", b"chunked"), (b"A", b""), (b"B", b"c")]


@on_loops
@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 2", CHUNKED, CHUNKED + b"5\r\nhel"])
async def test_a_silent_server_times_out(begin: bytes) -> None:
    async with pair(saying(begin, stay=True), read_timeout=0.25) as (client, server):
        started = asyncio.get_running_loop().time()
        with pytest.raises(ReadTimeout) as caught:
            await call(client, server)
        assert caught.value.bytes_seen == len(begin)
        assert 0.2 < asyncio.get_running_loop().time() - started < 30
        await until(lambda: client.connections == 0)


class Clock:
    """A loop's time that a test moves."""

    now = 0.0

    def time(self) -> float:
        return self.now


def test_a_body_that_drips_is_progress_and_a_head_that_drips_is_none() -> None:
    clock, wires = Clock(), [Wire(), Wire()]
    body, head = (Connection(clock, lambda _: None, lambda _: None) for _ in wires)  # type: ignore[arg-type]
    for connection, wire in zip((body, head), wires, strict=True):
        connection.connection_made(wire)
        connection.send(b"GET / HTTP/1.1\r\n\r\n", b"")
    body.data_received(CHUNKED)
    for _ in range(20):
        clock.now += 0.4
        body.data_received(b"1\r\nx\r\n")
        if head.busy:
            head.data_received(b"H" if clock.now < 0.5 else b"T")
        for connection in (body, head):
            connection.check(clock.now, read_timeout=1.0, idle_seconds=15.0)
        assert head.busy == (clock.now < 1.0)
    assert (body.busy, wires[0].closed, wires[1].closed) == (True, False, True)


@on_loops
async def test_a_reader_that_takes_its_time_is_no_silence_of_the_server() -> None:
    big = b"HTTP/1.1 200 OK\r\ncontent-length: 9000000\r\n\r\n" + b"x" * 9_000_000
    async with pair(saying(big), read_timeout=0.5) as (client, server):
        response = await client.request(b"POST", server.target, b"/", [])
        await anext(aiter(response))
        await until(lambda: response.buffered > HIGH_WATER)
        for _ in range(12):
            await asyncio.sleep(0.06)
        assert client.connections == 1
        assert len(await response.read()) > 8_000_000


@on_loops
async def test_hanging_up_closes_the_connection_at_once() -> None:
    gone = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + b"2\r\nhi\r\n")
        await peer.gone()
        gone.set()

    async with pair(script) as (client, server):
        response = await client.request(b"POST", server.target, b"/", [])
        response.abort()
        await gone.wait()
        with pytest.raises(ClosedEarly):
            await response.read()
        gone.clear()
        async with await client.request(b"POST", server.target, b"/", []) as response:
            assert await anext(aiter(response)) == b"hi"
        await gone.wait()
        await until(lambda: client.connections == 0)


@on_loops
async def test_giving_up_a_whole_answer_keeps_its_connection() -> None:
    async with pair(answering(OK)) as (client, server):
        async with await client.request(b"POST", server.target, b"/", []) as response:
            assert await response.read() == b"hi"
        response.abort()
        assert client.idle == 1


@on_loops
@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 20", CHUNKED, CHUNKED + b"2\r\nhi\r\n"])
async def test_a_cancelled_caller_closes_the_connection(begin: bytes) -> None:
    asked, gone = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(begin)
        asked.set()
        await peer.gone()
        gone.set()

    async with pair(script) as (client, server):
        task = asyncio.create_task(call(client, server))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await gone.wait()
        await until(lambda: client.connections == 0)


@on_loops
async def test_cancelling_at_any_moment_leaks_nothing() -> None:
    async with pair(answering(OK)) as (client, server):
        for steps in range(40):
            task = asyncio.create_task(call(client, server))
            for _ in range(steps // 2):
                await asyncio.sleep(0)
            if steps % 2:
                await asyncio.sleep(0.0005 * (steps // 8))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await until(lambda: client.connections == client.idle)
        assert (await call(client, server))[1] == b"hi"


@on_loops
@pytest.mark.parametrize("size", [300_000, 20 << 20])
async def test_a_large_request_body_arrives_whole_however_slowly_it_is_taken(size: int) -> None:
    body = bytes(range(256)) * (size // 256)
    got: list[bytes] = []

    async def script(peer: Peer) -> None:
        while True:
            got.append((await peer.request())[1])
            await peer.send(OK)

    async with pair(script) as (client, server):
        for _ in range(2):
            await call(client, server, body)
        assert client.idle == 1
        assert got == [body, body]


@on_loops
async def test_a_large_body_waits_in_the_callers_bytes_and_not_in_a_copy() -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await asyncio.Event().wait()

    async with pair(script) as (client, server):
        task = asyncio.create_task(call(client, server, bytes(20 << 20)))
        await until(lambda: client.connections == 1)
        await asyncio.sleep(0.03)
        (connection,) = client._live
        assert connection._transport is not None and connection._unsent is not None
        assert connection._transport.get_write_buffer_size() < 1 << 20
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@on_loops
@pytest.mark.parametrize("more", [b"", b"connection: close\r\n"])
async def test_an_error_before_the_body_is_sent_is_read_and_the_rest_not_sent(more: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(b"HTTP/1.1 413 Too Large\r\n" + more + b"content-length: 7\r\n\r\n", b"too big")

    async with pair(script) as (client, server):
        for _ in range(5):
            response, body = await call(client, server, bytes(20 << 20))
            assert (response.status, body) == (413, b"too big")
            await until(lambda: client.connections == 0)


@on_loops
async def test_after_an_error_no_more_of_the_body_is_sent() -> None:
    size = 20 << 20
    got = 0

    async def script(peer: Peer) -> None:
        nonlocal got
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(b"HTTP/1.1 413 Too Large\r\ncontent-length: 7\r\n\r\n")
        with contextlib.suppress(TimeoutError):
            while True:
                got += len(await asyncio.wait_for(peer.reader.read(1 << 20), 0.05))
        await peer.send(b"too big")
        await peer.gone()

    async with pair(script) as (client, server):
        assert (await call(client, server, bytes(size)))[1] == b"too big"
        assert got < size
        await until(lambda: client.connections == 0)


@on_loops
async def test_a_connection_whose_server_left_a_body_unread_is_not_used_again() -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(OK)
        await asyncio.Event().wait()

    async with pair(script) as (client, server):
        for _ in range(2):
            assert (await call(client, server, bytes(20 << 20)))[1] == b"hi"
            assert client.idle == 0
        assert server.accepted == 2


@on_loops
async def test_an_answer_that_begins_before_the_body_is_sent_gets_the_rest_of_it() -> None:
    got = 0

    async def script(peer: Peer) -> None:
        nonlocal got
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(CHUNKED + b"5\r\nbegun\r\n")
        got = len(await peer.reader.readexactly(20 << 20))
        await peer.send(b"4\r\ndone\r\n0\r\n\r\n")
        await peer.gone()

    async with pair(script) as (client, server):
        response = await client.request(b"POST", server.target, b"/", [], bytes(20 << 20))
        assert [chunk async for chunk in response] == [b"begun", b"done"]
        assert (got, client.idle) == (20 << 20, 1)


@on_loops
async def test_a_server_that_half_closes_after_its_answer_is_read_and_left() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.writer.write(b"HTTP/1.1 200 OK\r\n\r\nhi")
        peer.writer.write_eof()
        await peer.gone()

    async with pair(script) as (client, server):
        assert (await call(client, server))[1] == b"hi"
        await until(lambda: client.connections == 0)


@on_loops
@pytest.mark.parametrize(
    "part", [b"", b"HTTP/1.1 200 OK\r\n", OK[:-1], CHUNKED + b"5\r\nhel", CHUNKED + b"2\r\nhi\r\n"]
)
@pytest.mark.parametrize("reset", [False, True])
async def test_an_answer_cut_off_is_an_error_that_says_how_much_was_seen(part: bytes, reset: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(part)
        if reset:
            await asyncio.sleep(0.005)
            peer.reset()

    async with pair(script) as (client, server):
        with pytest.raises(ClosedEarly) as caught:
            await call(client, server)
        assert caught.value.bytes_seen == len(part)


@on_loops
async def test_a_reset_is_no_end_of_a_body_that_ends_with_its_connection() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        sock = peer.writer.get_extra_info("socket")
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\npart")
        await asyncio.sleep(0.01)
        sock.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER of 0 s: closing sends RST
        peer.reset()

    async with pair(script) as (client, server):
        with pytest.raises(ClosedEarly):
            await call(client, server)
