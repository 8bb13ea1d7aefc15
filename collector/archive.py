"""The archive: whole days of the journal as Parquet files, which then are the truth in place of the day's segments.

    archive/2026-11-22/manifest.json     which segments, how many rows, the files' checksums
                       spans.parquet echoes.parquet payloads.parquet rewards.parquet
                       events.ndjson     the lines of all other kinds, as the journal had them

A folder counts from the moment in which it gets its name; what has to follow (payloads leave the database, segments
are deleted) is made up for at the next start. Spans and rewards stay in the database, payloads are read from the files.
Retention marks the manifest first, then removes the rows, then the files; events (versions, jobs ...) always stay.
"""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from collector import fold, journal, redact
from collector.errors import Unavailable
from collector.inserts import Segment, insert_events
from collector.settle import settle

if TYPE_CHECKING:
    import pyarrow as pa

FOLDER = "archive"
MANIFEST = "manifest.json"
EVENTS = "events.ndjson"
_EMPTY = "empty.parquet"
_EPOCH = date(1970, 1, 1)

# table -> what of a day goes into its file
_TABLES = {
    "spans": "SELECT * EXCLUDE (batch) FROM spans WHERE day = $day",
    "echoes": "SELECT * EXCLUDE (batch) FROM echoes WHERE day = $day",
    "rewards": "SELECT * EXCLUDE (target_key) FROM rewards WHERE day = $day",
}
_PAYLOADS = "payloads"
_FILES = (*_TABLES, _PAYLOADS)
# Payloads one stretch of time after the other, each sorted, so that what repeats within an episode lies together: a day
# of them is too large to be sorted in memory.
_SIZES = """
SELECT start_ns, coalesce(request_bytes, 0) + coalesce(response_bytes, 0) FROM spans
WHERE day = $day AND start_ns IS NOT NULL
UNION ALL
SELECT start_ns, coalesce(request_bytes, 0) + coalesce(response_bytes, 0) FROM echoes
WHERE day = $day AND start_ns IS NOT NULL
ORDER BY 1
"""
_STRETCH = """
SELECT * FROM (FROM payloads UNION ALL BY NAME FROM fresh_payloads)
WHERE day = $day AND start_ns >= $since AND start_ns < $until
ORDER BY episode_id, start_ns, span_id
"""
_TIMELESS = """
SELECT * FROM (FROM payloads UNION ALL BY NAME FROM fresh_payloads) WHERE day = $day AND start_ns IS NULL
"""
_NO_PAYLOADS = """
SELECT NULL::VARCHAR AS span_id, NULL::VARCHAR AS episode_id, NULL::BIGINT AS start_ns,
  NULL::VARCHAR AS input_messages, NULL::VARCHAR AS output_messages, NULL::VARCHAR AS tools,
  NULL::VARCHAR AS attributes, NULL::VARCHAR AS token_ids, NULL::VARCHAR AS logprobs, NULL::INTEGER AS day WHERE false
"""
_STRETCH_BYTES = 24 << 20
_STRETCH_ROWS = 8192
_LATEST_NS = (1 << 63) - 1
# Read back into a new database, as its first batch.
_RESTORE = {
    "spans": "INSERT INTO spans BY NAME SELECT *, 0 AS batch FROM read_parquet($file)",
    "echoes": "INSERT INTO echoes BY NAME SELECT *, 0 AS batch FROM read_parquet($file)",
    "rewards": "INSERT INTO rewards BY NAME SELECT *, key_of(target_id) AS target_key FROM read_parquet($file)",
}
_REMOVE = (
    "DELETE FROM spans WHERE day = $day",
    "DELETE FROM echoes WHERE day = $day",
    "DELETE FROM rewards WHERE day = $day",
)
_OBSERVED = "SELECT count(*) > 0 FROM spans WHERE source = 'otlp'"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One archived day, as its manifest says."""

    day: int
    segments: tuple[str, ...]
    rows: dict[str, int]
    sha256: dict[str, str]
    events: dict[str, int]  # lines of each kind in EVENTS
    retained: bool = False  # retention removed the spans

    @property
    def name(self) -> str:
        """The folder."""
        return day_name(self.day)


def day_name(day: int) -> str:
    """Days since 1970 as an ISO date."""
    return (_EPOCH + timedelta(days=day)).isoformat()


def today() -> int:
    """Days since 1970, by the wall clock, in UTC."""
    return int(time.time() // 86_400)


class Lines(Protocol):
    """Lines of the journal; once they were read, `spans` is the number of calls among what was left out."""

    spans: int

    def __iter__(self) -> Iterator[bytes]: ...


class Archive:
    """The folder of archived days of one data directory."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._files: list[str] = []  # what the view of payloads reads

    def prepare(self, con: Any) -> None:
        """Make the folder, with the file that is read where there are no others. Raises OSError."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        empty = self.path / _EMPTY
        if not empty.exists():
            _write_empty(con, empty)
        self._files = [str(empty)]

    def refresh(self, cursor: Any) -> None:
        """Learn from the database which days' files are read; to be called where its transactions end."""
        days = cursor.execute("SELECT day FROM _parts WHERE kept ORDER BY day").fetchall()
        files = [str(self.path / day_name(day) / "payloads.parquet") for (day,) in days]
        self._files = [str(self.path / _EMPTY), *files]

    # What is there

    def parts(self) -> list[Part]:
        """The archived days, ascending. Raises Unavailable where a manifest cannot be read."""
        found = []
        for folder in sorted(self.path.glob("[0-9]*-[0-9]*-[0-9]*")):
            try:
                body = orjson.loads((folder / MANIFEST).read_bytes())
                found.append(Part(**{**body, "segments": tuple(body["segments"])}))
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise Unavailable(f"the archived day {folder} cannot be read: {error}") from None
        return found

    def file(self, part: Part, name: str) -> Path:
        """A file of a part."""
        return self.path / part.name / name

    def column(self, part: Part, table: str, name: str) -> list[str]:
        """One text column of a table of a part; nothing where the file cannot be read."""
        import pyarrow.parquet

        try:
            found = pyarrow.parquet.read_table(self.file(part, f"{table}.parquet"), columns=[name])
        except (OSError, pyarrow.ArrowException):
            return []
        return [str(value) for value in found.column(0).to_pylist()]

    def damaged(self, part: Part) -> list[str]:
        """Files of a part that are missing or not what the manifest says."""
        return [name for name, digest in part.sha256.items() if _digest(self.file(part, name)) != digest]

    def show(self, cursor: Any) -> None:
        """Tell the view `payloads_v`, for this connection, which files belong to what its transaction sees."""
        cursor.execute("SET VARIABLE archived_payloads = ?", [self._files])

    # At the start

    def attach(self, con: Any, journal_folder: Path) -> None:
        """Make the database hold what the archive holds, and finish what an earlier process could not."""
        for path in self.path.glob(".*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        known = dict(con.execute("SELECT day, kept FROM _parts").fetchall())
        parts = self.parts()
        restored = False
        for part in parts:
            if part.day not in known:
                restored |= self._take_in(con, part)
            if part.retained and known.get(part.day, True):
                _forget_day(con, part.day)
            if part.retained:
                self.unlink(part)
            sweep(journal_folder, part.segments)
        self._report_lost(con, known, parts)
        if restored:
            _settle_all(con)
        self.refresh(con)

    def _take_in(self, con: Any, part: Part) -> bool:
        """A day that the database doesn't know as archived; whether its rows had to be read back."""
        names = list(part.segments)
        ((loaded,),) = con.execute(
            "SELECT count(*) FROM _segments WHERE name IN (SELECT unnest(?))", [names]
        ).fetchall()
        if loaded not in (0, len(names)):
            raise Unavailable(
                f"the store holds a part of the archived day {part.name} only; run `ratchet store rebuild`"
            )
        con.execute("BEGIN")
        if not loaded:
            self._restore(con, part)
        close_day(con, part)
        con.execute("COMMIT")
        return not loaded

    def _restore(self, con: Any, part: Part) -> None:
        log.info("reading the archived day %s back", part.name)
        for table, statement in _RESTORE.items() if not part.retained else ():
            con.execute(statement, {"file": str(self.file(part, f"{table}.parquet"))})
        events = self.file(part, EVENTS)
        if part.events:
            insert_events(con, Segment(part.name, events, 0, 0, events.stat().st_size, frozenset(part.events)))

    def _report_lost(self, con: Any, known: dict[int, bool], parts: Sequence[Part]) -> None:
        there = {part.day for part in parts}
        for day in sorted(set(known) - there):
            log.error("the archived day %s is no longer in %s: its payloads are lost", day_name(day), self.path)
            con.execute("DELETE FROM _parts WHERE day = ?", [day])
            con.execute("INSERT INTO _parts VALUES (?, 0, 0, false)", [day])

    # Compaction

    def write(self, cursor: Any, day: int, segments: Sequence[tuple[str, int]], lines: Lines) -> Part:
        """Write a day to its folder: its rows from the database, `lines` (not of spans and rewards) from the journal.

        Nothing is deleted. Once this returns, the folder is the truth for `segments` ((name, bytes) each). Raises
        Unavailable where the database has fewer rows than the journal has lines.
        """
        folder = self.path / f".{day_name(day)}.tmp"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        rows: dict[str, int] = {}
        for table, statement in _TABLES.items():
            target = folder / f"{table}.parquet"
            relation = cursor.sql(statement, params={"day": day})
            relation.write_parquet(str(target), compression="zstd", row_group_size=_STRETCH_ROWS)
            rows[table] = _rows_of(cursor, target)
        rows[_PAYLOADS] = _write_payloads(cursor, day, folder / f"{_PAYLOADS}.parquet")
        events = _write_lines(folder / EVENTS, lines)
        _complete(day, rows, lines.spans)
        digests = {path.name: _digest(path) for path in sorted(folder.iterdir())}
        part = Part(day, tuple(name for name, _ in segments), rows, digests, events)
        _write_synced(folder / MANIFEST, _manifest(part))
        for path in folder.iterdir():
            _sync(path)
        journal.sync_directory(folder)
        folder.rename(self.path / part.name)
        journal.sync_directory(self.path)
        return part

    def mark_retained(self, part: Part) -> Part:
        """The point of no return of retention: from here on, the day's spans are gone."""
        marked = Part(part.day, part.segments, part.rows, {EVENTS: part.sha256[EVENTS]}, part.events, retained=True)
        target = self.file(part, MANIFEST)
        temporary = target.with_name(f".{MANIFEST}.tmp")
        _write_synced(temporary, _manifest(marked))
        temporary.replace(target)
        journal.sync_directory(target.parent)
        return marked

    def unlink(self, part: Part) -> None:
        """The last step of retention: the files."""
        for table in _FILES:
            self.file(part, f"{table}.parquet").unlink(missing_ok=True)

    def size(self, part: Part) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in (self.path / part.name).iterdir())


def _complete(day: int, rows: Mapping[str, int], spans: int) -> None:
    stored = rows["spans"] + rows["echoes"]
    if rows["payloads"] != stored or stored < spans:
        raise Unavailable(
            f"{day_name(day)} stays in the journal: of {spans} calls the store has {stored} spans and "
            f"{rows['payloads']} payloads; run `ratchet store verify` and `ratchet store rebuild`"
        )


def close_day(cursor: Any, part: Part) -> None:
    """The day's payloads leave the database, within the caller's transaction; the manifest knows its segments."""
    cursor.execute(
        "INSERT INTO _parts VALUES (?, ?, ?, ?)", [part.day, part.rows["spans"], len(part.segments), not part.retained]
    )
    cursor.execute("DELETE FROM payloads WHERE day = ?", [part.day])
    cursor.execute("DELETE FROM fresh_payloads WHERE day = ?", [part.day])
    cursor.execute("DELETE FROM _segments WHERE day = ?", [part.day])


def sweep(folder: Path, names: Iterable[str]) -> int:
    """Delete the segments that are in the archive; returns how many were left."""
    wanted = {name + journal.SEALED for name in names}
    found = wanted.intersection(os.listdir(folder)) if folder.is_dir() else set()
    for name in found:
        (folder / name).unlink(missing_ok=True)
    if found:
        journal.sync_directory(folder)
    return len(found)


def _forget_day(con: Any, day: int) -> None:
    con.execute("BEGIN")
    remove_day(con, day)
    con.execute("COMMIT")


def remove_day(cursor: Any, day: int) -> None:
    """The second step of retention: the rows leave the database, within the caller's transaction."""
    for statement in _REMOVE:
        cursor.execute(statement, {"day": day})
    cursor.execute("UPDATE _parts SET kept = false WHERE day = ?", [day])
    fold.forget(cursor)


def _settle_all(con: Any) -> None:
    """Days were archived one by one: what came later may have told where earlier spans belong."""
    ((observed,),) = con.execute(_OBSERVED).fetchall()
    if observed:
        con.execute("BEGIN")
        settle(con, 0, observed=True, recorded=True)
        fold.forget(con)
        con.execute("COMMIT")


def _payload_schema() -> "pa.Schema":
    import pyarrow as pa

    texts = ("span_id", "episode_id", *redact.PAYLOADS, "token_ids", "logprobs")
    numbers = [pa.field("start_ns", pa.int64()), pa.field("day", pa.int32())]
    return pa.schema([*(pa.field(name, pa.string()) for name in texts), *numbers])


def _write_empty(con: Any, target: Path) -> None:
    temporary = target.with_name(f".{target.name}")
    con.sql(_NO_PAYLOADS).write_parquet(str(temporary))
    temporary.replace(target)


def _write_payloads(cursor: Any, day: int, target: Path) -> int:
    """The day's payloads, never more than a stretch of them in memory; returns how many."""
    import pyarrow.parquet

    schema = _payload_schema()
    count = 0
    with pyarrow.parquet.ParquetWriter(target, schema, compression="zstd") as writer:
        asked: list[tuple[str, dict[str, int]]] = [
            (_STRETCH, {"day": day, "since": since, "until": until})
            for since, until in _stretches(cursor.execute(_SIZES, {"day": day}).fetchall())
        ]
        for statement, where in [*asked, (_TIMELESS, {"day": day})]:
            table = cursor.sql(statement, params=where).to_arrow_table()
            writer.write_table(table.select(schema.names).cast(schema))
            count += table.num_rows
    return count


def _stretches(sizes: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges of time, together all of it, that hold a bounded number of rows and bytes each."""
    since = -_LATEST_NS
    rows = size = 0
    last = since
    for start, length in sizes:
        if start > last and (rows >= _STRETCH_ROWS or size >= _STRETCH_BYTES):
            yield since, start
            since, rows, size = start, 0, 0
        rows, size, last = rows + 1, size + length, start
    yield since, _LATEST_NS


def _rows_of(cursor: Any, path: Path) -> int:
    ((count,),) = cursor.execute("SELECT count(*) FROM read_parquet(?)", [str(path)]).fetchall()
    return int(count)


def _write_lines(path: Path, lines: Iterable[bytes]) -> dict[str, int]:
    counts: dict[str, int] = {}
    with path.open("wb") as file:
        for line in lines:
            file.write(line + b"\n")
            kind = line[10 : line.index(b'"', 10)].decode()
            counts[kind] = counts.get(kind, 0) + 1
    return counts


def _manifest(part: Part) -> bytes:
    return orjson.dumps(part, option=orjson.OPT_INDENT_2)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _write_synced(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
