"""Raw servers that do exactly what a test tells them, and the client they are tested with."""

import asyncio
import contextlib
import functools
import inspect
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, cast

import pytest
import uvloop

from proxy.http1 import Client, Target
from proxy.http1_response import Header, Response

Script = Callable[["Peer"], Awaitable[None]]
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
EMPTY = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
SECONDS = 10  # a test that takes longer hangs


class Peer:
    """The server's end of one connection; `number` counts connections from 0."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        self.reader = reader
        self.writer = writer
        self.number = number

    async def request(self) -> tuple[bytes, bytes]:
        """The next request: its head with the empty line, and its body by content-length."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return head, await self.reader.readexactly(length)

    async def send(self, *pieces: bytes) -> None:
        """Each piece in a write of its own, so that the other side is likely to read it alone."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0.001)

    async def gone(self) -> None:
        """Returns when the other side has ended the connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(1 << 20):
                pass

    def reset(self) -> None:
        """Ends it without a goodbye."""
        self.writer.transport.abort()


class Server:
    """Listens on 127.0.0.1; `script(peer)` plays each connection, which ends when the script does."""

    def __init__(self, script: Script, tls: ssl.SSLContext | None = None) -> None:
        self.script = script
        self.tls = tls
        self.accepted = 0
        self.failures: list[Exception] = []
        self.tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Server":
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls, backlog=1024)
        self.port = self.server.sockets[0].getsockname()[1]
        scheme = "https" if self.tls else "http"
        self.target = Target.parse(f"{scheme}://127.0.0.1:{self.port}/v1")
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        self.server.close()
        for task in tuple(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.server.wait_closed()
        if error is None:
            assert self.failures == []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        peer = Peer(reader, writer, self.accepted)
        self.accepted += 1
        try:
            await self.script(peer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has hung up, or the test is over
        except Exception as error:  # noqa: BLE001 - boundary: shown by the test, at the server's end
            self.failures.append(error)
        finally:
            writer.close()
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await writer.wait_closed()
            self.tasks.discard(task)


class Wire(asyncio.Transport):
    """A transport that goes nowhere and remembers whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def write(self, data: Any) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True

    close = abort

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


def answering(*answers: bytes) -> Script:
    """Answers the n-th request of a connection with the n-th of `answers`, the last one again and again."""

    async def script(peer: Peer) -> None:
        for number in range(1_000_000):
            await peer.request()
            await peer.send(answers[min(number, len(answers) - 1)])

    return script


def saying(*pieces: bytes, stay: bool = False) -> Script:
    """After one request sends `pieces`, then ends the connection, or keeps it until the client ends it."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(*pieces)
        if stay:
            await peer.gone()

    return script


@contextlib.asynccontextmanager
async def pair(
    script: Script, serving: ssl.SSLContext | None = None, **options: Any
) -> AsyncIterator[tuple[Client, Server]]:
    """A server and a client; afterwards the client must have closed every connection, and no descriptor may be left."""
    before = descriptors()
    async with Server(script, serving) as server:
        client = Client(**options)
        try:
            yield client, server
        finally:
            await client.close()
        assert client.connections == client.idle == 0
    await until(lambda: descriptors() <= before)


async def call(
    client: Client, server: Server, body: bytes = b"", headers: Sequence[Header] = (), method: bytes = b"POST"
) -> tuple[Response, bytes]:
    """One whole call: the answer and its body."""
    response = await client.request(method, server.target, b"/chat", headers, body)
    return response, await response.read()


async def until(condition: Callable[[], bool]) -> None:
    """Waits for the loop to make it true."""
    while not condition():
        await asyncio.sleep(0.002)


def descriptors() -> int:
    """How many sockets this process has open."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return count


def run(promise: Coroutine[Any, Any, None], loop: str = "uvloop") -> None:
    """Runs a test's coroutine in a fresh loop of that kind; fails when it hangs, or leaves a task behind."""

    async def bounded() -> None:
        async with asyncio.timeout(SECONDS):
            await promise
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(bounded())


def on_loops(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """The promise holds on both event loops."""

    @pytest.mark.parametrize("loop", LOOPS)
    @functools.wraps(test)
    def sync(loop: str, **parameters: Any) -> None:
        run(test(**parameters), loop)  # type: ignore[arg-type]

    own = inspect.signature(test).parameters.values()
    loop = inspect.Parameter("loop", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    sync.__signature__ = inspect.Signature([*own, loop])
    return cast(Callable[..., None], sync)
