"""How much each key may use: requests a minute, calls at once, tokens and dollars a day and in all.

Counted in a small mapped file that all workers share, so the limits are the server's, not each worker's, and survive
restarts and kills. A call is admitted by what was used before it; what it uses itself counts once it is over, so a
budget ends with the calls that are running when it is reached. What an upstream doesn't tell isn't counted: a stream
cut before its usage, a model without a price. Calls of keys without limits never get here.

    record   key (16 bytes) | minute | requests in it | day | tokens, dollars of the day | tokens, dollars in all |
             calls running, one number a worker (u32 x 64)
"""

import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from proxy.errors import Limited, Overloaded
from proxy.table import key

WORKERS = 64
_KEYS = 1024
_COUNTS = struct.Struct("<16sQQQQdQd")
_RUNNING = struct.Struct(f"<{WORKERS}I")
_RECORD = _COUNTS.size + _RUNNING.size
_ONE = struct.Struct("<I")


@dataclass
class Used:
    """What a key has used, by the clock of `now`: counts of a past minute or day are 0."""

    requests: int
    running: int
    tokens_day: int
    usd_day: float
    tokens: int
    usd: float


class Meter:
    """The file. Raises OSError if it can't be mapped."""

    def __init__(self, path: Path, index: int = 0) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._index = index
        size = _KEYS * _RECORD
        with self._locked():
            os.ftruncate(self._file, size)
            if hasattr(os, "posix_fallocate"):  # who writes to a hole of a mapped file while the disk is full is killed
                os.posix_fallocate(self._file, 0, size)
            self._map = mmap.mmap(self._file, size)
            for at in range(0, size, _RECORD):  # what this worker ran before it was killed runs no longer
                _ONE.pack_into(self._map, at + _COUNTS.size + 4 * index, 0)

    def close(self) -> None:
        """Unmaps; the file stays."""
        self._map.close()
        os.close(self._file)

    def enter(self, ident: str, limits: Mapping[str, float], now: float | None = None) -> None:
        """Admits a call, which is to `leave` again. Raises Limited, with the seconds after which to try again."""
        now = time.time() if now is None else now
        with self._locked():
            at = self._find(ident)
            used = self._used(at, now)
            check(used, limits, now)
            self._write(at, ident, now, used, requests=1, running=1)

    def leave(self, ident: str, tokens: int, usd: float, now: float | None = None) -> None:
        """A call is over, and has used that much."""
        now = time.time() if now is None else now
        with self._locked():
            at = self._find(ident)
            self._write(at, ident, now, self._used(at, now), running=-1, tokens=tokens, usd=usd)

    def used(self, ident: str, now: float | None = None) -> Used:
        """What a key has used."""
        with self._locked():
            return self._used(self._find(ident), time.time() if now is None else now)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _find(self, ident: str) -> int:
        """Where the key's record is, or a free one for it."""
        digest = key("limits", ident)
        start = int.from_bytes(digest[:4], "little")
        for step in range(_KEYS):
            at = (start + step) % _KEYS * _RECORD
            held = self._map[at : at + 16]
            if held in (digest, b"\0" * 16):
                return at
        raise Overloaded("more keys with limits than can be counted", code="too_many_keys")

    def _used(self, at: int, now: float) -> Used:
        _, minute, requests, day, tokens_day, usd_day, tokens, usd = _COUNTS.unpack_from(self._map, at)
        running = sum(_RUNNING.unpack_from(self._map, at + _COUNTS.size))
        today = day == now // 86400
        return Used(
            requests if minute == now // 60 else 0,
            running,
            tokens_day if today else 0,
            usd_day if today else 0.0,
            tokens,
            usd,
        )

    def _write(
        self, at: int, ident: str, now: float, used: Used, *, requests: int = 0, running: int, tokens: int = 0,
        usd: float = 0.0
    ) -> None:  # fmt: skip
        mine = at + _COUNTS.size + 4 * self._index
        _ONE.pack_into(self._map, mine, max(0, _ONE.unpack_from(self._map, mine)[0] + running))
        _COUNTS.pack_into(
            self._map,
            at,
            key("limits", ident),
            int(now // 60),
            used.requests + requests,
            int(now // 86400),
            used.tokens_day + tokens,
            used.usd_day + usd,
            used.tokens + tokens,
            used.usd + usd,
        )


def check(used: Used, limits: Mapping[str, float], now: float) -> None:
    """Raises Limited where one of the limits is reached."""
    tomorrow = 86400 - int(now % 86400)
    rules = (
        ("requests_per_minute", used.requests, "rate_limit_exceeded", 60 - int(now % 60)),
        ("concurrent", used.running, "concurrency_limit_exceeded", 1),
        ("tokens_per_day", used.tokens_day, "budget_exceeded", tomorrow),
        ("usd_per_day", used.usd_day, "budget_exceeded", tomorrow),
        ("tokens_total", used.tokens, "budget_exceeded", 86400),
        ("usd_total", used.usd, "budget_exceeded", 86400),
    )
    for name, value, code, seconds in rules:
        limit = limits.get(name)
        if limit is not None and value >= limit:
            raise Limited(f"this key's limit is reached: {name} {limit:g}", seconds, code=code)
