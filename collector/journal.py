"""The journal: one append-only file per writer and second, the truth that everything else is derived from.

A line is one JSON object with a CRC32 of itself at its end. A writer holds a lock (flock) on its open segment for as
long as it lives; a segment is sealed by rename, and whoever finds an open segment that nobody locks may adopt it. So
an acknowledged line survives the death of any process, and no line belongs to two segments.

    <ns>-<role>-<pid>-<random>.open     being written
    <ns>-<role>-<pid>-<random>.ndjson   sealed, never changed again
"""

import contextlib
import fcntl
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from zlib import crc32

import orjson

from collector.errors import Unavailable

FOLDER = "journal"  # in the data directory
OPEN = ".open"
SEALED = ".ndjson"
EVENTS = ("span", "reward", "version", "candidate", "deployment", "evaluation", "job", "key", "otlp")
_CRC_BYTES = len(b',"crc":"00000000"}')
_STALE_TEMPORARY_SECONDS = 60.0

log = logging.getLogger(__name__)


def _opening(event: str) -> bytes:
    return b'{"event":"%b"' % event.encode()


_OPENINGS = {event: _opening(event) for event in EVENTS}


def encode(event: str, body: Any) -> bytes:
    """One journal line, newline included, of a dict or a dataclass instance.

    Raises TypeError where `body` holds what JSON cannot (a set, an integer of more than 64 bits, a lone surrogate).
    """
    fields = orjson.dumps(body)
    opening = _OPENINGS.get(event) or _opening(event)
    raw = b"%b,%b" % (opening, fields[1:-1]) if len(fields) > 2 else opening
    return b'%b,"crc":"%08x"}\n' % (raw, crc32(raw))


def decode(line: bytes) -> dict[str, Any]:
    """The fields of a line, with `event` and without `crc`. Raises ValueError when the line is torn or was changed."""
    line = line.rstrip(b"\n")
    raw, mark = line[:-_CRC_BYTES], line[-_CRC_BYTES:]
    if mark != b',"crc":"%08x"}' % crc32(raw):
        raise ValueError("checksum mismatch")
    fields: dict[str, Any] = orjson.loads(raw + b"}")
    return fields


class _Segment:
    """The open file of a writer. `size` is the length of what is known to be whole lines."""

    __slots__ = ("dirty_since", "fd", "linked", "opened", "path", "size", "unsynced", "waiters")

    def __init__(self, directory: Path, role: str) -> None:
        name = f"{time.time_ns():019d}-{role}-{os.getpid()}-{secrets.token_hex(4)}"
        temporary = directory / f".{name}.tmp"
        # Locked before it gets its public name, so that nobody can adopt it in between.
        self.fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.path = directory / (name + OPEN)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(temporary, self.path)
        except OSError:
            os.close(self.fd)
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self.size = 0
        self.opened = time.monotonic()
        self.dirty_since: float | None = None
        self.unsynced = 0
        self.linked = False  # whether the directory entry is known to be on disk
        self.waiters: list[tuple[Future[None], int, int]] = []  # (future, offset, length of the line)


class Journal:
    """The writer of one process. `append` and `append_durable` may be called from any thread.

    One thread of its own syncs: within `sync_seconds` for plain lines, at once for waiters, many lines by one
    fdatasync. It sleeps while nothing is written.
    """

    def __init__(
        self,
        directory: Path,
        role: str,
        *,
        seal_seconds: float = 1.0,
        seal_bytes: int = 4 << 20,
        sync_seconds: float = 0.02,
    ) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.role = role
        self.written = 0
        self.synced = 0
        self.dropped = 0
        self.bytes = 0
        self.healthy = True
        self.last_error: str | None = None
        self._seal_seconds = seal_seconds
        self._seal_bytes = seal_bytes
        self._sync_seconds = sync_seconds
        self._segment: _Segment | None = None
        self._sealing: list[_Segment] = []
        self._closed = False
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name=f"journal-{role}", daemon=True)
        self._thread.start()

    def append(self, event: str, body: Any) -> None:
        """Write one line now, sync it soon. Never waits for the disk and never raises: loss is counted in `dropped`."""
        try:
            line = encode(event, body)
        except TypeError as error:
            self._lost(error)
            return
        with self._lock:  # the condition's own, which is cheaper to take by its name
            self._write(line, None)

    def append_durable(self, event: str, body: Any) -> "Future[None]":
        """Write one line; the future resolves once it is on disk, or fails with Unavailable and nothing is stored."""
        future: Future[None] = Future()
        # Under way from the start: who stops waiting must not cancel it under the thread that will answer.
        future.set_running_or_notify_cancel()
        try:
            line = encode(event, body)
        except TypeError as error:
            self._lost(error)
            future.set_exception(Unavailable(f"cannot be written to the journal: {error}"))
            return future
        with self._wake:
            self._write(line, future)
        return future

    def seal(self) -> None:
        """Hand the open segment over for sync and rename now; what is appended next starts a new one."""
        with self._wake:
            self._hand_over()

    def close(self) -> None:
        """Seal what is open, wait for the disk, stop. Later lines are refused and counted."""
        with self._wake:
            self._closed = True
            self._hand_over()
            self._wake.notify()
        self._thread.join()

    @property
    def counters(self) -> dict[str, Any]:
        """Lines `written`, `synced`, `dropped`, and `bytes`, for status pages and metrics."""
        names = ("written", "synced", "dropped", "bytes", "healthy", "last_error")
        return {name: getattr(self, name) for name in names}

    def _write(self, line: bytes, waiter: "Future[None] | None") -> None:
        """Append under the lock. A line is stored whole or not at all."""
        segment = self._segment
        try:
            if self._closed:
                raise OSError("the journal is closed")
            if segment is None:
                segment = self._start()
            if os.write(segment.fd, line) != len(line):
                raise OSError(f"not all of {len(line)} bytes fitted")
        except OSError as error:
            if segment is not None:
                self._undo(segment)
            self._lost(error)
            if waiter is not None:
                waiter.set_exception(Unavailable(f"the journal cannot be written: {error}"))
            return
        if waiter is not None:
            segment.waiters.append((waiter, segment.size, len(line)))
        segment.size += len(line)
        segment.unsynced += 1
        self.written += 1
        self.bytes += len(line)
        if segment.dirty_since is None or waiter is not None:
            segment.dirty_since = segment.dirty_since or time.monotonic()
            self._wake.notify()
        if segment.size >= self._seal_bytes:
            self._hand_over()

    def _start(self) -> _Segment:
        try:
            self._segment = _Segment(self.directory, self.role)
        except FileNotFoundError:  # the directory was removed under us: a fresh one serves as well
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._segment = _Segment(self.directory, self.role)
        return self._segment

    def _undo(self, segment: _Segment) -> None:
        """Cut off a line that was written in part."""
        try:
            os.ftruncate(segment.fd, segment.size)
        except OSError:  # the tail stays torn: leave this segment, so that nothing is glued to it
            self._hand_over()

    def _hand_over(self) -> None:
        if self._segment is not None:
            self._sealing.append(self._segment)
            self._segment = None
            self._wake.notify()

    def _lost(self, error: Exception) -> None:
        if self.healthy:
            log.error("journal %s: a line was lost: %s", self.role, error)
        self.dropped += 1
        self._unwell(error)

    def _unwell(self, error: Exception) -> None:
        self.healthy = False
        self.last_error = str(error)

    # The sync thread: the only one that closes or renames a segment.

    def _run(self) -> None:
        while True:
            with self._wake:
                self._sleep()
                segment = self._segment
                if segment is not None and time.monotonic() - segment.opened >= self._seal_seconds:
                    self._hand_over()
                sealing, self._sealing = self._sealing, []
                closed = self._closed
            for one in sealing:
                self._seal(one)
            segment = self._segment
            if segment is not None and segment.dirty_since is not None:
                self._sync(segment)
            if closed and not self._sealing:
                return

    def _sleep(self) -> None:
        """Wait, lock held, until something is due: a sealing, a waiter, 20 ms of unsynced lines, 1 s of segment."""
        while not self._sealing and not self._closed:
            segment = self._segment
            if segment is None:
                self._wake.wait()
                continue
            if segment.waiters:
                return
            due = segment.opened + self._seal_seconds
            if segment.dirty_since is not None:
                due = min(due, segment.dirty_since + self._sync_seconds)
            left = due - time.monotonic()
            if left <= 0:
                return
            self._wake.wait(left)

    def _sync(self, segment: _Segment) -> None:
        with self._wake:
            waiters, segment.waiters = segment.waiters, []
            count, segment.unsynced = segment.unsynced, 0
            segment.dirty_since = None
        try:
            os.fdatasync(segment.fd)
            if not segment.linked:
                sync_directory(self.directory)
                segment.linked = True
        except OSError as error:
            self._sync_failed(segment, waiters, error)
            return
        self.synced += count
        self.healthy = True
        for future, _, _ in waiters:
            future.set_result(None)

    def _sync_failed(
        self, segment: _Segment, waiters: Iterable[tuple["Future[None]", int, int]], error: OSError
    ) -> None:
        """The kernel may have thrown the pages away: answer the waiters with an error and blank what they wrote."""
        log.error("journal %s: cannot sync %s: %s", self.role, segment.path.name, error)
        self._unwell(error)
        with self._wake:
            if segment is self._segment:
                self._hand_over()
        for future, offset, length in waiters:
            with contextlib.suppress(OSError):
                _blank(segment.path, offset, length)
            self.dropped += 1
            future.set_exception(Unavailable(f"the journal cannot be synced: {error}"))

    def _seal(self, segment: _Segment) -> None:
        if segment.dirty_since is not None:
            self._sync(segment)
        try:
            if segment.size:
                os.rename(segment.path, segment.path.with_suffix(SEALED))
            else:
                segment.path.unlink()
        except OSError as error:  # left open and unlocked: the collector adopts it
            self._unwell(error)
        finally:
            os.close(segment.fd)


def _blank(path: Path, offset: int, length: int) -> None:
    """Overwrite one line by spaces: readers skip blank lines. A file opened to append cannot do that, so open again."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(fd, b" " * (length - 1), offset)
    finally:
        os.close(fd)


def sync_directory(directory: Path) -> None:
    """Make names that were created or renamed in `directory` survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def adopt(directory: Path) -> list[Path]:
    """Seal the open segments of dead writers: torn tail trimmed, synced, renamed. Returns the sealed paths."""
    adopted: list[Path] = []
    for path in sorted(directory.glob("*" + OPEN)):
        with contextlib.suppress(OSError):
            sealed = _adopt_one(path)
            if sealed is not None:
                adopted.append(sealed)
    for path in directory.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_TEMPORARY_SECONDS:
                path.unlink()
    if adopted:
        sync_directory(directory)
    return adopted


def _adopt_one(path: Path) -> Path | None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its writer lives
        if os.stat(path).st_ino != os.fstat(fd).st_ino:  # sealed by its writer since we looked
            return None
        size = _whole_lines(fd)
        if not size:
            path.unlink()
            return None
        os.ftruncate(fd, size)
        os.fsync(fd)
        sealed = path.with_suffix(SEALED)
        os.rename(path, sealed)
        return sealed
    finally:
        os.close(fd)


def _whole_lines(fd: int, block: int = 1 << 16) -> int:
    """The length of the file up to and including its last newline."""
    end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - block)
        at = os.pread(fd, end - start, start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0
