"""Segments of other hosts' journals: taken into this one, each once, answered only when they are on disk.

A segment comes whole or in parts (`Part`). It gets its name, which makes it visible to the loader, after the last part
is synced and its checksum is right. A name that is here, or was (loaded, archived), is answered as stored.
"""

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from collector import archive, journal
from collector.errors import RatchetError, Unavailable
from collector.inserts import day_of
from collector.loader import kind, sift
from collector.part import DIGEST, Garbled, Part, Refused

# What proxies write; a registry's events come from its own collector alone.
EVENTS = frozenset(("span", "reward", "otlp"))
_NAME = re.compile(r"\d{19}-[0-9a-z]{1,16}-[a-z0-9]{1,32}-\d{1,10}-[0-9a-f]{8}")


@dataclass
class Counters:
    """What came since the start. `known`: sent again although it was here already; `refused`: never to be taken."""

    segments: int = 0
    bytes: int = 0
    known: int = 0
    refused: int = 0


class Loaded(Protocol):
    """What the loader knows."""

    def is_loaded(self, name: str) -> bool:
        """Whether the segment is in the store."""
        ...


class Inbox:
    """The way into the journal in `folder`. Any number of threads may call `take`."""

    def __init__(self, folder: Path, loaded: Loaded) -> None:
        self.counters = Counters()
        self._folder = folder
        self._loaded = loaded
        self._archive = folder.parent / archive.FOLDER
        self._lock = threading.Lock()
        self._busy: set[str] = set()

    def stats(self) -> dict[str, Any]:
        """The counters."""
        return asdict(self.counters)

    def take(self, name: str, part: Part, packed: bytes) -> bool:
        """Store a part, one zstd frame; True once the whole segment is on disk under its name.

        Raises Refused (no events of a proxy, or other bytes are here under that name): not to be sent again; Garbled
        and Unavailable: to be sent again from its first byte.
        """
        if not _NAME.fullmatch(name):
            raise Garbled("name: is not one of a sent segment", param="name")
        with self._alone(name):
            try:
                if self._is_known(name, part):
                    self.counters.known += 1
                    return True
                return self._store(name, part, part.unpack(packed))
            except Refused:
                self.counters.refused += 1
                raise
            except OSError as error:
                raise Unavailable(f"the segment cannot be stored: {error.strerror}") from None

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One request a name: a sender that lost patience may be back while its first request is still at work."""
        with self._lock:
            if name in self._busy:
                raise Unavailable(f"segment {name} is being received; try again")
            self._busy.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(name)

    def _is_known(self, name: str, part: Part) -> bool:
        """In this order: what leaves the journal is in the archive by then."""
        path = self._folder / (name + journal.SEALED)
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            # Manifests are long, so asked once a segment: whoever sends a later part was told that it is not there.
            return self._loaded.is_loaded(name) or (part.start == 0 and self._is_archived(name))
        if found != part.digest:
            raise Refused(f"segment {name} is here with other bytes", param="name")
        return True

    def _is_archived(self, name: str) -> bool:
        """Only a segment of an earlier day can be, under its day or a later one; manifests are kept for good."""
        day = day_of(name)
        if day >= archive.today():
            return False
        quoted, earliest = b'"%b"' % name.encode(), archive.day_name(day)
        manifests = self._archive.glob(f"[0-9]*-[0-9]*-[0-9]*/{archive.MANIFEST}")
        return any(quoted in path.read_bytes() for path in manifests if path.parent.name >= earliest)

    def _store(self, name: str, part: Part, data: bytes) -> bool:
        # The journal's name for what isn't finished: swept there when nobody goes on with it.
        temporary = self._folder / f".{name}-{part.digest[:16]}.tmp"
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size < part.start:
                raise Unavailable("an earlier part is missing; send the segment from its first byte")
            if os.pwrite(fd, data, part.start) != len(data):
                raise Unavailable("the segment cannot be stored: no space left")
            if part.end < part.total:
                return False
            os.ftruncate(fd, part.total)
            _check(temporary, part.digest)
            os.fdatasync(fd)
        except (RatchetError, OSError):
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        temporary.rename(self._folder / (name + journal.SEALED))
        journal.sync_directory(self._folder)
        self.counters.segments += 1
        self.counters.bytes += part.total
        return True


def _check(path: Path, digest: str) -> None:
    """Raises Garbled where bytes were lost on the way, Refused where a line is none of a proxy's."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise Garbled("what arrived is not what was sent: the checksum differs; send it again", param=DIGEST)
    # Lines that are broken already pass: the loader sets them aside, reports them and loads the rest.
    strange = {kind(line) for line in sift(data)[0]} - EVENTS
    if strange:
        raise Refused(
            f"the segment holds {', '.join(sorted(strange))} events, which only a collector writes; bring the history "
            "of a store over with `ratchet export` and `ratchet import`",
            param="segment",
        )
