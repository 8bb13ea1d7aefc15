"""Opens TCP connections: every address of a name, the families in turn, the next one before the last has timed out."""

import asyncio
import socket
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

Address = tuple[socket.AddressFamily, tuple[Any, ...]]
KEEPALIVE_SECONDS = 60


async def dial(host: str, port: int, stagger: float = 0.25) -> socket.socket:
    """A connected, non-blocking socket, by "happy eyeballs" (RFC 8305): a further address is tried `stagger`
    seconds after the one before, or at once when that one failed; the first to answer wins.

    Raises OSError (socket.gaierror for an unknown name) when no address answers. Cancelling closes every attempt.
    """
    loop = asyncio.get_running_loop()
    infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    addresses = in_turn([(family, address) for family, _, _, _, address in infos])
    if len(addresses) == 1:
        return await _attempt(addresses[0])
    return await _race(addresses, stagger)


def in_turn(addresses: Sequence[Address]) -> list[Address]:
    """The same addresses, families alternating, each family in the resolver's order, the resolver's first in front."""
    families: dict[socket.AddressFamily, list[Address]] = {}
    for address in addresses:
        families.setdefault(address[0], []).append(address)
    return [address for address in chain.from_iterable(zip_longest(*families.values())) if address is not None]


async def _race(addresses: list[Address], stagger: float) -> socket.socket:
    waiting = list(addresses)
    attempts: set[asyncio.Task[socket.socket]] = set()
    winner: asyncio.Task[socket.socket] | None = None
    failure: BaseException = OSError("no address")
    try:
        while waiting or any(not attempt.done() for attempt in attempts):
            if waiting:
                attempts.add(asyncio.create_task(_attempt(waiting.pop(0))))
            running = [attempt for attempt in attempts if not attempt.done()]
            done, _ = await asyncio.wait(
                running, timeout=stagger if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for attempt in done:
                error = attempt.exception()
                if error is None:
                    winner = attempt
                    return attempt.result()
                failure = error
        raise failure
    finally:
        await _call_off(attempts - {winner})


async def _call_off(attempts: set[Any]) -> None:
    for attempt in attempts:
        attempt.cancel()
    for result in await asyncio.gather(*attempts, return_exceptions=True):
        if isinstance(result, socket.socket):
            result.close()


async def _attempt(address: Address) -> socket.socket:
    family, where = address
    connection = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):  # a NAT in between must not forget a call whose answer takes minutes
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
        await asyncio.get_running_loop().sock_connect(connection, where)
    except BaseException:
        connection.close()
        raise
    return connection
