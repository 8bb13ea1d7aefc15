"""Clients that dawdle: two hundred connections that send a byte now and then hold up nobody, and are let go."""

import asyncio
import contextlib
import time
from pathlib import Path

from tests.fake_upstream import FakeUpstream
from tests.patience import within
from tests.served import Served, served

BODY = b'{"model":"fake-model","messages":[{"role":"user","content":"Capital?"}]}'
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
WHOLE = HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
PATIENCE = 2
SLOW = 200


class Listener(asyncio.Protocol):
    """Keeps what it is told, also where a reset follows."""

    def __init__(self) -> None:
        self.told = b""
        self.gone = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.told += data

    def connection_lost(self, error: Exception | None) -> None:
        self.gone.set()


async def dawdle(port: int, first: bytes) -> bytes:
    """Sends a beginning, then a byte every tenth of a second; what the server says until it ends the connection."""
    transport, listener = await asyncio.get_running_loop().create_connection(Listener, "127.0.0.1", port)
    transport.write(first)
    while not listener.gone.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(listener.gone.wait(), 0.1)
        if not listener.told:
            transport.write(b"x")
    transport.close()
    return listener.told


async def quick(port: int) -> float:
    """One whole call on a connection of its own; the seconds it took."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(WHOLE)
    answer = await reader.readuntil(b"\r\n")
    writer.close()
    assert b" 200 " in answer
    return time.monotonic() - began


async def drill(port: int) -> tuple[list[bytes], list[bytes], list[bytes], int]:
    """What those said who dawdled in the head and in the body, and who said nothing; how many quick calls passed."""
    body = HEAD + b"content-length: 100000\r\n\r\n{"
    heads = [asyncio.ensure_future(dawdle(port, HEAD + b"x-slow: ")) for _ in range(SLOW // 2)]
    bodies = [asyncio.ensure_future(dawdle(port, body)) for _ in range(SLOW // 2)]
    idle_reader, idle = await asyncio.open_connection("127.0.0.1", port)
    passed = 0
    while not all(one.done() for one in (*heads, *bodies)):
        await quick(port)
        passed += 1
    silent = [await idle_reader.read()]
    idle.close()
    return [one.result() for one in heads], [one.result() for one in bodies], silent, passed


def test_two_hundred_dawdling_clients_are_let_go_and_hold_up_nobody(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"server: {{slow_client_timeout: {PATIENCE}}}\n")
    with FakeUpstream() as upstream, served(tmp_path / "data", upstream.url, config=config) as server:
        began = time.monotonic()
        heads, bodies, silent, passed = asyncio.run(drill(_port(server)))
        assert time.monotonic() - began < within(60)
        for answers in (heads, bodies):
            told = [answer for answer in answers if answer]  # who was just sending may see a reset in its place
            assert len(told) > SLOW // 4
            assert all(b" 408 " in answer.split(b"\r\n")[0] and b'"ratchet_error"' in answer for answer in told)
        assert silent == [b""]
        assert passed >= 5
        server.client.flush()
        rows = server.client.query("SELECT error_type, count(*) FROM spans_v GROUP BY 1", limit=10)["rows"]
        counts = dict(rows)
        # A head that never ended told no path, so it is no call; a body that never ended is one, and has its span.
        assert counts == {None: passed, "request_timeout": SLOW // 2}


def test_a_head_without_end_is_cut_off_before_it_takes_memory(tmp_path: Path) -> None:
    async def endless(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD)
        answer = asyncio.ensure_future(reader.read())
        sent = 0
        try:
            while not answer.done() and sent < 64 << 20:
                writer.write(b"x-%d: " % sent + b"y" * 8000 + b"\r\n")
                sent += 8000
                await writer.drain()
        except ConnectionError:
            pass
        try:
            return await answer
        except ConnectionError:  # cut off while it was still sending
            return b""
        finally:
            writer.close()
            assert sent < 16 << 20

    with FakeUpstream() as upstream, served(tmp_path / "data", upstream.url) as server:
        said = asyncio.run(endless(_port(server)))
        assert said == b"" or b" 431 " in said.split(b"\r\n")[0]


def _port(server: Served) -> int:
    return int(server.url.rpartition(":")[2])
