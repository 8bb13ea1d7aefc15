"""A million spans: the newest page, and all episodes with their rewards beside SQLite with indexes and the same SQL."""

import contextlib
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from bench.result import Result
from bench.store import browse
from bench.store.ingest import folder, settings
from collector.service import Collector

_CALLS = 6  # of an episode

_FILL = """
INSERT INTO spans BY NAME
SELECT printf('%016x', i * 7919 + 13) AS span_id, printf('%032x', (i // 6) * 104729 + 1) AS trace_id,
  'ep-' || printf('%012x', hash(i // 6) % 281474976710656) AS episode_id, 'chain' AS episode_source,
  'proxy' AS source, 'chat' AS operation, '/v1/chat/completions' AS route,
  1760000000000000000 + (i // 96) * 3840000000 + (i % 6) * 600000000 + ((i % 96) // 6) * 40000000 AS start_ns,
  start_ns + 500000000 AS end_ns, 100.0 AS ttft_ms, 1 AS attempts,
  CASE WHEN i % 50 = 0 THEN 'error' ELSE 'ok' END AS status, 200 AS http_status, 'm' AS request_model,
  'm' AS response_model, 'chatcmpl-' || printf('%024x', hash(i)) AS response_id, 'stop' AS finish_reason,
  false AS stream, 1200 + i % 300 AS input_tokens, 100 + i % 50 AS output_tokens, 'agent' AS prompt_slot,
  1 + (i // 6) % 3 AS prompt_version, 6000 AS request_bytes, 800 AS response_bytes, 1 + i // 1000 AS batch, 20000 AS day
FROM range($spans) AS t(i)
"""
_JUDGE = """
INSERT INTO rewards BY NAME
SELECT 'rw-' || printf('%020x', hash(i)) AS reward_id,
  CASE WHEN i % 4 = 0 THEN 'response' ELSE 'episode' END AS target_kind,
  CASE WHEN i % 4 = 0 THEN 'chatcmpl-' || printf('%024x', hash(i * 6 + 5))
    ELSE 'ep-' || printf('%012x', hash(i) % 281474976710656) END AS target_id,
  'reward' AS name, (i % 100) / 100.0 AS value, 'code' AS source, 1760000000000000000 + i AS ts_ns, 20000 AS day,
  key_of(target_id) AS target_key
FROM range($episodes) AS t(i)
"""
_ALL = """
SELECT count(*), sum(steps), sum(input_tokens), sum(output_tokens), sum(errors), round(sum(reward), 3), max(end_ns)
FROM episodes_v
"""
# What episodes_v says, for SQLite: its own tables, indexed by episode, response and target.
_LITE = """
SELECT count(*), sum(steps), sum(input_tokens), sum(output_tokens), sum(errors), round(sum(reward), 3), max(end_ns)
FROM (
  SELECT s.episode_id, min(start_ns) AS start_ns, max(end_ns) AS end_ns, count(*) AS steps,
    sum(input_tokens) AS input_tokens, sum(output_tokens) AS output_tokens, sum(status <> 'ok') AS errors
  FROM spans AS s GROUP BY s.episode_id
) AS e LEFT JOIN (
  SELECT episode_id, sum(value) AS reward FROM (
    SELECT coalesce(s.episode_id, r.target_id) AS episode_id, r.value,
      row_number() OVER (
        PARTITION BY r.target_kind, r.target_id, r.name ORDER BY r.ts_ns DESC, r.reward_id DESC) AS rank
    FROM rewards AS r LEFT JOIN spans AS s ON r.target_kind = 'response' AND s.response_id = r.target_id
  ) WHERE rank = 1 GROUP BY episode_id
) AS j USING (episode_id)
"""
_COLUMNS = "span_id, trace_id, episode_id, start_ns, end_ns, status, response_id, input_tokens, output_tokens"
_REWARD_COLUMNS = "reward_id, target_kind, target_id, name, value, ts_ns"


def measure(result: Result, spans: int, rounds: int) -> None:
    """Fill in the figures of `spans` spans."""
    with folder() as data_dir:
        collector = Collector(settings(data_dir), background=False)
        _fill(collector, spans)
        began = time.perf_counter()
        collector.store.fold()
        result.measures["fold_all_s"] = time.perf_counter() - began
        collector.store.checkpoint()
        result.measures["page_ms"] = 1000 * _best(lambda: collector.episodes(50), rounds * 3)
        page = collector.episodes(50)
        result.measures["next_page_ms"] = 1000 * _best(lambda: collector.episodes(50, page["next"]), rounds)
        result.measures["spans_page_ms"] = 1000 * _best(lambda: collector.spans(50), rounds)
        shown = page["episodes"][7]["episode_id"]
        result.measures["one_episode_ms"] = 1000 * _best(lambda: collector.episode(shown), rounds)
        ours = _cpu(lambda: collector.query(_ALL), rounds)
        result.measures["page_cpu_ms"] = 1000 * _cpu(lambda: collector.episodes(50), rounds * 3)
        found = collector.query(_ALL).json()["rows"][0]
        lite, expected = _sqlite(collector, data_dir / "spans.sqlite", rounds)
        collector.close()
        browse.measure(result, data_dir, rounds)
    result.notes["same_answer_as_sqlite"] = [float(one) for one in found] == [float(one) for one in expected]
    result.measures["episodes_cpu_ms"] = 1000 * ours
    result.measures["episodes_sqlite_cpu_ms"] = 1000 * lite
    result.measures["episodes_x_sqlite"] = lite / ours if result.notes["same_answer_as_sqlite"] else 0.0


def _fill(collector: Collector, spans: int) -> None:
    store = collector.store
    with store._cursor() as cursor:
        cursor.execute(_FILL, {"spans": spans})
        cursor.execute(_JUDGE, {"episodes": spans // _CALLS})
    store._batch = spans // 1000 + 1
    store._behind = True


def _best(read: Callable[[], object], rounds: int) -> float:
    """The shortest of some runs: what else the machine does only ever adds."""
    return min(_timed(read, time.perf_counter) for _ in range(rounds))


def _timed(read: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    read()
    return clock() - began


def _cpu(read: Callable[[], object], rounds: int) -> float:
    """CPU seconds of the shortest run; every engine here reads in one thread, the caller's."""
    return min(_timed(read, time.thread_time) for _ in range(rounds))


def _sqlite(collector: Collector, path: Path, rounds: int) -> tuple[float, tuple[float, ...]]:
    """(CPU seconds of the shortest run, its answer) with the same rows."""
    with contextlib.closing(sqlite3.connect(path)) as connection, collector.store._cursor() as cursor:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"CREATE TABLE spans ({_COLUMNS})")
        connection.execute(f"CREATE TABLE rewards ({_REWARD_COLUMNS})")
        with connection:
            rows = cursor.execute(f"SELECT {_COLUMNS} FROM spans")
            while batch := rows.fetchmany(50_000):
                connection.executemany("INSERT INTO spans VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", batch)
            judged = cursor.execute(f"SELECT {_REWARD_COLUMNS} FROM rewards").fetchall()
            connection.executemany("INSERT INTO rewards VALUES (?, ?, ?, ?, ?, ?)", judged)
            connection.execute("CREATE INDEX by_episode ON spans (episode_id, start_ns)")
            connection.execute("CREATE INDEX by_response ON spans (response_id)")
            connection.execute("CREATE INDEX by_target ON rewards (target_kind, target_id)")
            connection.execute("ANALYZE")
        taken = _cpu(lambda: connection.execute(_LITE).fetchall(), rounds)
        return taken, connection.execute(_LITE).fetchall()[0]
