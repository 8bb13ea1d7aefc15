"""Opening connections: all addresses of a name, families in turn, nobody waits for a dead one."""

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from proxy.dial import Address, dial, in_turn
from tests.unit.proxy.scripted import descriptors, on_loops, run, until

V4, V6 = socket.AF_INET, socket.AF_INET6
STUCK: Address = (V4, ("stuck", 1))


@pytest.fixture
def listening() -> Iterator[Address]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield (V4, server.getsockname())


@pytest.fixture
def dead() -> Address:
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return (V4, server.getsockname())


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: Address) -> list[Any]:
    """Every name has these addresses, and a connection to STUCK never comes about. Returns the addresses tried."""
    loop = asyncio.get_running_loop()
    connect = loop.sock_connect
    tried: list[Any] = []

    async def getaddrinfo(*_: object, **__: object) -> list[Any]:
        return [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", where) for family, where in addresses]

    async def sock_connect(sock: socket.socket, where: Any) -> None:
        tried.append(where)
        if where == STUCK[1]:
            await asyncio.Event().wait()
        await connect(sock, where)

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(loop, "sock_connect", sock_connect)
    return tried


@on_loops
async def test_a_connection_is_quick_to_send_and_watched_for_dead_peers(listening: Address) -> None:
    connection = await dial(*listening[1])
    with connection:
        assert connection.getpeername() == listening[1]
        assert connection.gettimeout() == 0
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_families_take_turns_and_keep_the_resolvers_order() -> None:
    six = [(V6, (f"6{number}",)) for number in range(3)]
    four = [(V4, (f"4{number}",)) for number in range(2)]
    assert in_turn([*six, *four]) == [six[0], four[0], six[1], four[1], six[2]]
    assert in_turn([four[0], *six]) == [four[0], six[0], six[1], six[2]]
    assert in_turn([]) == []


def test_an_address_that_does_not_answer_delays_the_next_only_a_moment(
    monkeypatch: pytest.MonkeyPatch, listening: Address
) -> None:
    async def promise() -> None:
        tried = resolving(monkeypatch, STUCK, listening)
        before = descriptors()
        connection = await dial("name.test", 1, stagger=0.01)
        with connection:
            assert connection.getpeername() == listening[1]
            assert tried == [STUCK[1], listening[1]]
            assert descriptors() == before + 1

    run(promise(), "asyncio")


def test_an_address_that_refuses_delays_the_next_not_at_all(
    monkeypatch: pytest.MonkeyPatch, listening: Address, dead: Address
) -> None:
    async def promise() -> None:
        resolving(monkeypatch, dead, listening)
        with await dial("name.test", 1, stagger=60) as connection:
            assert connection.getpeername() == listening[1]

    run(promise(), "asyncio")


def test_the_first_to_answer_is_not_waited_behind(monkeypatch: pytest.MonkeyPatch, listening: Address) -> None:
    async def promise() -> None:
        tried = resolving(monkeypatch, listening, STUCK)
        with await dial("name.test", 1, stagger=60):
            assert tried == [listening[1]]

    run(promise(), "asyncio")


def test_when_no_address_answers_the_last_error_is_raised_and_nothing_stays_open(
    monkeypatch: pytest.MonkeyPatch, dead: Address
) -> None:
    async def promise() -> None:
        resolving(monkeypatch, dead, dead)
        before = descriptors()
        with pytest.raises(ConnectionRefusedError):
            await dial("name.test", 1)
        assert descriptors() == before

    run(promise(), "asyncio")


@pytest.mark.parametrize("addresses", [1, 2])
def test_a_cancelled_dial_closes_every_attempt(monkeypatch: pytest.MonkeyPatch, addresses: int) -> None:
    async def promise() -> None:
        tried = resolving(monkeypatch, *[STUCK] * addresses)
        before = descriptors()
        task = asyncio.create_task(dial("name.test", 1, stagger=0.005))
        await until(lambda: len(tried) == addresses)
        assert descriptors() == before + addresses
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert descriptors() == before

    run(promise(), "asyncio")
