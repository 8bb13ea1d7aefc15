"""Heads of requests that were read before. A client sends the same one with every call, but for the body's length.

The first of a kind is read by the strict parser and goes through every check; what came of it is kept under its bytes,
the digits of content-length left out. A head with the same bytes says the same, so it isn't read again.
"""

from collections.abc import Mapping
from typing import Any

from proxy.auth import Guard
from proxy.dialects import OTHER
from proxy.dialects.base import Dialect
from proxy.errors import Header
from proxy.joining import RETRIES, is_retry
from proxy.openings import Openings
from proxy.paths import Route

MOST = 512  # heads that are kept
_LARGEST = 8 << 10  # bytes of one that is kept
_BEFORE_DIGITS = b"\r\ncontent-length: "
# What makes a request unusual, or its head one that won't come again.
_UNUSUAL = frozenset((b"transfer-encoding", b"upgrade", b"expect", b"content-encoding", b"x-ratchet-slot"))
_UNIQUE = frozenset(
    b"traceparent tracestate baggage idempotency-key x-request-id x-client-request-id x-correlation-id sentry-trace "
    b"x-datadog-trace-id x-datadog-parent-id b3 x-b3-traceid x-b3-spanid x-amzn-trace-id x-cloud-trace-context".split()
)
_LEFT_OUT = _UNUSUAL | _UNIQUE


class Head:
    """What is known of a head: its headers, what its URL asks for, whose key it has, and under which deployments that
    was found out. `plans` is for whoever sends such calls on."""

    __slots__ = (
        "awaited",
        "dialect",
        "given",
        "headers",
        "limited",
        "named",
        "openings",
        "plans",
        "query",
        "raw_path",
        "route",
        "seen",
        "tenant",
    )

    def __init__(self, route: Route, dialect: Dialect, scope: Any, given: dict[bytes, bytes]) -> None:
        named = given.get(b"x-ratchet-episode")
        self.route = route
        self.dialect = dialect
        self.headers: list[Header] = scope["headers"]
        self.given = given
        self.raw_path: bytes = scope["raw_path"]
        self.query: bytes = scope["query_string"]
        self.named = None if named is None else named.decode("latin-1").strip()
        self.awaited = RETRIES in given
        self.tenant = ""
        self.limited = False  # whether the key may use only so much
        self.seen = 0
        self.plans: dict[str | None, Any] = {}
        self.openings = Openings()

    def allowed(self, guard: Guard, now: int) -> None:
        """Asks again whose key it is, because the deployments, and keys with them, have changed: they are number `now`.
        Raises Unauthorized or Forbidden."""
        self.plans = {}
        self.openings = Openings()
        self.tenant = guard.authorise(self.given, "agent") or ""
        self.limited = bool(guard.limits(self.tenant))
        self.seen = now


def cut(data: bytes) -> tuple[bytes, bytes, bytes] | None:
    """A request as it came: its head without the digits of its length, those digits, and its body as far as it is
    there. None where there is no whole head, or no length in it."""
    end = data.find(b"\r\n\r\n")
    at = data.find(b"ength: ", 0, end) + 7 if end > 0 else 6
    if at == 6:
        return None
    stop = data.find(b"\r", at)
    return data[:at] + data[stop:end], data[at:stop], data[end + 4 :]


class Heads(dict[bytes, Head]):
    """The heads that were seen, by their bytes as `cut` gives them."""

    def learn(self, key: bytes, scope: Any, given: dict[bytes, bytes], route: Route) -> None:
        """Keeps a head that was found to be in order, if it is one that is worth it. `key` belongs to the request that
        the parser has read as `scope`."""
        dialect = route.dialect
        if dialect is None or not _usual(key, scope, given, route) or is_retry(given):
            return
        if len(self) >= MOST:
            del self[next(iter(self))]
        self[key] = Head(route, dialect, scope, given)


def _usual(key: bytes, scope: Any, given: Mapping[bytes, bytes], route: Route) -> bool:
    names = [name for name, _ in scope["headers"]]
    lines = key.count(b"\r\n")
    at = key.lower().find(_BEFORE_DIGITS)
    return (
        route.dialect is not OTHER
        and route.pins is None
        and len(key) <= _LARGEST
        and scope["http_version"] == "1.1"
        # A line each, none of them bare or folded: the parser and `cut` mean the same head and the same length.
        and lines == len(names) == key.count(b"\n")
        and names.count(b"content-length") == 1
        and names.count(b"connection") <= 1
        and at >= 0
        and at + len(_BEFORE_DIGITS) == key.find(b"ength: ") + 7
        and given.get(b"connection", b"keep-alive").lower() == b"keep-alive"
        and _LEFT_OUT.isdisjoint(names)
    )
