"""Care of a running store: old days move to the archive, and days that are too old are deleted. One at a time."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from collector import archive, journal
from collector.archive import Part, day_name, today
from collector.errors import BadInput, Unavailable
from collector.loader import QUARANTINE, Loader, kind, sift
from collector.settings import Storage
from collector.store import Store

_FIRST_SECONDS = 60.0
_EVERY_SECONDS = 3600.0
_BULK = frozenset(("span", "otlp", "reward"))  # what goes into Parquet files; all else stays lines

log = logging.getLogger(__name__)


@dataclass
class Report:
    """What was moved or deleted (with `dry_run`: would be), by days."""

    days: list[str] = field(default_factory=list)
    spans: int = 0
    rewards: int = 0
    segments: int = 0
    bytes: int = 0
    dry_run: bool = False


class Keeper:
    """Compaction and retention of one store. `loading` is held by whoever loads; here only for moments."""

    def __init__(
        self, store: Store, loader: Loader, loading: "threading.Lock", settings: Storage, folder: Path
    ) -> None:
        self._store = store
        self._loader = loader
        self._loading = loading
        self._settings = settings
        self._journal = folder
        self._busy = threading.Lock()

    def compact(self, days: int = 1, dry_run: bool = False) -> dict[str, Any]:
        """Move the days that ended `days` or more days ago (1: all before today) to the archive.

        Raises BadInput, Unavailable where the store lacks something that the journal has; then nothing is deleted.
        """
        if days < 1:
            raise BadInput("days: the day under way stays as it is; give 1 or more", param="days")
        with self._busy:
            return asdict(self._compact(today() - days + 1, dry_run))

    def retain(self, days: int, dry_run: bool = False) -> dict[str, Any]:
        """Delete the spans, payloads and rewards of the days that ended more than `days` days ago. Raises BadInput."""
        if days < 1:
            raise BadInput("days: the day under way cannot be deleted; give 1 or more", param="days")
        with self._busy:
            before = today() - days
            if dry_run:
                return asdict(self._would_go(before))
            self._compact(before, False)
            return asdict(self._delete(before))

    def run(self, stop: threading.Event) -> None:
        """What the settings ask for, every hour, until `stop`."""
        pause = _FIRST_SECONDS
        while not stop.wait(pause):
            pause = _EVERY_SECONDS
            try:
                if self._settings.archive_after is not None:
                    self.compact(self._settings.archive_after)
                if self._settings.retention is not None:
                    self.retain(self._settings.retention)
            except Exception:  # the boundary of the keeper's thread: tried again in an hour, traffic goes on
                log.exception("the store could not be compacted")

    # Compaction

    def _compact(self, before: int, dry_run: bool) -> Report:
        report = Report(dry_run=dry_run)
        for day in self._store.loaded_days(before):
            if dry_run:
                self._count(report, day)
                continue
            part = self._compact_day(day)
            report.days.append(part.name)
            report.spans += part.rows["spans"]
            report.rewards += part.rows["rewards"]
            report.segments += len(part.segments)
            report.bytes += self._store.archive.size(part)
        return report

    def _count(self, report: Report, day: int) -> None:
        spans, rewards, segments = self._store.rows_of_day(day)
        report.days.append(day_name(day))
        report.spans += spans
        report.rewards += rewards
        report.segments += segments

    def _compact_day(self, day: int) -> Part:
        began = time.monotonic()
        with self._loading:  # from here on, a late segment of this day is added to the next one
            segments = self._store.close_day(day)
        try:
            part = self._store.write_part(day, segments, _Lines(self._journal, [name for name, _ in segments]))
        except BaseException:
            self._store.reopen_day(day)
            raise
        with self._loading:
            self._store.take_out(part)
            archive.sweep(self._journal, part.segments)
            self._loader.forget(part.segments)
        self._store.checkpoint()
        log.info("archived %s: %d spans in %.1f s", part.name, part.rows["spans"], time.monotonic() - began)
        return part

    # Retention

    def _old(self, before: int) -> list[Part]:
        return [part for part in self._store.archive.parts() if part.day < before and not part.retained]

    def _would_go(self, before: int) -> Report:
        report = Report(dry_run=True)
        for part in self._old(before):
            self._add(report, part)
        for day in self._store.loaded_days(before):
            self._count(report, day)
        return report

    def _delete(self, before: int) -> Report:
        report = Report()
        for part in self._old(before):
            self._add(report, part)
            marked = self._store.archive.mark_retained(part)
            self._store.remove_day(part.day)
            self._store.archive.unlink(marked)
        if report.days:
            self._store.checkpoint()
            log.info("deleted %s to %s: %d spans", report.days[0], report.days[-1], report.spans)
        return report

    def _add(self, report: Report, part: Part) -> None:
        report.days.append(part.name)
        report.spans += part.rows["spans"]
        report.rewards += part.rows["rewards"]
        report.segments += len(part.segments)
        report.bytes += self._store.archive.size(part)


class _Lines:
    """The lines of some segments that are no spans and rewards, in order; `spans` counts those of the proxy."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder = folder
        self._names = names
        self.spans = 0

    def __iter__(self) -> Iterator[bytes]:
        for name in self._names:
            try:
                data = (self._folder / (name + journal.SEALED)).read_bytes()
            except OSError as error:
                raise Unavailable(f"segment {name} cannot be read, its day stays in the journal: {error}") from None
            bad = self._folder / QUARANTINE / f"{name}.bad"
            refused = frozenset(bad.read_bytes().split(b"\n")) if bad.exists() else frozenset()
            for line in sift(data)[0]:
                if line in refused:
                    continue
                event = kind(line)
                self.spans += event == "span"
                if event not in _BULK:
                    yield line
