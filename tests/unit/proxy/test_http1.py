"""The upstream client against scripted servers: framing, the pool, limits, errors, what a caller may rely on."""

import asyncio

import pytest

from proxy import http1
from proxy.http1 import Client, Target
from proxy.http1_errors import (
    ClosedEarly,
    ConnectFailed,
    ConnectTimeout,
    InvalidRequest,
    TransportError,
)
from tests.unit.proxy.scripted import (
    CHUNKED,
    EMPTY,
    OK,
    Peer,
    Server,
    answering,
    call,
    on_loops,
    pair,
    run,
    saying,
    until,
)


@on_loops
async def test_a_call_sends_what_it_was_given_and_returns_what_came() -> None:
    got: list[tuple[bytes, bytes]] = []

    async def script(peer: Peer) -> None:
        got.append(await peer.request())
        await peer.send(b"HTTP/1.1 201 Made\r\nX-One: 1\r\nx-ONE:  2\r\nEmpty:\r\nContent-Length: 2\r\n\r\nhi")

    async with pair(script) as (client, server):
        response, body = await call(client, server, b"{}", [(b"X-A", b"1"), (b"x-b", b"caf\xc3\xa9"), (b"X-A", b"2")])
    start = b"POST /v1/chat HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n" % server.port
    assert got == [(start + b"X-A: 1\r\nx-b: caf\xc3\xa9\r\nX-A: 2\r\ncontent-length: 2\r\n\r\n", b"{}")]
    assert (response.status, body, response.retried) == (201, b"hi", False)
    assert response.headers == [(b"X-One", b"1"), (b"x-ONE", b"2"), (b"Empty", b""), (b"Content-Length", b"2")]


@on_loops
@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (OK, b"hi"),
        (EMPTY, b""),
        (CHUNKED + b"5\r\nhello\r\n1;x=y\r\n!\r\n0\r\n\r\n", b"hello!"),
        (CHUNKED + b"2\r\nhi\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n", b"hi"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", b""),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + OK, b"hi"),
        (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nhi", b"hi"),
        (b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nhi", b"hi"),
        (b"HTTP/1.1 500 Oops\r\ncontent-length: 2\r\n\r\nhi", b"hi"),
    ],
)
async def test_every_body_with_an_end_of_its_own_leaves_the_connection_usable(answer: bytes, body: bytes) -> None:
    async with pair(answering(answer)) as (client, server):
        for _ in range(3):
            response, got = await call(client, server)
            assert got == body
            assert response.complete and (b"link", b"</a>") not in response.headers
            assert (client.connections, client.idle, server.accepted) == (1, 1, 1)


@on_loops
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n\r\nhi",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\ncontent-length: 2\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    ],
)
async def test_an_answer_that_ends_with_its_connection_is_whole_and_the_connection_not_kept(answer: bytes) -> None:
    async with pair(saying(answer)) as (client, server):
        for accepted in (1, 2):
            _, got = await call(client, server)
            assert got == b"hi"
            assert (client.idle, server.accepted) == (0, accepted)


@on_loops
async def test_the_answer_to_head_has_no_body_whatever_its_length_says() -> None:
    async with pair(saying(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", stay=True)) as (client, server):
        response, body = await call(client, server, method=b"HEAD")
        assert (response.status, body) == (200, b"")
        assert (b"content-length", b"5") in response.headers


@on_loops
async def test_chunks_come_as_they_arrive_and_those_of_one_read_come_as_one() -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + b"1\r\na\r\n1\r\nb\r\n")
        await go.wait()
        await peer.send(b"1\r\nc\r\n0\r\n\r\n")
        await peer.gone()

    async with pair(script) as (client, server):
        got = []
        async for chunk in await client.request(b"POST", server.target, b"/", []):
            got.append(chunk)
            go.set()
        assert got == [b"ab", b"c"]
        assert client.idle == 1


@on_loops
async def test_what_came_before_an_error_is_given_before_it_is_raised() -> None:
    async with pair(saying(CHUNKED + b"2\r\nhi\r\n")) as (client, server):
        response = await client.request(b"POST", server.target, b"/", [])
        await until(lambda: client.connections == 0)
        chunks = aiter(response)
        assert await anext(chunks) == b"hi"
        with pytest.raises(ClosedEarly) as caught:
            await anext(chunks)
        assert caught.value.bytes_seen == len(CHUNKED) + 7


@on_loops
async def test_a_stale_connection_costs_one_unseen_retry() -> None:
    requests = []

    async def script(peer: Peer) -> None:
        requests.append(await peer.request())
        await peer.send(OK)
        if peer.number == 0:
            requests.append(await peer.request())  # taken, and never answered: as a server that had just timed out
            peer.reset()
        else:
            await peer.gone()

    async with pair(script) as (client, server):
        await call(client, server, b"1")
        response, body = await call(client, server, b"2")
        assert (body, response.retried, server.accepted) == (b"hi", True, 2)
        assert [sent for _, sent in requests] == [b"1", b"2", b"2"]


@on_loops
async def test_only_the_first_byte_of_an_answer_decides_on_a_retry() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()
        await peer.send(b"H")

    async with pair(script) as (client, server):
        await call(client, server)
        with pytest.raises(ClosedEarly) as caught:
            await call(client, server)
        assert (caught.value.bytes_seen, caught.value.stale, server.accepted) == (1, False, 1)


@on_loops
async def test_a_fresh_connection_that_closes_without_an_answer_is_not_retried() -> None:
    async with pair(saying()) as (client, server):
        with pytest.raises(ClosedEarly) as caught:
            await call(client, server)
        assert (caught.value.bytes_seen, caught.value.stale, server.accepted) == (0, False, 1)


def test_a_server_that_worked_for_a_while_before_it_closed_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.http1_protocol.STALE_SECONDS", 0.02)

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()
        await asyncio.sleep(0.05)

    async def promise() -> None:
        async with pair(script) as (client, server):
            await call(client, server)
            with pytest.raises(ClosedEarly):
                await call(client, server)
            assert server.accepted == 1

    run(promise())


@on_loops
async def test_an_idle_connection_that_ends_or_speaks_up_leaves_the_pool() -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await go.wait()
        if peer.number:
            await peer.send(b"HTTP/1.1 408 Too Slow\r\ncontent-length: 0\r\n\r\n")
            await peer.gone()

    async with pair(script) as (client, server):
        for _ in range(2):
            await call(client, server)
            assert client.idle == 1
            go.set()
            await until(lambda: client.connections == client.idle == 0)
            go.clear()


@on_loops
async def test_a_connection_that_is_just_being_closed_is_not_picked() -> None:
    async with pair(answering(OK)) as (client, server):
        await call(client, server)
        (connection,) = client._live
        connection.close()
        response, _ = await call(client, server)
        assert (response.retried, server.accepted) == (False, 2)


@on_loops
@pytest.mark.parametrize("extra", [b"HTTP/1.1 200 OK\r\n", b"x", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"])
async def test_bytes_behind_an_answer_are_never_taken_for_the_next_one(extra: bytes) -> None:
    async with pair(saying(OK + extra, stay=True)) as (client, server):
        assert (await call(client, server))[1] == b"hi"
        assert client.idle == 0
        assert (await call(client, server))[1] == b"hi"
        assert server.accepted == 2


@on_loops
async def test_the_pool_keeps_so_many_and_for_so_long() -> None:
    async with pair(answering(OK), max_idle=2, idle_seconds=0.04) as (client, server):
        await asyncio.gather(*(call(client, server) for _ in range(5)))
        assert (client.idle, server.accepted) == (2, 5)
        await until(lambda: client.connections == 0)
        assert client.idle == 0


@on_loops
async def test_origins_do_not_share_connections() -> None:
    async with pair(answering(OK)) as (client, one), Server(answering(EMPTY)) as two:
        for server, body in ((one, b"hi"), (two, b""), (one, b"hi"), (two, b"")):
            assert (await call(client, server))[1] == body
        assert (one.accepted, two.accepted, client.idle) == (1, 1, 2)
        await client.close()


@on_loops
async def test_a_hundred_calls_at_once_are_answered_each_its_own() -> None:
    async def script(peer: Peer) -> None:
        while True:
            _, body = await peer.request()
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    async with pair(script) as (client, server):
        for _ in range(2):
            bodies = [b"%d" % number for number in range(100)]
            answers = await asyncio.gather(*(call(client, server, body) for body in bodies))
            assert [body for _, body in answers] == bodies
        assert server.accepted == client.idle == 100


@on_loops
@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        (b"POST", b"/", [(b"x", b"1\r\nevil: 1")]),
        (b"POST", b"/", [(b"x", b"1\nevil: 1")]),
        (b"POST", b"/", [(b"x", b"1\revil: 1")]),
        (b"POST", b"/", [(b"x", b"1\0")]),
        (b"POST", b"/", [(b"x\r\nevil: 1\r\ny", b"1")]),
        (b"POST", b"/", [(b"x: 1", b"1")]),
        (b"POST", b"/", [(b"", b"1")]),
        (b"POST", b"/", [(b"Content-Length", b"9")]),
        (b"POST", b"/", [(b"transfer-encoding", b"chunked")]),
        (b"POST", b"/", [(b"Host", b"elsewhere")]),
        (b"POST / HTTP/1.1\r\nx: y\r\n\r\nGET", b"/", []),
        (b"POST", b"/ HTTP/1.1\r\nx: y", []),
        (b"POST", b"/a b", []),
        (b"POST", "/é".encode(), []),
    ],
)
async def test_a_request_that_would_be_another_on_the_wire_is_never_sent(
    method: bytes, path: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    async with pair(answering(OK)) as (client, server):
        for _ in range(2):
            with pytest.raises(InvalidRequest):
                await client.request(method, server.target, path, headers)
        assert server.accepted == 0


@on_loops
async def test_no_connection_is_told_from_a_slow_one() -> None:
    async with Server(answering(OK)) as server:
        target = server.target
    client = Client(connect_timeout=5)
    with pytest.raises(ConnectFailed, match=r"cannot connect to 127.0.0.1"):
        await client.request(b"POST", target, b"/", [])
    with pytest.raises(ConnectFailed, match=r"cannot connect to nowhere.invalid"):
        await Client().request(b"POST", Target.parse("http://nowhere.invalid/v1"), b"/", [])
    assert client.connections == 0


def test_connecting_for_too_long_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(host: str, port: int) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(http1, "dial", never)

    async def promise() -> None:
        with pytest.raises(ConnectTimeout, match=r"no connection to example.test:80 within 0.02 s") as caught:
            await Client(connect_timeout=0.02).request(b"GET", Target.parse("http://example.test"), b"/", [])
        assert isinstance(caught.value, ConnectFailed) and caught.value.bytes_seen == 0

    run(promise())


@on_loops
async def test_close_lets_running_answers_end_and_takes_no_more() -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await go.wait()
        await peer.send(OK)
        await peer.gone()

    async with pair(script) as (client, server):
        running = asyncio.create_task(call(client, server))
        await until(lambda: client.connections == 1)
        closing = asyncio.create_task(client.close(grace=5))
        await asyncio.sleep(0)
        with pytest.raises(ConnectFailed, match="closed"):
            await call(client, server)
        go.set()
        assert (await running)[1] == b"hi"
        await closing
        assert client.connections == 0


@on_loops
async def test_close_without_grace_breaks_off_what_is_running() -> None:
    async with pair(saying(CHUNKED, stay=True)) as (client, server):
        running = asyncio.create_task(call(client, server))
        await until(lambda: client.connections == 1)
        await client.close()
        with pytest.raises(TransportError):
            await running


@pytest.mark.parametrize(
    ("base", "origin", "start"),
    [
        ("https://api.openai.com/v1", ("api.openai.com", 443, True), b"/v1 api.openai.com"),
        ("https://api.openai.com:443/v1/", ("api.openai.com", 443, True), b"/v1 api.openai.com"),
        ("http://localhost:8000", ("localhost", 8000, False), b" localhost:8000"),
        ("http://[::1]:8000/a/b", ("::1", 8000, False), b"/a/b [::1]:8000"),
        ("http://bücher.example/", ("xn--bcher-kva.example", 80, False), b" xn--bcher-kva.example"),
    ],
)
def test_a_base_url_is_read_once(base: str, origin: tuple[str, int, bool], start: bytes) -> None:
    target = Target.parse(base)
    assert (target.origin.host, target.origin.port, target.origin.tls) == origin
    assert target.prefix + b" " + target.host_line.removeprefix(b" HTTP/1.1\r\nhost: ") == start


@pytest.mark.parametrize(
    "base", ["ftp://x", "x", "http://", "http://u:secret@h/v1", "http://h/v1?a=b", "http://h:99999", "http://h/a b", ""]
)
def test_what_is_no_base_url_is_refused_without_showing_credentials(base: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Target.parse(base)
    assert "secret" not in str(caught.value)
