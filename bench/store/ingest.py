"""Sustained ingest of 6 KB spans against `executemany` of the same rows, and what a span takes on disk."""

import contextlib
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import duckdb

from bench.result import Result
from bench.store.data import calls
from collector.journal import Journal
from collector.maintenance import rebuild
from collector.model import Exchange
from collector.service import Collector
from collector.settings import Settings

_BATCH = 500
_PAYLOAD = ("input_messages", "output_messages", "tools", "token_ids", "logprobs", "attributes")


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A directory that is removed again."""
    with tempfile.TemporaryDirectory(prefix="bench-store") as path:
        yield Path(path)


def settings(data_dir: Path) -> Settings:
    """The defaults, with the data in `data_dir`."""
    return Settings.model_validate({"store": {"data_dir": str(data_dir)}})


def write(data_dir: Path, spans: Sequence[Exchange]) -> int:
    """Journal all; returns bytes."""
    journal = Journal(data_dir / "journal", "w0")
    for span in spans:
        journal.append("span", span)
    journal.close()
    return journal.bytes


def measure(result: Result, count: int, sample: int, rounds: int) -> None:
    """Fill in the figures of ingest, size and rebuild: `count` spans for us, `sample` of them for `executemany`."""
    spans = list(calls(count))
    result.notes["payload_bytes_mean"] = sum(len(one.input_messages or "") for one in spans) // count
    ours: list[tuple[float, float]] = []
    many: list[tuple[float, float]] = []
    for _ in range(rounds):
        with folder() as data_dir:
            journalled = write(data_dir, spans)
            ours.append(_load(data_dir, count))
            if len(ours) == rounds:
                _after(result, data_dir, spans, journalled)
        with folder() as data_dir:
            many.append(_executemany(data_dir / "plain.duckdb", spans[:sample]))
    result.measures["ingest_spans_per_s"] = max(rate for rate, _ in ours)
    result.measures["executemany_spans_per_s"] = max(rate for rate, _ in many)
    result.measures["ingest_x_executemany"] = max(rate for rate, _ in ours) / max(rate for rate, _ in many)
    result.measures["ingest_cpu_us_per_span"] = min(cpu for _, cpu in ours)
    result.measures["executemany_cpu_us_per_span"] = min(cpu for _, cpu in many)


def _load(data_dir: Path, count: int) -> tuple[float, float]:
    """(spans/s, CPU us a span) from sealed segments to rows, checkpoint and the table of episodes included."""
    wall, cpu = time.perf_counter(), time.process_time()
    collector = Collector(settings(data_dir), background=False)  # loads what waits
    collector.close()
    return count / (time.perf_counter() - wall), (time.process_time() - cpu) / count * 1e6


def _columns() -> list[tuple[str, str]]:
    hints = Exchange.__annotations__
    types = {"int": "BIGINT", "float": "DOUBLE", "bool": "BOOLEAN"}
    return [
        (name, "JSON" if name in _PAYLOAD else types.get(str(getattr(hint, "__name__", hint)).split(" ")[0], "VARCHAR"))
        for name, hint in hints.items()
    ]


def _executemany(path: Path, spans: Sequence[Exchange]) -> tuple[float, float]:
    """The same rows into one table whose payload columns are of type JSON, transactions of 500."""
    connection = duckdb.connect(str(path), config={"threads": 1})
    rows = [tuple(asdict(span).values()) for span in spans]
    with _plain_table(connection) as insert:
        wall, cpu = time.perf_counter(), time.process_time()
        for start in range(0, len(rows), _BATCH):
            connection.execute("BEGIN")
            connection.executemany(insert, rows[start : start + _BATCH])
            connection.execute("COMMIT")
        took, used = time.perf_counter() - wall, time.process_time() - cpu
    connection.close()
    return len(rows) / took, used / len(rows) * 1e6


@contextlib.contextmanager
def _plain_table(connection: duckdb.DuckDBPyConnection) -> Iterator[str]:
    columns = _columns()
    connection.execute(f"CREATE TABLE spans ({', '.join(f'{name} {kind}' for name, kind in columns)})")
    yield f"INSERT INTO spans VALUES ({', '.join('?' for _ in columns)})"


def _after(result: Result, data_dir: Path, spans: Sequence[Exchange], journalled: int) -> None:
    count = len(spans)
    ours = (data_dir / "ratchet.duckdb").stat().st_size
    before = _content(data_dir)
    result.measures["rebuild_identical"] = float(rebuild(settings(data_dir)) == before)
    result.measures["bytes_per_span"] = ours / count
    result.measures["journal_bytes_per_span"] = journalled / count
    json = _json_size(data_dir / "json.duckdb", data_dir / "journal")
    lite = _sqlite_size(data_dir / "spans.sqlite", spans)
    result.measures["bytes_json_columns_x"] = json / ours
    result.measures["bytes_sqlite_x"] = lite / ours
    result.notes["json_bytes_per_span"], result.notes["sqlite_bytes_per_span"] = json / count, lite / count


def _content(data_dir: Path) -> object:
    collector = Collector(settings(data_dir), background=False)
    try:
        return collector.store.content()
    finally:
        collector.close()


def _json_size(path: Path, journal: Path) -> int:
    """The same rows with JSON columns, in the engine's default compression, after a checkpoint."""
    connection = duckdb.connect(str(path))
    with _plain_table(connection):
        names = {name: "VARCHAR" if kind == "JSON" else kind for name, kind in _columns()}
        connection.execute(
            "INSERT INTO spans BY NAME SELECT * FROM read_ndjson(?, columns = ?, maximum_object_size = 33554432)",
            [str(journal / "*.ndjson"), names],
        )
    connection.execute("CHECKPOINT")
    connection.close()
    return path.stat().st_size


def _sqlite_size(path: Path, spans: Sequence[Exchange]) -> int:
    """The same rows in SQLite, with the indexes that looking up a span and an episode needs."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    columns = _columns()
    connection.execute(f"CREATE TABLE spans ({', '.join(name for name, _ in columns)})")
    insert = f"INSERT INTO spans VALUES ({', '.join('?' for _ in columns)})"
    with connection:
        connection.executemany(insert, (tuple(asdict(span).values()) for span in spans))
        connection.execute("CREATE INDEX by_span ON spans (span_id)")
        connection.execute("CREATE INDEX by_episode ON spans (episode_id, start_ns)")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return path.stat().st_size
