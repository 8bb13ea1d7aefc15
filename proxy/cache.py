"""Answers kept for calls that are the same to the byte: per key, off by default, bounded in size and age.

What counts as the same: the key, the path and query, the upstream, and the body as it goes there, after injection; so
a promotion never gets an old prompt's answer. Kept are whole answers with status 200, JSON and streams; a stream comes
back in one piece. A hit is a span like any other, with `"cache": "hit"` in its attributes and no cost. Each worker
keeps its own.
"""

import time
from collections import OrderedDict
from hashlib import sha256
from typing import Any, NamedTuple

from proxy.dialects.base import Summary
from proxy.errors import Header
from proxy.record import Call
from proxy.upstream import Request

_OVERHEAD = 1024  # bytes that an entry takes besides its body


class Kept(NamedTuple):
    """One answer as the client got it, and what the record says of it."""

    status: int
    headers: list[Header]
    body: bytes
    stream: bool
    summary: Summary
    until: float


class Cache:
    """At most `size` bytes of answers, each for `seconds`; the least recently used goes first."""

    def __init__(self, seconds: float, size: int) -> None:
        self._seconds = seconds
        self._size = size
        self.most = size // 10 - _OVERHEAD  # bytes of one answer
        self._held = 0
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()

    def get(self, key: bytes) -> Kept | None:
        """The answer, if there is one that is not too old."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        if kept.until < time.monotonic():
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        return kept

    def put(self, key: bytes, status: int, headers: list[Header], body: bytes, call: Call) -> None:
        """Keeps an answer, unless it would fill more than a tenth of the room."""
        if len(body) > self.most:
            return
        if key in self._kept:
            self._drop(key)
        own = [pair for pair in headers if not pair[0].startswith(b"x-ratchet-")]
        kept = Kept(status, own, body, call.stream, call.summary, time.monotonic() + self._seconds)
        self._kept[key] = kept
        self._held += len(body) + _OVERHEAD
        while self._held > self._size:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: bytes) -> None:
        self._held -= len(self._kept.pop(key).body) + _OVERHEAD


class Keeper:
    """Stands between a call and its client, and keeps what passes."""

    def __init__(self, cache: Cache, key: bytes, send: Any) -> None:
        self._cache = cache
        self._key = key
        self._send = send
        self._status = 0
        self._headers: list[Header] = []
        self._parts: list[bytes] = []
        self._size = 0
        self._whole = False

    async def send(self, message: Any) -> None:
        """Passes one message on."""
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], message["headers"]
        else:
            self._size += len(message.get("body", b""))
            if self._size <= self._cache.most:
                self._parts.append(message.get("body", b""))
            self._whole = not message.get("more_body", False)
        await self._send(message)

    def keep(self, call: Call) -> None:
        """Afterwards: keeps the answer if it is one to keep."""
        fits = self._size <= self._cache.most
        if fits and self._whole and self._status == 200 and call.status == "ok":
            self._cache.put(self._key, self._status, self._headers, b"".join(self._parts), call)


def key_of(call: Call, request: Request) -> bytes | None:
    """What the call is known by; None for one that isn't kept: only POSTs of known dialects are."""
    if request.method != "POST" or call.dialect.operation == "other" or call.body is None:
        return None
    parts = (call.tenant, request.target.base, request.target.provider, request.tail, request.query)
    return sha256("\0".join(parts).encode() + b"\0" + request.body).digest()
