"""The projection: a DuckDB file that only the collector opens, and all SQL that it is asked.

Appended to by the loader in transactions that carry the names of the segments they load; read by cursors of their own.
What cannot be opened is moved aside, because the journal holds the truth and the loader fills a new file from it.
"""

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import duckdb

from collector import archive, fold, histories, lookup, pages, paging, results
from collector.errors import Conflict, QueryError, Unavailable
from collector.inserts import Segment, insert
from collector.readonly import one_select
from collector.settings import Storage

SCHEMA = (Path(__file__).parent / "schema.sql").read_text()
# The engine's version counts: its hashes need not be those of another one.
SCHEMA_HASH = hashlib.sha256(f"{SCHEMA}{duckdb.__version__}".encode()).hexdigest()
DATA_ERRORS = (duckdb.InvalidInputException, duckdb.ConversionException)
_FATAL = (duckdb.FatalException, duckdb.InternalException)
_UNMATCHED_SECONDS = 10.0
_FOLD_LINES = 50_000
_SMALL = 20_000  # spans; up to that many, counts are exact
_LATEST_NS = (1 << 63) - 1

R = TypeVar("R")
log = logging.getLogger(__name__)

# Which batch brought a row, and to which day of the journal it was added, is no part of its content.
_COUNTS = {
    "span": "SELECT count(*), sum(hash(t)) FROM (SELECT * EXCLUDE (batch, day) FROM spans) AS t",
    "echo": "SELECT count(*), sum(hash(t)) FROM (SELECT * EXCLUDE (batch, day) FROM echoes) AS t",
    "payload": "SELECT count(*), sum(hash(t)) FROM payloads_v AS t",
    "reward": "SELECT count(*), sum(hash(t)) FROM (SELECT * EXCLUDE (day, target_key) FROM rewards) AS t",
    "version": "SELECT count(*), sum(hash(t)) FROM versions AS t",
    "candidate": "SELECT count(*), sum(hash(t)) FROM candidates AS t",
    "deployment": "SELECT count(*), sum(hash(t)) FROM deployments AS t",
    "evaluation": "SELECT count(*), sum(hash(t)) FROM evaluations AS t",
    "job": "SELECT count(*), sum(hash(t)) FROM jobs AS t",
    "key": "SELECT count(*), sum(hash(t)) FROM keys AS t",
}

_REGISTRY = {
    "version": "SELECT * FROM versions ORDER BY slot, version",
    "candidate": "SELECT * FROM candidates ORDER BY slot, ts_ns",
    "deployment": "SELECT * FROM deployments ORDER BY revision",
    "key": "SELECT * FROM keys ORDER BY ts_ns, action",
}

_STATS = """
SELECT (SELECT count(*) FROM spans) AS spans, (SELECT count(*) FROM episodes) AS episodes,
  (SELECT count(*) FROM rewards) AS rewards,
  (SELECT count(*) FROM spans WHERE prompt_slot IS NULL
     AND operation IN ('chat', 'responses', 'messages', 'text_completion')) AS unknown_prompts,
  (SELECT count(*) FROM _segments) AS segments,
  (SELECT coalesce(sum(quarantined), 0)::BIGINT FROM _segments) AS quarantined,
  (SELECT count(*) FROM _parts) AS archived_days
"""

_COUNT_UNMATCHED = """
SELECT (SELECT count(*) FROM rewards_v WHERE target_kind <> 'episode' AND episode_id IS NULL)
  + (SELECT count(*) FROM rewards AS r WHERE target_kind = 'episode'
     AND NOT EXISTS (SELECT 1 FROM spans AS s WHERE s.episode_id = r.target_id)) AS unmatched_rewards
"""
_LOADED_DAYS = "SELECT DISTINCT day FROM _segments WHERE day < $before ORDER BY day"
_ROWS_OF_DAY = """
SELECT (SELECT count(*) FROM spans WHERE day = $day), (SELECT count(*) FROM rewards WHERE day = $day),
  (SELECT count(*) FROM _segments WHERE day = $day)
"""

_STATE = """
SELECT greatest((SELECT max(batch) FROM spans), (SELECT max(batch) FROM _segments), (SELECT max(batch) FROM _folds), 0),
  EXISTS (SELECT 1 FROM spans WHERE source = 'otlp'), (SELECT coalesce(list(day), []) FROM _parts)
"""

# The newest ones, up to a number and up to a size of all their messages.
_UNKNOWN = """
WITH latest AS (
  SELECT span_id, start_ns, request_model FROM spans WHERE prompt_slot IS NULL
    AND operation IN ('chat', 'responses', 'messages', 'text_completion')
  ORDER BY start_ns DESC, span_id LIMIT $limit)
SELECT l.span_id, l.request_model, p.input_messages FROM latest AS l JOIN (
  SELECT span_id, input_messages FROM (FROM payloads UNION ALL BY NAME FROM fresh_payloads)
  WHERE start_ns >= (SELECT min(start_ns) FROM latest) AND input_messages IS NOT NULL) AS p USING (span_id)
QUALIFY sum(length(p.input_messages)) OVER (ORDER BY l.start_ns DESC, l.span_id) <= $characters
ORDER BY l.start_ns DESC, l.span_id
"""

# The times are the spans' own: the engine reads no more of the payloads than what lies between them.
_EPISODE_SPANS = """
SELECT s.*, p.input_messages, p.output_messages, p.tools, p.attributes
FROM (SELECT * EXCLUDE (batch, day) FROM spans
  WHERE start_ns BETWEEN $since AND $until AND episode_id = $episode_id) AS s
LEFT JOIN (SELECT * FROM payloads_v WHERE start_ns BETWEEN $since AND $until) AS p USING (span_id)
"""
_EXTENT = "SELECT min(start_ns) AS since, max(start_ns) AS until FROM spans WHERE episode_id = $episode_id"

_EPISODE_ECHOES = """
SELECT span_id, parent_span_id, echo_of FROM echoes
WHERE echo_of IN (SELECT span_id FROM spans WHERE episode_id = $episode_id)
"""

_EPISODE_REWARDS = "SELECT * FROM rewards_v WHERE episode_id = $episode_id ORDER BY ts_ns, reward_id"

_UNMATCHED = """
SELECT * FROM rewards_v WHERE episode_id IS NULL
  OR (target_kind = 'episode' AND NOT EXISTS (SELECT 1 FROM spans AS s WHERE s.episode_id = rewards_v.episode_id))
ORDER BY ts_ns DESC LIMIT $limit
"""

_JOBS = "SELECT * FROM jobs_v WHERE ($job_id::VARCHAR IS NULL OR job_id = $job_id) ORDER BY ts_ns DESC"

_EVALUATIONS = "SELECT * FROM evaluations WHERE ($job_id::VARCHAR IS NULL OR job_id = $job_id) ORDER BY ts_ns, rowid"


class Store:
    """One open projection. Thread-safe: each call works on a cursor of its own.

    Raises Conflict when another process has the file open.
    """

    engine = ""  # part of the schema's name: a file that another engine's segments filled lacks their rows

    def __init__(self, path: Path, journal: Path, settings: Storage, weights: Mapping[str, float]) -> None:
        self.path = Path(path)
        self.rebuilt = 0  # how often a broken or outdated file was replaced
        self._journal = Path(journal)
        self._settings = settings
        self._weights = dict(weights)
        self._lock = threading.Lock()
        self._commits = threading.Lock()  # held where rows become visible, so that a snapshot has all of a batch
        self._batch = 0  # the number of the last transaction that loaded
        self._behind = True  # whether `episodes` may lack something
        self._unfolded = 0  # lines loaded since `episodes` was brought up to date
        self._cursors = paging.Cursors()
        self._unsorted = 0  # bytes of payloads that wait to be sorted
        self._closed: set[int] = set()  # days that are in the archive, or being written to it
        self._unmatched = (0.0, 0)  # (good until, how many)
        self.archive = archive.Archive(self._journal.parent / archive.FOLDER)
        self._con = self._open()

    def reopen(self) -> None:
        """After a fatal error of the engine: close, and open again what is there or a new file."""
        with self._lock:
            self._behind = True
            with contextlib.suppress(duckdb.Error):
                self._con.close()
            self._con = self._open()

    def close(self) -> None:
        """Write a checkpoint, so that the next start replays nothing."""
        self._cursors.sweep(0.0)
        self.fold()
        with self._lock:
            with contextlib.suppress(duckdb.Error):
                self._con.execute("CHECKPOINT")
            self._con.close()

    # Opening

    def _open(self) -> "duckdb.DuckDBPyConnection":
        try:
            return self._open_what_is_there()
        except duckdb.Error as error:
            self._give_up_on(error)
            return self._open_what_is_there()

    def _open_what_is_there(self) -> "duckdb.DuckDBPyConnection":
        con = self._connect()
        try:
            known = _known_schema(con)
            if known not in (None, SCHEMA_HASH + self.engine):
                con.close()
                self._start_over()
                con, known = self._connect(), None
            self._prepare(con, known)
        except BaseException:
            con.close()
            raise
        return con

    def _give_up_on(self, error: duckdb.Error) -> None:
        """Move a file aside that does not open; raises where another one would not open either."""
        text = str(error)
        if "Could not set lock" in text:
            raise Conflict(f"{self.path} is open in another process") from None
        if "No space left" in text or "Permission denied" in text:
            raise Unavailable(f"cannot open {self.path}: {text}") from None
        log.error("cannot open %s: %s; a new one is built from the journal", self.path, text)
        self._move_aside()

    def _connect(self) -> "duckdb.DuckDBPyConnection":
        config = {
            "threads": 1,
            "memory_limit": f"{self._settings.memory_limit_mb}MB",
            "wal_autocheckpoint": "256MB",
            "default_block_size": "65536",  # a column of a small table fills no larger one
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
        }
        return duckdb.connect(str(self.path), config=config)

    def _move_aside(self) -> None:
        stamp = time.time_ns()
        self.rebuilt += 1
        for path in (self.path, self.path.with_name(self.path.name + ".wal")):
            with contextlib.suppress(FileNotFoundError):
                path.rename(path.with_name(f"{path.name}.corrupt-{stamp}"))
        log.error("%s moved aside as .corrupt-%d", self.path, stamp)

    def _start_over(self) -> None:
        """Another schema or engine wrote this file: the journal fills a new one, nothing of it is needed."""
        log.warning("%s is of another schema or engine; it is rebuilt from the journal", self.path)
        self.rebuilt += 1
        for path in (self.path, self.path.with_name(self.path.name + ".wal")):
            path.unlink(missing_ok=True)

    def _prepare(self, con: "duckdb.DuckDBPyConnection", known: str | None) -> None:
        """Tables and views where they are new, weights, then the walls: no file but the journal can be read, and
        nothing reconfigured."""
        self.archive.prepare(con)
        if known is None:
            con.execute("BEGIN")
            self.archive.show(con)
            con.execute(SCHEMA)
            con.execute("INSERT INTO _meta VALUES ('schema', ?)", [SCHEMA_HASH + self.engine])
            con.execute("COMMIT")
            con.execute("CHECKPOINT")
        weights = dict(con.execute("SELECT name, weight FROM reward_weights").fetchall())
        if weights != self._weights:
            con.execute("BEGIN")
            con.execute("DELETE FROM reward_weights")
            for name, weight in self._weights.items():
                con.execute("INSERT INTO reward_weights VALUES (?, ?)", [name, weight])
            con.execute("COMMIT")
        self.archive.attach(con, self._journal)
        ((self._batch, self._own_spans, archived),) = con.execute(_STATE).fetchall()
        self._closed |= set(archived)
        self._unsorted = histories.waiting(con)
        con.execute("SET allowed_directories = ?", [[str(self._journal.resolve()), str(self.archive.path)]])
        con.execute("SET enable_external_access = false")
        con.execute("SET lock_configuration = true")

    @contextlib.contextmanager
    def _cursor(self) -> Iterator["duckdb.DuckDBPyConnection"]:
        with self._lock:
            cursor = self._con.cursor()
        try:
            yield cursor
        finally:
            cursor.close()

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator["duckdb.DuckDBPyConnection"]:
        """A cursor in a read-only transaction in which `episodes` holds exactly what `spans` holds."""
        with self._cursor() as cursor:
            with self._commits:
                self._fold(cursor)
                cursor.execute("BEGIN TRANSACTION READ ONLY")
                self.archive.show(cursor)
                cursor.execute("SELECT 1 FROM _meta LIMIT 1").fetchall()  # the engine begins at the first read
            yield cursor

    def fold(self) -> None:
        """Bring `episodes` up to date now, so that the next reader need not."""
        with contextlib.suppress(duckdb.Error), self._cursor() as cursor, self._commits:
            self._fold(cursor)

    def _fold(self, cursor: "duckdb.DuckDBPyConnection") -> None:
        """A failure (a full disk) leaves `episodes` behind; the next reader tries again."""
        try:
            if not self._behind or not fold.behind(cursor, self._batch):
                self._behind = False
                return
            cursor.execute("BEGIN")
            fold.fold(cursor, self._batch)
            cursor.execute("COMMIT")
            self._unfolded = 0
            self._behind = False
        except _FATAL:
            raise
        except duckdb.Error as error:
            log.error("the table of episodes could not be brought up to date: %s", error)
            with contextlib.suppress(duckdb.Error):
                cursor.execute("ROLLBACK")

    # Loading

    def loaded(self) -> set[str]:
        """The names of the segments that are in the projection."""
        with self._cursor() as cursor:
            return {name for (name,) in cursor.execute("SELECT name FROM _segments").fetchall()}

    def forget(self, names: Sequence[str]) -> None:
        """Segments that are no longer in the journal need not be known any more."""
        with self._cursor() as cursor:
            cursor.execute("DELETE FROM _segments WHERE name IN (SELECT unnest(?))", [list(names)])

    def load(self, segments: Sequence[Segment]) -> None:
        """Insert the rows of sealed segments and their names in one transaction.

        Raises one of DATA_ERRORS where a line does not fit the schema; then nothing of it was stored.
        """
        long = histories.are_long(segments)
        with self._cursor() as cursor:
            cursor.execute("BEGIN")
            try:
                table = "fresh_payloads" if long else "payloads"
                insert(cursor, segments, self._batch + 1, self._closed, table, observed=self._own_spans)
                with self._commits:
                    cursor.execute("COMMIT")
                    self._batch += 1
                    self._behind = True
                self._own_spans |= any("otlp" in segment.events for segment in segments)
            except duckdb.Error:
                with contextlib.suppress(duckdb.Error):
                    cursor.execute("ROLLBACK")
                raise
        self._unfolded += sum(segment.lines for segment in segments)
        if self._unfolded >= _FOLD_LINES:
            self.fold()
        if long:
            self._unsorted += sum(segment.bytes for segment in segments)
            self._sort()

    def _sort(self) -> None:
        """Once there is a stretch of them, sort long payloads into their place. They are as good unsorted."""
        if self._unsorted < histories.STRETCH_BYTES:
            return
        self._unsorted = 0
        with self._cursor() as cursor:
            try:
                cursor.execute("BEGIN")
                histories.settle(cursor)
                cursor.execute("COMMIT")
            except _FATAL:
                raise
            except duckdb.Error as error:
                log.error("long payloads stay unsorted for now: %s", error)
                with contextlib.suppress(duckdb.Error):
                    cursor.execute("ROLLBACK")

    def fits(self, segment: Segment) -> bool:
        """Whether every line of the segment fits the schema. Nothing is stored."""
        with self._cursor() as cursor:
            cursor.execute("BEGIN")
            try:
                insert(cursor, [segment], self._batch + 1, self._closed)
            except DATA_ERRORS:
                return False
            finally:
                with contextlib.suppress(duckdb.Error):
                    cursor.execute("ROLLBACK")
        return True

    # Days

    def loaded_days(self, before: int) -> list[int]:
        """Days (since 1970) before one whose segments are loaded and not in the archive, ascending."""
        with self._cursor() as cursor:
            return [day for (day,) in cursor.execute(_LOADED_DAYS, {"before": before}).fetchall()]

    def rows_of_day(self, day: int) -> tuple[int, int, int]:
        """How many spans, rewards and segments a day has."""
        with self._cursor() as cursor:
            spans, rewards, segments = cursor.execute(_ROWS_OF_DAY, {"day": day}).fetchall()[0]
        return spans, rewards, segments

    def close_day(self, day: int) -> list[tuple[str, int]]:
        """No row is added to this day any more; returns its segments, (name, bytes) each."""
        self._closed.add(day)
        with self._cursor() as cursor:
            return list(
                cursor.execute("SELECT name, bytes FROM _segments WHERE day = ? ORDER BY name", [day]).fetchall()
            )

    def reopen_day(self, day: int) -> None:
        """The day was not archived after all."""
        self._closed.discard(day)

    def write_part(self, day: int, segments: Sequence[tuple[str, int]], lines: archive.Lines) -> archive.Part:
        """Write a closed day to the archive. Raises Unavailable where the store has less than the journal."""
        with self._cursor() as cursor:
            cursor.execute("BEGIN")
            part = self.archive.write(cursor, day, segments, lines)
            cursor.execute("ROLLBACK")
        return part

    def take_out(self, part: archive.Part) -> None:
        """The payloads of an archived day are read from its file from now on."""
        with self._cursor() as cursor:
            cursor.execute("BEGIN")
            archive.close_day(cursor, part)
            with self._commits:
                cursor.execute("COMMIT")
                self.archive.refresh(cursor)

    def remove_day(self, day: int) -> None:
        """A day that retention has marked leaves the database."""
        with self._cursor() as cursor, self._commits:
            cursor.execute("BEGIN")
            archive.remove_day(cursor, day)
            cursor.execute("COMMIT")
            self._behind = True
            self.archive.refresh(cursor)

    def checkpoint(self) -> None:
        """Give room back, unless a reader is in the way: then the engine does it later."""
        with contextlib.suppress(duckdb.Error), self._cursor() as cursor:
            cursor.execute("CHECKPOINT")

    # Reading

    def registry_events(self) -> list[tuple[str, dict[str, Any]]]:
        """Versions, candidates, deployments and keys, in the order in which they can be folded."""
        return [
            (event, results.parsed(row, ("match", "metrics", "arms", "scopes", "limits")))
            for event, statement in _REGISTRY.items()
            for row in self._rows(statement)
        ]

    def episodes(self, **where: Any) -> list[dict[str, Any]]:
        """Rows of `episodes_v`, newest first. See `pages` for the parameters, all needed, None for any."""
        given = {**where, **_before(where, "before_id")}
        with self._snapshot() as cursor:
            rows = pages.reader(cursor)
            if where["min_reward"] is not None or where["max_reward"] is not None:
                return rows(pages.EPISODES_WHERE, given)
            asked = {name: given[name] for name in ("before_ns", "before_id", "status", "limit", "slot", "version")}
            if where["slot"] is not None or where["version"] is not None:
                return pages.episodes_of(rows, asked, self._weights)
            del asked["slot"], asked["version"]
            return pages.episodes(rows, asked, self._weights)

    def spans(self, **where: Any) -> list[dict[str, Any]]:
        """Rows of `spans`, newest first."""
        return self._rows(pages.SPANS, {**where, **_before(where, "before_id")})

    def episode(self, episode_id: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """`(spans with payloads, resolved rewards)` of one episode."""
        with self._snapshot() as cursor:
            rows = pages.reader(cursor)
            (extent,) = rows(_EXTENT, {"episode_id": episode_id})
            if extent["since"] is None:
                return [], rows(_EPISODE_REWARDS, {"episode_id": episode_id})
            spans = rows(_EPISODE_SPANS, {"episode_id": episode_id, **extent})
            return spans, pages.judged(rows, [episode_id], extent["since"], extent["until"])

    def echoes(self, episode_id: str) -> list[dict[str, Any]]:
        """The agents' own spans that repeat calls of one episode: {"span_id", "parent_span_id", "echo_of"}."""
        with self._snapshot() as cursor:
            rows = pages.reader(cursor)
            return rows(_EPISODE_ECHOES, {"episode_id": episode_id}) if rows(pages.ANY_ECHO, {}) else []

    def unmatched_rewards(self, limit: int) -> list[dict[str, Any]]:
        """Rewards whose target was not seen, newest first."""
        return self._rows(_UNMATCHED, {"limit": limit})

    def unknown_calls(self, limit: int, characters: int) -> list[dict[str, Any]]:
        """The newest calls whose prompt no slot knew: {"span_id", "request_model", "input_messages"} (JSON text)."""
        return self._rows(_UNKNOWN, {"limit": limit, "characters": characters})

    def jobs(self, job_id: str | None = None) -> list[dict[str, Any]]:
        """The latest state of each job, newest first."""
        return self._rows(_JOBS, {"job_id": job_id})

    def evaluations(self, job_id: str | None = None) -> list[dict[str, Any]]:
        """Paid rollouts by time."""
        return self._rows(_EVALUATIONS, {"job_id": job_id})

    def stats(self) -> dict[str, Any]:
        """Counts of rows. That of unmatched rewards, a pass over all, is up to ten seconds old."""
        with self._snapshot() as cursor:
            rows = pages.reader(cursor)
            (found,) = rows(_STATS, {})
            until, unmatched = self._unmatched
            if time.monotonic() >= until or found["spans"] < _SMALL:
                (counted,) = rows(_COUNT_UNMATCHED, {})
                unmatched = counted["unmatched_rewards"]
                self._unmatched = (time.monotonic() + _UNMATCHED_SECONDS, unmatched)
        return {**found, "unmatched_rewards": unmatched}

    def content(self) -> dict[str, tuple[int, int]]:
        """`{table: (rows, hash)}`; the hash does not depend on the order of the rows."""
        with self._snapshot() as cursor:
            found = {name: cursor.execute(statement).fetchall()[0] for name, statement in _COUNTS.items()}
        return {name: (count, int(digest or 0)) for name, (count, digest) in found.items()}

    def whole(self, ids: Sequence[str]) -> tuple[lookup.Found, lookup.Found, lookup.Found]:
        """See `lookup`; so for the next three."""
        return self.reading(lambda rows: lookup.whole(rows, ids))

    def known(self, spans: Sequence[str], rewards: Sequence[str]) -> tuple[set[str], set[str]]:
        """Which of these spans and rewards are there."""
        return self.reading(lambda rows: lookup.known(rows, spans, rewards))

    def placed(self, spans: Sequence[str]) -> dict[str, str]:
        """The episodes of spans."""
        return self.reading(lambda rows: lookup.placed(rows, spans))

    def targets(self, ids: Sequence[str]) -> lookup.Found:
        """Spans by any of their ids."""
        return self.reading(lambda rows: lookup.targets(rows, ids))

    def reading(self, ask: Callable[[pages.Rows], R]) -> R:
        """What `ask` reads by several statements, all of one state of the store."""
        with self._snapshot() as cursor:
            return ask(pages.reader(cursor))

    def _rows(self, statement: str, where: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        with self._snapshot() as cursor:
            return pages.reader(cursor)(statement, where or {})

    def query(self, sql: str, limit: int, page: int | None = None) -> results.Table:
        """The first `limit` rows of one SELECT, in a read-only transaction; each page is stopped after
        `store.query_timeout`. What does not fit on a page (of `page` rows, and a bound in bytes) is had by `more`.

        Raises QueryError with the engine's own words.
        """
        with contextlib.ExitStack() as stack:
            cursor = stack.enter_context(self._snapshot())
            statement = one_select(cursor, sql)
            with _told():
                relation = cursor.sql(statement)
                release = stack.pop_all().close
                try:
                    asked = paging.begin(relation, limit, release, lambda: self._bounded(cursor))
                except BaseException:
                    release()
                    raise
        return self._page(asked, page or limit)

    def more(self, token: str, page: int | None = None) -> results.Table:
        """The next page of a query. Raises NotFound when it is not open any more, QueryError."""
        asked = self._cursors.take(token)
        return self._page(asked, page or asked.rows)

    def sweep(self) -> None:
        """Close queries whose next page nobody has asked for in a while: they hold back the engine's checkpoints."""
        self._cursors.sweep()

    def _page(self, asked: paging.Open, rows: int) -> results.Table:
        try:
            with _told():
                table = asked.page(rows)
        except BaseException:
            asked.release()
            raise
        return replace(table, next=self._cursors.keep(asked))

    @contextlib.contextmanager
    def _bounded(self, cursor: "duckdb.DuckDBPyConnection") -> Iterator[None]:
        seconds = self._settings.query_timeout
        timer = threading.Timer(seconds, cursor.interrupt)
        timer.start()
        try:
            yield
        except duckdb.InterruptException:
            raise QueryError(f"stopped after {seconds:g} s; narrow the query", code="query_timeout") from None
        finally:
            timer.cancel()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """The engine's errors as the asker's, unless they are the engine's own fault."""
    import pyarrow as pa

    try:
        yield
    except _FATAL:
        raise
    except (duckdb.Error, RuntimeError, pa.ArrowException) as error:
        if "INTERRUPT" in str(error):
            raise QueryError("stopped, it took too long; narrow the query", code="query_timeout") from None
        raise QueryError(str(error), param="sql") from None


def _before(where: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Where a page begins: from the newest on, without a cursor."""
    at = where["before_ns"]
    return {"before_ns": _LATEST_NS if at is None else at, name: where[name] or ""}


def _known_schema(con: "duckdb.DuckDBPyConnection") -> str | None:
    """The hash of the schema that made this file; None for a new file."""
    try:
        found = con.execute("SELECT value FROM _meta WHERE key = 'schema'").fetchall()
    except duckdb.CatalogException:
        return None
    return str(found[0][0]) if found else ""
