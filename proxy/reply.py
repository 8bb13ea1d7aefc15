"""The head of an upstream's answer as the relay sees it, whichever client fetched it."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable
from functools import lru_cache

from collector.errors import RatchetError
from proxy.errors import Header, UpstreamError, UpstreamTimeout
from proxy.http1_errors import ReadTimeout, TransportError
from proxy.http1_response import Response
from proxy.packing import unpack

# What belongs to one hop only.
HOP = frozenset((b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection",
                 b"te", b"trailer", b"transfer-encoding", b"upgrade"))  # fmt: skip


_MOST_NAMES = 1024
_MOST = 64 << 20  # bytes of a packed answer that are unpacked for the record


class _Names(dict[bytes, bytes | None]):
    """Names as upstreams spell them -> in lower case, None: not passed on. They are few, so each is looked at once."""

    def __missing__(self, raw: bytes) -> bytes | None:
        lower = raw.lower()
        name = None if lower in HOP or lower.startswith(b"x-ratchet-") else lower
        if len(self) < _MOST_NAMES:
            self[raw] = name
        return name


_NAMES = _Names()


def passed_on(headers: Iterable[Header]) -> list[Header]:
    """An answer's headers without this hop's and without such as only we may set, names in lower case."""
    return [(name, value) for raw, value in headers if (name := _NAMES[raw]) is not None]


@lru_cache(256)
def is_stream(kind: bytes) -> bool:
    """Whether a content type is that of server-sent events."""
    return kind.strip().lower().startswith(b"text/event-stream")


class Reply(ABC):
    """Status, headers in lower case without this hop's and without such as only we may set, and the body to be read.
    `length`: of the body, where it was told. Reading raises UpstreamError or UpstreamTimeout."""

    cost_usd: float | None = None
    complete = False  # whether all of the body has come, as far as that is known

    def __init__(self, status: int, headers: Iterable[Header]) -> None:
        self.status = status
        self.headers = passed_on(headers)
        given = dict(self.headers)
        length = given.get(b"content-length", b"")
        self.length = int(length) if length.isdigit() else None
        self.stream = is_stream(given.get(b"content-type", b""))
        encoding = given.get(b"content-encoding")
        self.encoding = (encoding.strip().lower().decode("latin-1") if encoding else "") or "identity"

    def decoded(self, body: bytes) -> bytes | None:
        """A readable copy of the body; None for an encoding that isn't known here, or if it is cut."""
        return decoded(body, self.encoding)

    @abstractmethod
    async def read(self) -> bytes:
        """The whole body, as it came."""

    @abstractmethod
    def chunks(self) -> AsyncIterator[bytes]:
        """The body's bytes as they arrive."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of it: an answer not read whole is cut off, which cancels the call upstream."""


class RawReply(Reply):
    """An answer over the own client."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status, response.headers)
        self._response = response
        response.on_error = _told

    @property
    def complete(self) -> bool:  # type: ignore[override]  # here it is known
        """Whether all of the body has come."""
        return self._response.complete

    async def read(self) -> bytes:
        """The whole body, as it came."""
        return await self._response.read()

    def chunks(self) -> AsyncIterator[bytes]:
        """The body's bytes as they arrive."""
        return self._response

    def close(self) -> None:
        """Closes the connection if the answer was not read whole, which cancels the call upstream."""
        self._response.abort()


def decoded(body: bytes, encoding: str) -> bytes | None:
    """Upstreams are asked not to compress; for one that does anyway, the record reads a copy."""
    if encoding in ("identity", ""):
        return body
    if encoding in ("gzip", "x-gzip"):  # also of one that was cut: what there is counts
        try:
            return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, _MOST)
        except zlib.error:
            return None
    try:
        return unpack(body, encoding, _MOST)
    except RatchetError:
        return None


def _told(error: TransportError) -> Exception:
    return late() if isinstance(error, ReadTimeout) else broken()


def late() -> UpstreamTimeout:
    """The error for an upstream that let too much time pass."""
    return UpstreamTimeout("the upstream did not answer in time (upstream: the keys that end in _timeout)")


def broken() -> UpstreamError:
    """The error for an answer that stopped before its end."""
    return UpstreamError("the upstream broke off its answer", code="upstream_broken")
