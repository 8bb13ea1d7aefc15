"""Bodies as they are packed on the wire: gzip, deflate, br, zstd; unpacked step by step, so that no bomb gets far."""

import importlib
import zlib
from typing import Any

from proxy.errors import BadRequest
from proxy.limits import too_large

_STEP = 1 << 20  # bytes of output at once
_SIP = 1 << 10  # bytes of zstd's input at once, whose output can't be bounded in another way
_FRAMES = 1000  # of zstd: each costs time, however little it holds


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
    if encoding == "br":
        return _unbrotli(body, limit)
    return _unzstd(body, limit) if encoding == "zstd" else None


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


def _unbrotli(body: bytes, limit: int) -> bytes:
    brotli: Any = importlib.import_module("brotli")  # on first use: few clients send it

    unpacker = brotli.Decompressor()
    parts: list[bytes] = []
    size = 0
    try:
        while not unpacker.is_finished():
            parts.append(unpacker.process(body, output_buffer_limit=_STEP))
            size += len(parts[-1])
            if size > limit:
                raise too_large(limit)
            if not parts[-1] and not unpacker.is_finished() and unpacker.can_accept_more_data():
                raise _not_valid("br", "it is cut short")
            body = b""
    except brotli.error as error:
        raise _not_valid("br", error) from None
    return b"".join(parts)


def _unzstd(body: bytes, limit: int) -> bytes:
    import zstandard  # on first use: few clients send it

    unpacker, frames, whole = zstandard.ZstdDecompressor(max_window_size=8 << 20), 0, False
    frame = unpacker.decompressobj()
    parts: list[bytes] = []
    size = 0
    try:
        for at in range(0, len(body), _SIP):
            sip = body[at : at + _SIP]
            while sip:
                parts.append(frame.decompress(sip))
                size += len(parts[-1])
                if size > limit:
                    raise too_large(limit)
                whole, sip = frame.eof, frame.unused_data if frame.eof else b""
                if whole:
                    frames, frame = frames + 1, unpacker.decompressobj()
                if frames > _FRAMES:
                    raise _not_valid("zstd", "it has too many frames")
    except zstandard.ZstdError as error:
        raise _not_valid("zstd", error) from None
    if not whole:
        raise _not_valid("zstd", "it is cut short")
    return b"".join(parts)


def _not_valid(encoding: str, error: object) -> BadRequest:
    return BadRequest(f"the body isn't valid {encoding}: {error}", param="content-encoding")
