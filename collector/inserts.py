"""Journal segments into tables: one transaction of the caller's, rows and the segments' names together."""

import time
from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collector.settle import settle

_DAY_NS = 86_400 * 1_000_000_000

_PAYLOADS = {
    "payloads": "INSERT INTO payloads BY NAME SELECT *, $day AS day FROM journal_payloads($files, $size, 'span')",
    "fresh_payloads": """
        INSERT INTO fresh_payloads BY NAME SELECT *, $day AS day FROM journal_payloads($files, $size, 'span')""",
}
# Spans and rewards carry the batch and the day that brought them; see schema.sql.
_INSERTS: dict[str, tuple[str, ...]] = {
    "span": (
        "INSERT INTO spans BY NAME SELECT *, $batch AS batch, $day AS day FROM journal_calls($files, $size, 'span')",
    ),
    # Exporters send again what they had no answer for: known by the span's id. Payloads first, by what `spans` lacks.
    "otlp": (
        """INSERT INTO payloads BY NAME
        SELECT *, $day AS day FROM journal_payloads($files, $size, 'otlp') AS new
        WHERE NOT EXISTS (SELECT 1 FROM spans AS old WHERE old.span_id = new.span_id)
          AND NOT EXISTS (SELECT 1 FROM echoes AS old WHERE old.span_id = new.span_id)
        QUALIFY row_number() OVER (PARTITION BY span_id ORDER BY start_ns, hash(new)) = 1""",
        """INSERT INTO spans BY NAME
        SELECT *, $batch AS batch, $day AS day FROM journal_calls($files, $size, 'otlp') AS new
        WHERE NOT EXISTS (SELECT 1 FROM spans AS old WHERE old.span_id = new.span_id)
          AND NOT EXISTS (SELECT 1 FROM echoes AS old WHERE old.span_id = new.span_id)
        QUALIFY row_number() OVER (PARTITION BY span_id ORDER BY start_ns, hash(new)) = 1""",
    ),
    "reward": (
        """INSERT INTO rewards BY NAME
        SELECT *, $day AS day, key_of(target_id) AS target_key FROM journal_rewards($files, $size) AS new
        WHERE NOT EXISTS (SELECT 1 FROM rewards AS old WHERE old.reward_id = new.reward_id)
        QUALIFY row_number() OVER (PARTITION BY reward_id ORDER BY ts_ns, value) = 1""",
    ),
    "version": ("INSERT INTO versions BY NAME FROM journal_versions($files, $size)",),
    "candidate": ("INSERT INTO candidates BY NAME FROM journal_candidates($files, $size)",),
    "deployment": ("INSERT INTO deployments BY NAME FROM journal_deployments($files, $size)",),
    "evaluation": (
        """INSERT INTO evaluations BY NAME FROM journal_evaluations($files, $size) AS new
        WHERE NOT EXISTS (SELECT 1 FROM evaluations AS old WHERE old.evaluation_id = new.evaluation_id)
        QUALIFY row_number() OVER (PARTITION BY evaluation_id ORDER BY ts_ns) = 1""",
    ),
    "job": ("INSERT INTO jobs BY NAME FROM journal_jobs($files, $size)",),
    "key": ("INSERT INTO keys BY NAME FROM journal_keys($files, $size)",),
}
_SEGMENTS = """
INSERT INTO _segments SELECT unnest($names), unnest($lines), unnest($quarantined), unnest($bytes), $now, $batch, $day
"""
_NEXT_ROW = "SELECT coalesce(max(rowid), -1) + 1 FROM spans"


@dataclass(frozen=True)
class Segment:
    """A sealed segment about to be loaded. `path` is the file to read: a cleaned copy where lines were quarantined."""

    name: str
    path: Path
    lines: int
    bytes: int
    longest: int
    events: frozenset[str]
    quarantined: int = 0

    @property
    def day(self) -> int:
        """The day of its first line by its writer's clock: days since 1970 (UTC). A name without a time is day 0."""
        return day_of(self.name)


def day_of(name: str) -> int:
    """The day of a segment by its name, which begins with nanoseconds."""
    digits = name.partition("-")[0]
    return int(digits) // _DAY_NS if digits.isdecimal() and len(digits) <= 19 else 0


def insert(
    cursor: Any,
    segments: Sequence[Segment],
    batch: int,
    closed: Set[int] = frozenset(),
    payloads: str = "payloads",
    *,
    observed: bool = True,
) -> None:
    """Insert rows and names as batch number `batch`, within the caller's transaction. Days that are `closed` get no
    more rows. The payloads of recorded calls go to the table `payloads` or `fresh_payloads`. `observed`: there may be
    agents' own spans in the store, which new ones can tell something about.

    Raises duckdb's errors where a line does not fit.
    """
    events = frozenset().union(*(segment.events for segment in segments))
    settles = "otlp" in events or ("span" in events and observed)
    first = cursor.execute(_NEXT_ROW).fetchall()[0][0] if settles else None
    by_day: defaultdict[int, list[Segment]] = defaultdict(list)
    for segment in segments:
        by_day[_open_day(segment.day, closed)].append(segment)
    for day, group in by_day.items():
        _insert_day(cursor, group, batch, day, _PAYLOADS[payloads])
    if first is not None:
        _settle(cursor, first, events)


def _insert_day(cursor: Any, segments: Sequence[Segment], batch: int, day: int, payloads: str) -> None:
    size = max(16 << 20, max(segment.longest for segment in segments) + 1024)
    for event, statements in _INSERTS.items():
        files = [str(segment.path.resolve()) for segment in segments if event in segment.events]
        given = {"files": files, "size": size, "batch": batch, "day": day}
        wanted = (*statements, payloads) if event == "span" else statements
        for statement in wanted if files else ():
            cursor.execute(statement, {name: value for name, value in given.items() if f"${name}" in statement})
    columns = {name: [getattr(one, name) for one in segments] for name in ("lines", "quarantined", "bytes")}
    about = {"names": [one.name for one in segments], "now": time.time_ns(), "batch": batch, "day": day}
    cursor.execute(_SEGMENTS, {**columns, **about})


def _open_day(day: int, closed: Set[int]) -> int:
    """The day to which a segment's rows are added: its own, or where that is in the archive the next that is not."""
    while day in closed:
        day += 1
    return day


def _settle(cursor: Any, first: int, events: frozenset[str]) -> None:
    """Agents' own spans find their episodes; episodes that were counted with or without them are counted anew."""
    moved = settle(cursor, first, observed="otlp" in events, recorded="span" in events)
    if moved:
        cursor.execute("INSERT INTO _dirty SELECT unnest(?)", [sorted(moved)])


def insert_events(cursor: Any, segment: Segment) -> None:
    """Insert the rows of a file of events that are no spans and rewards, within the caller's transaction."""
    for event in sorted(segment.events):
        for statement in _INSERTS.get(event, ()):
            given = {"files": [str(segment.path.resolve())], "size": max(16 << 20, segment.longest + 1024)}
            cursor.execute(statement, given)
