"""The server's protocol on a transport in memory: what is written, when, and what ends a connection."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from proxy.server import CONNECTION, Protocol

GET = b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n"
Asgi = Callable[[Any, Any, Any], Awaitable[None]]


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = asyncio.Event()

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def writelines(self, list_of_data: Any) -> None:
        self.writes.append(b"".join(list_of_data))

    def close(self) -> None:
        self.closed.set()

    def is_closing(self) -> bool:
        return self.closed.is_set()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Talk:
    """A connection to an application. `settle` returns when nothing is left to be done."""

    def __init__(self, app: Asgi, keep_alive: float = 5) -> None:
        config = uvicorn.Config(app, http=Protocol, lifespan="off", log_config=None, timeout_keep_alive=1)
        config.timeout_keep_alive = keep_alive  # type: ignore[assignment]  # uvicorn counts in seconds, tests in less
        config.load()
        self.state = ServerState()
        self.wire = Wire()
        self.protocol = Protocol(config, self.state, {}, _loop=asyncio.get_running_loop())
        self.protocol.connection_made(self.wire)

    async def say(self, data: bytes) -> bytes:
        """What is written in answer to some bytes."""
        before = len(self.wire.writes)
        self.protocol.data_received(data)
        while self.state.tasks:
            await asyncio.wait(self.state.tasks.copy())
        return b"".join(self.wire.writes[before:])


def answering(headers: list[tuple[bytes, bytes]], *parts: bytes, status: int = 200) -> Asgi:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for index, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": index + 1 < len(parts)})

    return app


def test_a_head_and_its_body_leave_in_one_write() -> None:
    async def run() -> None:
        talk = Talk(answering([(b"content-length", b"2")], b"hi"))
        answer = await talk.say(GET)
        assert answer == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
        assert len(talk.wire.writes) == 1
        assert await talk.say(GET) == answer

    asyncio.run(run())


def test_the_head_of_a_stream_does_not_wait_for_its_body() -> None:
    async def run() -> None:
        go = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await go.wait()
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            await send({"type": "http.response.body", "body": b"b"})

        talk = Talk(app)
        talk.protocol.data_received(GET)
        while not talk.wire.writes:
            await asyncio.sleep(0)
        assert talk.wire.writes == [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"]
        go.set()
        assert await talk.say(b"") == b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n"

    asyncio.run(run())


def test_pipelined_requests_are_answered_in_turn() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)
        await answering([(b"content-length", b"2")], scope["raw_path"])(scope, receive, send)

    async def run() -> None:
        got = await Talk(app).say(GET + GET.replace(b"/a", b"/b"))
        assert [part[-2:] for part in got.split(b"HTTP/1.1 200 OK")[1:]] == [b"/a", b"/b"]

    asyncio.run(run())


def test_a_large_body_passes_whole() -> None:
    async def run() -> None:
        body = b"x" * (1 << 20)
        got = await Talk(answering([(b"content-length", b"%d" % len(body))], body)).say(GET)
        assert got.endswith(b"\r\n\r\n" + body)

    asyncio.run(run())


def test_a_head_request_is_answered_without_a_body() -> None:
    async def run() -> None:
        talk = Talk(answering([(b"content-length", b"2")], b"hi"))
        assert await talk.say(GET.replace(b"GET", b"HEAD")) == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"

    asyncio.run(run())


@pytest.mark.parametrize("asked", [b"connection: close\r\n", b""])
def test_a_connection_lives_as_long_as_its_client_asks(asked: bytes) -> None:
    async def run() -> None:
        talk = Talk(answering([(b"content-length", b"2")], b"hi"))
        got = await talk.say(GET.replace(b"host: x\r\n", b"host: x\r\n" + asked))
        assert (b"connection: close" in got) == bool(asked) == talk.wire.closed.is_set()

    asyncio.run(run())


@pytest.mark.parametrize("noise", [b"\x16\x03\x01\x02\x00 hello\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n"])
def test_what_is_no_http_gets_the_envelope_and_no_noise_in_the_log(
    noise: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        talk = Talk(answering([], b""))
        with caplog.at_level(logging.INFO):
            head, _, body = (await talk.say(noise)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"content-length: %d" % len(body) in head
        assert json.loads(body)["error"]["code"] == "malformed_request"
        assert talk.wire.closed.is_set()
        assert caplog.records == []

    asyncio.run(run())


def test_noise_in_the_middle_of_an_answer_does_not_become_a_part_of_it() -> None:
    async def run() -> None:
        go = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            await go.wait()

        talk = Talk(app)
        talk.protocol.data_received(GET)
        while not talk.wire.writes:
            await asyncio.sleep(0)
        written = list(talk.wire.writes)
        talk.protocol.data_received(b"noise\r\n\r\n")
        assert talk.wire.writes == written
        assert talk.wire.closed.is_set()
        go.set()
        await talk.say(b"")

    asyncio.run(run())


def test_an_answer_left_unfinished_ends_the_connection_after_the_bytes_so_far() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})

    async def run() -> None:
        talk = Talk(app)
        assert (await talk.say(GET)).endswith(b"1\r\na\r\n")
        assert talk.wire.closed.is_set()

    asyncio.run(run())


@pytest.mark.parametrize("value", [b"a\r\nx: y", b"a\nx: y", b"a\0"])
def test_a_header_that_would_split_the_answer_is_refused(value: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(RuntimeError, match="header"):
            await send({"type": "http.response.start", "status": 200, "headers": [(b"x-a", value)]})

    async def run() -> None:
        talk = Talk(app)
        assert await talk.say(GET) == b""
        assert talk.wire.closed.is_set()

    asyncio.run(run())


@pytest.mark.parametrize("parts", [(b"abc",), (b"a",)])
def test_a_body_of_another_length_than_told_ends_the_connection(
    parts: tuple[bytes, ...], caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        talk = Talk(answering([(b"content-length", b"2")], *parts))
        assert b"abc" not in await talk.say(GET)
        assert talk.wire.closed.is_set()
        assert "failed" in caplog.text

    asyncio.run(run())


def test_a_bug_in_the_application_is_a_500_in_the_envelope(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("a bug")

    async def run() -> None:
        got = await Talk(app).say(GET)
        assert got.startswith(b"HTTP/1.1 500 ")
        assert b"ratchet_error" in got
        assert "a bug" in caplog.text

    asyncio.run(run())


def test_a_client_that_leaves_is_told_of_at_once_and_only_while_it_is_served() -> None:
    async def run() -> None:
        told: list[str] = []
        started = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            connection = scope["extensions"][CONNECTION]
            task = asyncio.current_task()
            assert task is not None

            def left() -> None:
                told.append(scope["path"])
                task.cancel()

            connection.on_gone = left
            if scope["path"] == "/a":
                await answering([(b"content-length", b"0")], b"")(scope, receive, send)
            else:
                started.set()
                await asyncio.Event().wait()

        talk = Talk(app)
        await talk.say(GET)
        talk.protocol.data_received(GET.replace(b"/a", b"/b"))
        await started.wait()
        talk.protocol.connection_lost(None)
        assert told == ["/b"]
        await asyncio.wait(talk.state.tasks.copy())

    asyncio.run(run())


def test_an_idle_connection_is_closed_when_its_time_is_over() -> None:
    async def run() -> None:
        talk = Talk(answering([(b"content-length", b"0")], b""), keep_alive=0.05)
        for _ in range(3):
            await talk.say(GET)
            assert not talk.wire.closed.is_set()
        await asyncio.wait_for(talk.wire.closed.wait(), 5)

    asyncio.run(run())


def test_an_upgrade_is_served_as_a_plain_request() -> None:
    async def run() -> None:
        talk = Talk(answering([(b"content-length", b"2")], b"no", status=400))
        asked = GET.replace(b"host: x", b"host: x\r\nconnection: upgrade\r\nupgrade: websocket")
        assert (await talk.say(asked)).startswith(b"HTTP/1.1 400 ")

    asyncio.run(run())


@pytest.mark.parametrize("sent", [0, 1])
def test_what_follows_the_head_of_an_upgrade_is_no_request(sent: int) -> None:
    """The parser gives the body of such a request no length: the connection has to end."""
    asked: list[bytes] = []

    async def refusing(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope["raw_path"])
        await send({"type": "http.response.start", "status": 400, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def run() -> None:
        talk = Talk(refusing)
        head = b"POST /a HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\ncontent-length: %d\r\n\r\n"
        hidden = GET.replace(b"/a", b"/hidden")
        assert (await talk.say(head % len(hidden) + sent * hidden)).startswith(b"HTTP/1.1 400 ")
        assert talk.wire.closed.is_set()

    asyncio.run(run())
    assert asked == [b"/a"]


H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"


@pytest.mark.parametrize("cut", [None, 10, 60, 150, 196, 198])
def test_an_offer_of_http2_leaves_the_body_where_it_is(cut: int | None) -> None:
    """Java's client makes that offer with each plain request. httptools would skip the body."""
    heard: list[Any] = []

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        body = message["body"]
        while message["more_body"]:
            message = await receive()
            body += message["body"]
        heard.append((scope["method"], scope["raw_path"], dict(scope["headers"]).get(b"upgrade"), body))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def run() -> None:
        talk = Talk(echo)
        asked = b"POST /a?b HTTP/1.1\r\nhost: x\r\ncontent-length: 7\r\n" + H2C + b"x-more: 1\r\n\r\nPOST /c"
        if cut is not None:
            talk.protocol.data_received(asked[:cut])
        assert (await talk.say(asked[cut or 0 :])).startswith(b"HTTP/1.1 200 ")
        assert (await talk.say(GET.replace(b"host: x\r\n", b"host: x\r\n" + H2C))).startswith(b"HTTP/1.1 200 ")
        assert (await talk.say(GET + GET)).count(b"HTTP/1.1 200 ") == 2

    asyncio.run(run())
    post, get = ("POST", b"/a", None, b"POST /c"), ("GET", b"/a", None, b"")
    assert heard == [post, get, get, get]
