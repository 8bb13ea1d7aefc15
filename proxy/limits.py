"""How much a client may send: bytes of headers and body, and calls at once."""

import asyncio
import contextlib
from itertools import chain
from typing import Any

from proxy.errors import ClientGone, HeadersTooLarge, Overloaded, TooLarge, TooSlow

MAX_HEADER_BYTES = 64 << 10
MAX_CALLS = 4096
_DRAIN_SECONDS = 10.0


def check_headers(headers: list[tuple[bytes, bytes]]) -> None:
    """Raises HeadersTooLarge over 64 KB."""
    if sum(map(len, chain.from_iterable(headers))) > MAX_HEADER_BYTES:
        raise HeadersTooLarge(f"the headers are larger than {MAX_HEADER_BYTES} bytes")


async def read_body(receive: Any, declared: bytes | None, limit: int) -> bytes:
    """The whole body. Raises TooLarge as soon as that is known, ClientGone when the client leaves before its end."""
    if declared is not None and declared.isdigit() and int(declared) > limit:
        raise too_large(limit, unread=True)
    message = await receive()
    if not message.get("more_body") and message["type"] == "http.request":
        whole: bytes = message.get("body", b"")
    else:
        whole = await _read_parts(message, receive, limit)
    if len(whole) > limit:
        raise too_large(limit)
    return whole


async def _read_parts(message: Any, receive: Any, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise too_large(limit, unread=bool(message.get("more_body")))
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()


async def drain(receive: Any) -> None:
    """Reads on, and throws away, what a client still sends of a refused body: were the connection closed under it, it
    would see a reset in place of the answer. Gives up after ten seconds."""
    with contextlib.suppress(TimeoutError, TooSlow):
        async with asyncio.timeout(_DRAIN_SECONDS):
            message: Any = {"more_body": True}
            while message.get("more_body"):
                message = await receive()


def too_large(limit: int, *, unread: bool = False) -> TooLarge:
    """The error for a body over `limit` bytes."""
    error = TooLarge(f"the body is larger than {limit / (1 << 20):g} MB (server.max_body_mb)", param="body")
    error.unread = unread
    return error


class Calls:
    """How many calls are under way, with a cap; use it as `with calls:`. Raises Overloaded at the cap."""

    def __init__(self, most: int | None = None) -> None:
        self.running = 0
        self.most = MAX_CALLS if most is None else most

    def __enter__(self) -> None:
        if self.running >= self.most:
            raise Overloaded("too many calls at once; try again in a second")
        self.running += 1

    def __exit__(self, *_: object) -> None:
        self.running -= 1
