"""How much a client may send: bytes of headers and body, packed or unpacked, and calls at once."""

import asyncio
import contextlib
import importlib
import zlib
from functools import cache
from itertools import chain
from types import ModuleType
from typing import Any

from proxy.errors import BadRequest, ClientGone, HeadersTooLarge, Overloaded, TooLarge

MAX_HEADER_BYTES = 64 << 10
MAX_CALLS = 4096
_DRAIN_SECONDS = 10.0
_STEP = 1 << 20


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
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            message: Any = {"more_body": True}
            while message.get("more_body"):
                message = await receive()


def too_large(limit: int, *, unread: bool = False) -> TooLarge:
    """The error for a body over `limit` bytes."""
    error = TooLarge(f"the body is larger than {limit / (1 << 20):g} MB (server.max_body_mb)", param="body")
    error.unread = unread
    return error


def unpack(body: bytes, encoding: str, limit: int) -> bytes | None:
    """The body without its Content-Encoding; None for an encoding that isn't known here, which is relayed as it is.

    Raises TooLarge before more than `limit` bytes are unpacked, BadRequest if the body isn't what it says.
    """
    try:
        if encoding in ("gzip", "x-gzip"):
            return _inflate(body, zlib.MAX_WBITS | 16, limit)
        if encoding == "deflate":
            return _inflate(body, zlib.MAX_WBITS if body[:1] == b"\x78" else -zlib.MAX_WBITS, limit)
    except zlib.error as error:
        raise _not_valid(encoding, error) from None
    zstd = _zstandard() if encoding == "zstd" else None
    return None if zstd is None else _unzstd(zstd, body, limit)


def _inflate(body: bytes, bits: int, limit: int) -> bytes:
    unpacker = zlib.decompressobj(bits)
    parts: list[bytes] = []
    size = 0
    while body and not unpacker.eof:
        parts.append(unpacker.decompress(body, _STEP))
        size += len(parts[-1])
        if size > limit:
            raise too_large(limit)
        body = unpacker.unconsumed_tail
        if not body and not parts[-1]:
            break
    if not unpacker.eof:
        raise zlib.error("it is cut short")
    return b"".join(parts)


@cache
def _zstandard() -> ModuleType | None:
    """The library, if it happens to be installed: nothing here needs it."""
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        return None


def _not_valid(encoding: str, error: Exception) -> BadRequest:
    return BadRequest(f"the body isn't valid {encoding}: {error}", param="content-encoding")


def _unzstd(zstd: ModuleType, body: bytes, limit: int) -> bytes:
    try:
        with zstd.ZstdDecompressor(max_window_size=8 << 20).stream_reader(body) as reader:
            whole = reader.read(limit + 1)
    except zstd.ZstdError as error:
        raise _not_valid("zstd", error) from None
    if len(whole) > limit:
        raise too_large(limit)
    return bytes(whole)


class Calls:
    """How many calls are under way, with a cap; use it as `with calls:`. Raises Overloaded at the cap."""

    def __init__(self, most: int | None = None) -> None:
        self.running = 0
        self._most = MAX_CALLS if most is None else most

    def __enter__(self) -> None:
        if self.running >= self._most:
            raise Overloaded("too many calls at once; try again in a second")
        self.running += 1

    def __exit__(self, *_: object) -> None:
        self.running -= 1
