"""Care of a store on ClickHouse: it merges and compresses by itself, so what is left is the journal and old days.

`compact` gives the room of ended days back here: spans and rewards that ClickHouse holds leave the journal, all other
lines stay, for the local file is made of them. From then on ClickHouse alone has those spans. `retain` deletes whole
days there.
"""

import logging
import os
from collections import defaultdict
from pathlib import Path

from collector import journal
from collector.archive import day_name
from collector.clickhouse import BULK, ClickHouse
from collector.inserts import day_of
from collector.keeper import Keeper, Report
from collector.loader import kind, sift

log = logging.getLogger(__name__)


class ClickHouseKeeper(Keeper):
    """The same two calls. Both raise Unavailable while ClickHouse does not answer."""

    def _remote(self) -> ClickHouse:
        if not isinstance(self._store, ClickHouse):
            raise TypeError("this keeper is for a store on ClickHouse")
        return self._store

    def _compact(self, before: int, dry_run: bool) -> Report:
        """Trim the journal's segments of the days before one, those that both sides hold."""
        for left in () if dry_run else self._journal.glob("*.trimmed"):  # by a process that was killed
            left.unlink(missing_ok=True)
        report = Report(dry_run=dry_run)
        by_day: defaultdict[int, list[str]] = defaultdict(list)
        for path in sorted(self._journal.glob("*" + journal.SEALED)):
            if day_of(path.stem) < before and self._loader.is_loaded(path.stem):
                by_day[day_of(path.stem)].append(path.stem)
        for day, names in by_day.items():
            held = self._remote().noted(names)
            trimmed = [_trim(self._journal, name, dry_run) for name in names if name in held]
            gone = [name for name in names if name in held and not (self._journal / (name + journal.SEALED)).exists()]
            if gone and not dry_run:
                with self._loading:
                    self._store.forget(gone)
                    self._loader.forget(gone)
            if any(freed for freed, _, _ in trimmed):
                report.days.append(day_name(day))
                report.segments += sum(freed > 0 for freed, _, _ in trimmed)
                report.bytes += sum(freed for freed, _, _ in trimmed)
                report.spans += sum(spans for _, spans, _ in trimmed)
                report.rewards += sum(rewards for _, _, rewards in trimmed)
        if report.segments and not dry_run:
            journal.sync_directory(self._journal)
            log.info("%d bytes of the journal given back, ClickHouse holds their rows", report.bytes)
        return report

    def _would_go(self, before: int) -> Report:
        report = Report(dry_run=True)
        self._count_old(report, before)
        return report

    def _delete(self, before: int) -> Report:
        report = Report()
        for day in self._count_old(report, before):
            self._remote().drop_day(day)
        return report

    def _count_old(self, report: Report, before: int) -> list[int]:
        found = self._remote().old_days(before)
        report.days += [day_name(day) for day, _, _ in found]
        report.spans += sum(spans for _, spans, _ in found)
        report.rewards += sum(rewards for _, _, rewards in found)
        return [day for day, _, _ in found]


def _trim(folder: Path, name: str, dry_run: bool) -> tuple[int, int, int]:
    """`(bytes freed, spans, rewards)`: the segment without them, or no segment where nothing else is in it."""
    path = folder / (name + journal.SEALED)
    data = path.read_bytes()
    good, _ = sift(data)  # what is broken stands in quarantine
    kept = [line for line in good if kind(line) not in BULK]
    if len(kept) == len(good):
        return 0, 0, 0
    rest = b"".join(line + b"\n" for line in kept)
    if not dry_run:
        _put(path, rest)
    kinds = [kind(line) for line in good]
    return len(data) - len(rest), kinds.count("span") + kinds.count("otlp"), kinds.count("reward")


def _put(path: Path, data: bytes) -> None:
    """Replace a file by this, or remove it: whole, whatever happens."""
    if not data:
        path.unlink()
        return
    temporary = path.with_suffix(".trimmed")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
