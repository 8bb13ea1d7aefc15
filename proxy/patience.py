"""How long a client may take to say what it wants: a head in one go, a body at a kilobyte a second or more.

A client that sends a byte now and then holds a connection, and its body's memory, for as long as it likes. Nothing is
timed for each connection; once a second all of them are looked at.
"""

from collections.abc import Iterable

SLOWEST = 1024  # bytes a second that buy a client more time


class Reading:
    """How far the request of one connection has come. `since` is None while none is being read."""

    __slots__ = ("got", "head", "since")

    def __init__(self, now: float) -> None:
        self.begin(now)

    def begin(self, now: float) -> None:
        """A request, or the wait for the first one, begins."""
        self.since: float | None = now
        self.head = True
        self.got = 0

    def late(self, now: float, patience: float) -> bool:
        """Whether it takes longer than it may."""
        if self.since is None:
            return False
        bonus = 0 if self.head else self.got / SLOWEST
        return now - self.since > patience + bonus


def patrol(connections: Iterable[object], now: float, patience: float) -> None:
    """Looks at every connection of this server's own protocol."""
    for connection in list(connections):
        check = getattr(connection, "check_pace", None)
        if check is not None:
            check(now, patience)
