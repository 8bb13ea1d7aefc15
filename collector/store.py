"""The projection: a DuckDB file that only the collector opens, and all SQL that it is asked.

Appended to by the loader in transactions that carry the names of the segments they load; read by cursors of their own.
What cannot be opened is moved aside, because the journal holds the truth and the loader fills a new file from it.
"""

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from collector import results
from collector.errors import Conflict, QueryError, Unavailable
from collector.settings import Storage
from collector.settle import settle

SCHEMA = (Path(__file__).parent / "schema.sql").read_text()
SCHEMA_HASH = hashlib.sha256(SCHEMA.encode()).hexdigest()
DATA_ERRORS = (duckdb.InvalidInputException, duckdb.ConversionException)
_FATAL = (duckdb.FatalException, duckdb.InternalException)

log = logging.getLogger(__name__)

_INSERTS: dict[str, tuple[str, ...]] = {
    "span": (
        "INSERT INTO spans BY NAME FROM journal_spans(?, ?)",
        "INSERT INTO payloads BY NAME FROM journal_payloads(?, ?)",
    ),
    # Exporters send again what they had no answer for: known by the span's id. Payloads first, by what `spans` lacks.
    "otlp": (
        """INSERT INTO payloads BY NAME FROM journal_otlp_payloads(?, ?) AS new
        WHERE NOT EXISTS (SELECT 1 FROM spans AS old WHERE old.span_id = new.span_id)
          AND NOT EXISTS (SELECT 1 FROM echoes AS old WHERE old.span_id = new.span_id)
        QUALIFY row_number() OVER (PARTITION BY span_id ORDER BY start_ns, hash(new)) = 1""",
        """INSERT INTO spans BY NAME FROM journal_otlp(?, ?) AS new
        WHERE NOT EXISTS (SELECT 1 FROM spans AS old WHERE old.span_id = new.span_id)
          AND NOT EXISTS (SELECT 1 FROM echoes AS old WHERE old.span_id = new.span_id)
        QUALIFY row_number() OVER (PARTITION BY span_id ORDER BY start_ns, hash(new)) = 1""",
    ),
    "reward": (
        """INSERT INTO rewards BY NAME FROM journal_rewards(?, ?) AS new
        WHERE NOT EXISTS (SELECT 1 FROM rewards AS old WHERE old.reward_id = new.reward_id)
        QUALIFY row_number() OVER (PARTITION BY reward_id ORDER BY ts_ns, value) = 1""",
    ),
    "version": ("INSERT INTO versions BY NAME FROM journal_versions(?, ?)",),
    "candidate": ("INSERT INTO candidates BY NAME FROM journal_candidates(?, ?)",),
    "deployment": ("INSERT INTO deployments BY NAME FROM journal_deployments(?, ?)",),
    "evaluation": (
        """INSERT INTO evaluations BY NAME FROM journal_evaluations(?, ?) AS new
        WHERE NOT EXISTS (SELECT 1 FROM evaluations AS old WHERE old.evaluation_id = new.evaluation_id)
        QUALIFY row_number() OVER (PARTITION BY evaluation_id ORDER BY ts_ns) = 1""",
    ),
    "job": ("INSERT INTO jobs BY NAME FROM journal_jobs(?, ?)",),
    "key": ("INSERT INTO keys BY NAME FROM journal_keys(?, ?)",),
}

_COUNTS = {
    "span": "SELECT count(*), sum(hash(t)) FROM spans AS t",
    "echo": "SELECT count(*), sum(hash(t)) FROM echoes AS t",
    "payload": "SELECT count(*), sum(hash(t)) FROM payloads AS t",
    "reward": "SELECT count(*), sum(hash(t)) FROM rewards AS t",
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
SELECT (SELECT count(*) FROM spans) AS spans, (SELECT count(DISTINCT episode_id) FROM spans) AS episodes,
  (SELECT count(*) FROM rewards) AS rewards,
  (SELECT count(*) FROM rewards_v WHERE target_kind <> 'episode' AND episode_id IS NULL)
    + (SELECT count(*) FROM rewards AS r WHERE target_kind = 'episode'
       AND NOT EXISTS (SELECT 1 FROM spans AS s WHERE s.episode_id = r.target_id)) AS unmatched_rewards,
  (SELECT count(*) FROM spans WHERE prompt_slot IS NULL
     AND operation IN ('chat', 'responses', 'messages', 'text_completion')) AS unknown_prompts,
  (SELECT count(*) FROM _segments) AS segments,
  (SELECT coalesce(sum(quarantined), 0)::BIGINT FROM _segments) AS quarantined
"""

# The newest ones, up to a number and up to a size of all their messages.
_UNKNOWN = """
WITH latest AS (
  SELECT span_id, start_ns, request_model FROM spans WHERE prompt_slot IS NULL
    AND operation IN ('chat', 'responses', 'messages', 'text_completion')
  ORDER BY start_ns DESC, span_id LIMIT $limit)
SELECT l.span_id, l.request_model, p.input_messages FROM latest AS l JOIN (
  SELECT span_id, input_messages FROM payloads
  WHERE start_ns >= (SELECT min(start_ns) FROM latest) AND input_messages IS NOT NULL) AS p USING (span_id)
QUALIFY sum(length(p.input_messages)) OVER (ORDER BY l.start_ns DESC, l.span_id) <= $characters
ORDER BY l.start_ns DESC, l.span_id
"""

_EPISODES = """
SELECT * FROM episodes_v WHERE
  ($before_ns::BIGINT IS NULL OR start_ns < $before_ns OR (start_ns = $before_ns AND episode_id < $before_id))
  AND ($slot::VARCHAR IS NULL OR episode_id IN (
    SELECT episode_id FROM spans WHERE prompt_slot = $slot OR adapter_slot = $slot))
  AND ($version::INTEGER IS NULL OR episode_id IN (
    SELECT episode_id FROM spans WHERE ($slot IS NULL AND $version IN (prompt_version, adapter_version))
      OR (prompt_slot = $slot AND prompt_version = $version) OR (adapter_slot = $slot AND adapter_version = $version)))
  AND ($min_reward::DOUBLE IS NULL OR reward >= $min_reward)
  AND ($max_reward::DOUBLE IS NULL OR reward <= $max_reward)
  AND ($status::VARCHAR IS NULL OR (errors > 0) = ($status <> 'ok'))
ORDER BY start_ns DESC, episode_id DESC LIMIT $limit
"""

_SPANS = """
SELECT * FROM spans WHERE
  ($before_ns::BIGINT IS NULL OR start_ns < $before_ns OR (start_ns = $before_ns AND span_id < $before_id))
  AND ($episode_id::VARCHAR IS NULL OR episode_id = $episode_id)
  AND ($slot::VARCHAR IS NULL OR prompt_slot = $slot OR adapter_slot = $slot)
  AND ($version::INTEGER IS NULL OR (($slot IS NULL OR prompt_slot = $slot) AND prompt_version = $version)
    OR (($slot IS NULL OR adapter_slot = $slot) AND adapter_version = $version))
  AND ($status::VARCHAR IS NULL OR status = $status)
ORDER BY start_ns DESC, span_id DESC LIMIT $limit
"""

_EPISODE_SPANS = """
SELECT s.*, p.input_messages, p.output_messages, p.tools, p.attributes
FROM (SELECT * FROM spans WHERE episode_id = $episode_id) AS s
LEFT JOIN (SELECT * FROM payloads WHERE episode_id = $episode_id) AS p USING (span_id)
"""

_EPISODE_ECHOES = """
SELECT span_id, parent_span_id, echo_of FROM echoes
WHERE echo_of IN (SELECT span_id FROM spans WHERE episode_id = $episode_id)
"""

# A zone map and a dictionary answer this at once where there are none.
_OBSERVED = "SELECT 1 FROM spans WHERE source = 'otlp' LIMIT 1"

_EPISODE_REWARDS = "SELECT * FROM rewards_v WHERE episode_id = $episode_id ORDER BY ts_ns, reward_id"

_UNMATCHED = """
SELECT * FROM rewards_v WHERE episode_id IS NULL
  OR (target_kind = 'episode' AND NOT EXISTS (SELECT 1 FROM spans AS s WHERE s.episode_id = rewards_v.episode_id))
ORDER BY ts_ns DESC LIMIT $limit
"""

_JOBS = "SELECT * FROM jobs_v WHERE ($job_id::VARCHAR IS NULL OR job_id = $job_id) ORDER BY ts_ns DESC"

_EVALUATIONS = "SELECT * FROM evaluations WHERE ($job_id::VARCHAR IS NULL OR job_id = $job_id) ORDER BY ts_ns, rowid"


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


class Store:
    """One open projection. Thread-safe: each call works on a cursor of its own.

    Raises Conflict when another process has the file open.
    """

    def __init__(self, path: Path, journal: Path, settings: Storage, weights: Mapping[str, float]) -> None:
        self.path = Path(path)
        self.rebuilt = 0  # how often a broken or outdated file was replaced
        self._journal = Path(journal)
        self._settings = settings
        self._weights = dict(weights)
        self._lock = threading.Lock()
        self._con = self._open()

    def reopen(self) -> None:
        """After a fatal error of the engine: close, and open again what is there or a new file."""
        with self._lock:
            with contextlib.suppress(duckdb.Error):
                self._con.close()
            self._con = self._open()

    def close(self) -> None:
        """Write a checkpoint, so that the next start replays nothing."""
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
            if known not in (None, SCHEMA_HASH):
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
            "threads": 2,
            "memory_limit": f"{self._settings.memory_limit_mb}MB",
            "wal_autocheckpoint": "256MB",
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
        """Another version of the schema wrote this file: the journal fills a new one, nothing of it is needed."""
        log.warning("%s has another schema; it is rebuilt from the journal", self.path)
        self.rebuilt += 1
        for path in (self.path, self.path.with_name(self.path.name + ".wal")):
            path.unlink(missing_ok=True)

    def _prepare(self, con: "duckdb.DuckDBPyConnection", known: str | None) -> None:
        """Tables and views where they are new, weights, then the walls: no file but the journal can be read, and
        nothing reconfigured."""
        if known is None:
            con.execute("BEGIN")
            con.execute(SCHEMA)
            con.execute("INSERT INTO _meta VALUES ('schema', ?)", [SCHEMA_HASH])
            con.execute("COMMIT")
            con.execute("CHECKPOINT")
        weights = dict(con.execute("SELECT name, weight FROM reward_weights").fetchall())
        if weights != self._weights:
            con.execute("BEGIN")
            con.execute("DELETE FROM reward_weights")
            for name, weight in self._weights.items():
                con.execute("INSERT INTO reward_weights VALUES (?, ?)", [name, weight])
            con.execute("COMMIT")
        con.execute("SET allowed_directories = ?", [[str(self._journal.resolve())]])
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

    # Loading

    def loaded(self) -> set[str]:
        """The names of the segments that are in the projection."""
        with self._cursor() as cursor:
            return {name for (name,) in cursor.execute("SELECT name FROM _segments").fetchall()}

    def load(self, segments: Sequence[Segment]) -> None:
        """Insert the rows of sealed segments and their names in one transaction.

        Raises one of DATA_ERRORS where a line does not fit the schema; then nothing of it was stored.
        """
        with self._cursor() as cursor:
            cursor.execute("BEGIN")
            try:
                self._insert(cursor, segments)
                cursor.execute("COMMIT")
            except duckdb.Error:
                with contextlib.suppress(duckdb.Error):
                    cursor.execute("ROLLBACK")
                raise

    def fits(self, segment: Segment) -> bool:
        """Whether every line of the segment fits the schema. Nothing is stored."""
        with self._cursor() as cursor:
            cursor.execute("BEGIN")
            try:
                self._insert(cursor, [segment])
            except DATA_ERRORS:
                return False
            finally:
                with contextlib.suppress(duckdb.Error):
                    cursor.execute("ROLLBACK")
        return True

    def _insert(self, cursor: "duckdb.DuckDBPyConnection", segments: Sequence[Segment]) -> None:
        now = time.time_ns()
        size = max(16 << 20, max(segment.longest for segment in segments) + 1024)
        events = frozenset().union(*(segment.events for segment in segments))
        first = self._first_row(cursor, events)
        for event, statements in _INSERTS.items():
            files = [str(segment.path.resolve()) for segment in segments if event in segment.events]
            for statement in statements if files else ():
                cursor.execute(statement, [files, size])
        if first is not None:
            settle(cursor, first, observed="otlp" in events, recorded="span" in events)
        for one in segments:
            values = [one.name, one.lines, one.quarantined, one.bytes, now]
            cursor.execute("INSERT INTO _segments VALUES (?, ?, ?, ?, ?)", values)

    def _first_row(self, cursor: "duckdb.DuckDBPyConnection", events: frozenset[str]) -> int | None:
        """Where new rows of `spans` will begin; None while there are no agents' own spans to settle."""
        if "otlp" not in events and not ("span" in events and cursor.execute(_OBSERVED).fetchall()):
            return None
        return int(cursor.execute("SELECT coalesce(max(rowid), -1) + 1 FROM spans").fetchall()[0][0])

    # Reading

    def registry_events(self) -> list[tuple[str, dict[str, Any]]]:
        """Versions, candidates, deployments and keys, in the order in which they can be folded."""
        return [
            (event, results.parsed(row, ("match", "metrics", "arms", "scopes", "limits")))
            for event, statement in _REGISTRY.items()
            for row in self._rows(statement)
        ]

    def episodes(self, **where: Any) -> list[dict[str, Any]]:
        """Rows of `episodes_v`, newest first. See _EPISODES for the parameters, all needed, None for any."""
        return self._rows(_EPISODES, where)

    def spans(self, **where: Any) -> list[dict[str, Any]]:
        """Rows of `spans`, newest first."""
        return self._rows(_SPANS, where)

    def episode(self, episode_id: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """`(spans with payloads, resolved rewards)` of one episode."""
        where = {"episode_id": episode_id}
        return self._rows(_EPISODE_SPANS, where), self._rows(_EPISODE_REWARDS, where)

    def echoes(self, episode_id: str) -> list[dict[str, Any]]:
        """The agents' own spans that repeat calls of one episode: {"span_id", "parent_span_id", "echo_of"}."""
        return self._rows(_EPISODE_ECHOES, {"episode_id": episode_id})

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
        """Counts of rows."""
        return self._rows(_STATS)[0]

    def content(self) -> dict[str, tuple[int, int]]:
        """`{table: (rows, hash)}`; the hash does not depend on the order of the rows."""
        with self._cursor() as cursor:
            found = {name: cursor.execute(statement).fetchall()[0] for name, statement in _COUNTS.items()}
        return {name: (count, int(digest or 0)) for name, (count, digest) in found.items()}

    def _rows(self, statement: str, where: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        with self._cursor() as cursor:
            done = cursor.execute(statement, dict(where)) if where else cursor.execute(statement)
            names = [column[0] for column in done.description]
            return [dict(zip(names, row, strict=True)) for row in done.fetchall()]

    def query(self, sql: str, limit: int) -> results.Table:
        """The first `limit` rows of one SELECT, in a read-only transaction, stopped after `store.query_timeout`.

        Raises QueryError with the engine's own words.
        """
        statement = _one_select(sql)
        with self._cursor() as cursor:
            timer = threading.Timer(self._settings.query_timeout, cursor.interrupt)
            timer.start()
            try:
                cursor.execute("BEGIN TRANSACTION READ ONLY")
                return results.collect(cursor.sql(statement), limit)
            except duckdb.InterruptException:
                seconds = self._settings.query_timeout
                raise QueryError(f"stopped after {seconds:g} s; narrow the query", code="query_timeout") from None
            except _FATAL:
                raise
            except (duckdb.Error, RuntimeError) as error:
                raise QueryError(str(error), param="sql") from None
            finally:
                timer.cancel()


def _known_schema(con: "duckdb.DuckDBPyConnection") -> str | None:
    """The hash of the schema that made this file; None for a new file."""
    try:
        found = con.execute("SELECT value FROM _meta WHERE key = 'schema'").fetchall()
    except duckdb.CatalogException:
        return None
    return str(found[0][0]) if found else ""


def _one_select(sql: str) -> Any:
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise QueryError(str(error), param="sql") from None
    if len(statements) != 1:
        raise QueryError(f"give exactly one statement, not {len(statements)}", param="sql")
    if statements[0].type != duckdb.StatementType.SELECT:
        raise QueryError("only SELECT can be asked here; the store is read-only", param="sql")
    if statements[0].named_parameters:
        raise QueryError("parameters cannot be given here; write the values", param="sql")
    return statements[0]
