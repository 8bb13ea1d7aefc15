"""From sealed segments to rows: each segment exactly once, each line checked, what is broken set aside and counted."""

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import duckdb

from collector import journal
from collector.errors import BadRows, RatchetError
from collector.inserts import Segment
from collector.store import DATA_ERRORS, Store

QUARANTINE = "quarantine"
_BATCH_BYTES = 32 << 20
_BATCH_SEGMENTS = 256
_DUE_BYTES = 16 << 20
_DUE_SECONDS = 5.0  # unless somebody reads: a batch costs as much as a thousand rows
_ASKED_SECONDS = 0.5
_LISTING_SHARE = 50  # a directory of many segments is listed so seldom that it takes a fiftieth of the time
_RETRY_SECONDS = 30.0
_NOBODYS_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # the process is short of something, the file is not bad
_MARK_OF = b',"crc":"%08x"}'.__mod__
_CRC_BYTES = len(b',"crc":"00000000"}')
_HEAD = b'{"event":"'
_KIND_AT = len(_HEAD)
_KIND_END = _KIND_AT + max(map(len, journal.EVENTS)) + 1
_FRESH_SECONDS = 0.1  # a directory's time stamp is coarse: trust it only when it is older than this

log = logging.getLogger(__name__)


@dataclass
class Counters:
    """What the loader has done since it started. `lag_s` is the age of the oldest sealed segment not yet loaded;
    `unreadable` counts segments that cannot be read now, tried again every half minute and loaded once they can."""

    segments: int = 0
    lines: int = 0
    quarantined: int = 0
    unreadable: int = 0
    adopted: int = 0
    errors: int = 0
    lag_s: float = 0.0
    last_error: str | None = None


@dataclass(frozen=True)
class _Listing:
    """What the directory held when its time stamp was `stamp`: sizes of sealed segments that are not loaded, oldest
    first, and the names of open ones. Made at `at` (monotonic), in `took` seconds."""

    stamp: int = -1
    sealed: Mapping[str, int] = field(default_factory=dict)
    open: frozenset[str] = frozenset()
    at: float = 0.0
    took: float = 0.0


class Loader:
    """Loads what is sealed in `directory` into `store`. Used by one thread at a time."""

    def __init__(self, store: Store, directory: Path) -> None:
        self.counters = Counters()
        self._store = store
        self._directory = Path(directory)
        self._loaded = store.loaded()
        self._listing = _Listing()
        self._unreadable: dict[str, float] = {}  # name -> when to try again
        self._was_open: frozenset[str] = frozenset()
        self._since: float | None = None  # since when something waits
        self._last = -_ASKED_SECONDS  # when the last batch ended

    def is_loaded(self, name: str) -> bool:
        """Whether the segment of this name is in the store."""
        return name in self._loaded

    def forget(self, names: Iterable[str]) -> None:
        """Segments that are no longer in the journal need not be known any more."""
        self._loaded.difference_update(names)
        self._listing = _Listing()

    def adopt(self) -> int:
        """Seal what dead writers left open; returns how many segments."""
        if not self._list().open:
            return 0
        adopted = len(journal.adopt(self._directory))
        self.counters.adopted += adopted
        return adopted

    def adopt_left(self) -> int:
        """The same, to be called every second or so: where an open segment was there the last time already. Those of
        living writers rarely are."""
        before, self._was_open = self._was_open, self._glance().open
        return self.adopt() if before & self._was_open else 0

    def due(self, *, asked: bool = False) -> bool:
        """Whether it is time for a batch: when there is much, when something has waited for five seconds; and when
        somebody asked, half a second after the last batch.

        A segment is sealed after a second or at 4 MB, so a call can be read less than two seconds after its answer,
        and neither many writers nor few calls cost a transaction each second.
        """
        listing = self._list() if asked else self._glance()
        waiting = self._pending(listing)
        now = time.monotonic()
        if not waiting:
            self._since = None
            return False
        self._since = now if self._since is None else self._since
        if asked and now - self._last >= _ASKED_SECONDS:
            return True
        return now - self._since >= _DUE_SECONDS or sum(map(listing.sealed.__getitem__, waiting)) >= _DUE_BYTES

    def load_once(self) -> int:
        """Load every sealed segment that is not in the store yet, oldest first; returns the number of lines.

        A segment that cannot be read is set aside for a while, the rest is loaded. A failure of the store is counted
        and the rest is left for the next time.
        """
        lines = 0
        listing = self._list()
        for names in self._batches(listing):
            try:
                lines += self._load(names)
            except (duckdb.Error, OSError, RatchetError) as error:
                self._failed(error)
                break
            finally:
                self._last = time.monotonic()
        else:
            self._since = None
        self._measure_lag()
        return lines

    def _pending(self, listing: _Listing) -> list[str]:
        now = time.monotonic()
        return [name for name in listing.sealed if name not in self._loaded and now >= self._unreadable.get(name, 0.0)]

    def _batches(self, listing: _Listing) -> Iterator[list[str]]:
        """Some segments at a time: one transaction each, bounded in what may have to be read again."""
        batch: list[str] = []
        size = 0
        for name in self._pending(listing):
            batch.append(name)
            size += listing.sealed[name]
            if size >= _BATCH_BYTES or len(batch) >= _BATCH_SEGMENTS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _glance(self) -> _Listing:
        """The directory as it is or was a moment ago: it holds each segment of some days."""
        young = time.monotonic() - self._listing.at < _LISTING_SHARE * self._listing.took
        return self._listing if young else self._list()

    def _list(self) -> _Listing:
        """The directory as it is, read only when it has changed."""
        status = self._directory.stat()
        if status.st_mtime_ns != self._listing.stamp:
            began = time.monotonic()
            names = os.listdir(self._directory)
            sealed = {name.removesuffix(journal.SEALED) for name in names if name.endswith(journal.SEALED)}
            waiting = sorted(sealed - self._loaded)
            still = time.time() - status.st_mtime > _FRESH_SECONDS
            self._listing = _Listing(
                status.st_mtime_ns if still else -1,
                {name: self._size(name) for name in waiting},
                frozenset(name for name in names if name.endswith(journal.OPEN)),
                began,
                time.monotonic() - began,
            )
        return self._listing

    def _size(self, name: str) -> int:
        with contextlib.suppress(OSError):
            return (self._directory / (name + journal.SEALED)).stat().st_size
        return 0

    def _load(self, names: Sequence[str]) -> int:
        segments = [segment for name in names if (segment := self._readable(name)) is not None]
        if not segments:
            return 0
        try:
            self._store.load(segments)
        except (*DATA_ERRORS, BadRows) as error:
            if len(segments) > 1:
                return sum(self._load([segment.name]) for segment in segments)
            log.error("segment %s: a line does not fit the schema: %s", segments[0].name, error)
            segments = [self._salvage(segments[0])]
            self._store.load(segments)
        finally:
            for segment in segments:
                if segment.quarantined:
                    segment.path.unlink(missing_ok=True)
        for segment in segments:
            self._loaded.add(segment.name)
            self._unreadable.pop(segment.name, None)
            self.counters.segments += 1
            self.counters.lines += segment.lines
            self.counters.quarantined += segment.quarantined
        self.counters.unreadable = len(self._unreadable)
        return sum(segment.lines for segment in segments)

    def _readable(self, name: str) -> Segment | None:
        """The checked segment; None when it cannot be read now, which must not hold up the others."""
        try:
            return self._inspect(name)
        except FileNotFoundError:
            self._listing = _Listing()
            return None
        except OSError as error:
            if error.errno in _NOBODYS_FAULT:
                raise
            if name not in self._unreadable:
                log.error("segment %s cannot be read and is left aside: %s", name, error)
            self._unreadable[name] = time.monotonic() + _RETRY_SECONDS
            self.counters.unreadable = len(self._unreadable)
            self.counters.last_error = str(error)
            return None

    def _inspect(self, name: str) -> Segment:
        """Check every line; with broken ones, they go to quarantine and a copy of the rest is to be loaded."""
        path = self._directory / (name + journal.SEALED)
        data = path.read_bytes()
        whole = summary(data)
        if whole is not None:
            return Segment(name, path, whole.lines, len(data), whole.longest, whole.events)
        good, bad = sift(data)
        longest = max(map(len, good), default=0)
        segment = Segment(name, path, len(good), len(data), longest, frozenset(map(kind, good)))
        return self._set_aside(segment, good, bad) if bad else segment

    def _set_aside(self, segment: Segment, good: Sequence[bytes], bad: Sequence[bytes]) -> Segment:
        quarantine = self._directory / QUARANTINE
        quarantine.mkdir(mode=0o700, exist_ok=True)
        with (quarantine / f"{segment.name}.bad").open("ab" if segment.quarantined else "wb") as file:
            file.writelines(line + b"\n" for line in bad)
        clean = quarantine / f"{segment.name}.clean"
        clean.write_bytes(b"".join(line + b"\n" for line in good))
        log.error("segment %s: %d lines in quarantine", segment.name, len(bad))
        return replace(
            segment,
            path=clean,
            lines=len(good),
            events=frozenset(map(kind, good)),
            quarantined=segment.quarantined + len(bad),
        )

    def _salvage(self, segment: Segment) -> Segment:
        """Find the lines that the schema refuses by halving, and set them aside too."""
        lines = [line for line in segment.path.read_bytes().split(b"\n") if line.strip()]
        refused = set(self._refused(segment, range(len(lines)), lines))
        good = [line for index, line in enumerate(lines) if index not in refused]
        return self._set_aside(segment, good, [lines[index] for index in sorted(refused)])

    def _refused(self, segment: Segment, indices: Sequence[int], lines: Sequence[bytes]) -> Iterator[int]:
        trial = self._directory / QUARANTINE / f"{segment.name}.trial"
        trial.parent.mkdir(mode=0o700, exist_ok=True)
        trial.write_bytes(b"".join(lines[index] + b"\n" for index in indices))
        fits = self._store.fits(replace(segment, path=trial))
        trial.unlink()
        if fits:
            return
        if len(indices) == 1:
            yield indices[0]
            return
        middle = len(indices) // 2
        yield from self._refused(segment, indices[:middle], lines)
        yield from self._refused(segment, indices[middle:], lines)

    def _failed(self, error: Exception) -> None:
        if self.counters.last_error != str(error):
            log.error("loading failed, will be tried again: %s", error)
        self.counters.errors += 1
        self.counters.last_error = str(error)
        if isinstance(error, (duckdb.FatalException, duckdb.InternalException)):
            self._store.reopen()
            self._loaded = self._store.loaded()
            self._listing = _Listing()

    def _measure_lag(self) -> None:
        pending = next((name for name in self._listing.sealed if name not in self._loaded), None)
        self.counters.lag_s = 0.0
        if pending is not None:
            with contextlib.suppress(OSError):
                sealed = (self._directory / (pending + journal.SEALED)).stat().st_mtime
                self.counters.lag_s = round(max(0.0, time.time() - sealed), 3)


def kind(line: bytes) -> str:
    """The event of a line that `journal.encode` wrote, without parsing it."""
    return line[_KIND_AT : line.index(b'"', _KIND_AT)].decode()


class Summary(NamedTuple):
    """Of a segment without a broken line: how many lines, the length of the longest, their events."""

    lines: int
    longest: int
    events: frozenset[str]


def summary(data: bytes) -> Summary | None:
    """What `sift` would find, at half its cost, where each line is good; None where one is not, or was taken back."""
    view, find = memoryview(data), data.find
    crcs: list[int] = []
    marks: list[bytes] = []
    heads: set[bytes] = set()
    start = longest = 0
    while (end := find(b"\n", start)) >= 0:
        raw = max(start, end - _CRC_BYTES)
        crcs.append(crc32(view[start:raw]))
        marks.append(data[raw:end])
        heads.add(data[start : start + _KIND_END])
        if end - start > longest:
            longest = end - start
        start = end + 1
    if start < len(data) or b"".join(map(_MARK_OF, crcs)) != b"".join(marks):
        return None
    if not all(head.startswith(_HEAD) and b'"' in head[_KIND_AT:] for head in heads):
        return None
    return Summary(len(crcs), longest, frozenset(map(kind, heads)))


def sift(data: bytes) -> tuple[list[bytes], list[bytes]]:
    """`(good, bad)` lines; a line is good when it ends in the checksum of itself. Blank ones were taken back."""
    good: list[bytes] = []
    bad: list[bytes] = []
    for line in data.split(b"\n"):
        raw, mark = line[:-_CRC_BYTES], line[-_CRC_BYTES:]
        if mark == _MARK_OF(crc32(raw)) and raw.startswith(_HEAD):
            good.append(line)
        elif line.strip():
            bad.append(line)
    return good, bad
