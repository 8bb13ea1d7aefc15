"""`python -m bench.clickhouse`: the same journal in DuckDB and in ClickHouse's engine, side by side in one run.

ClickHouse is chdb, its engine as a library, behind the loopback server of the tests: one process that runs statements
one after another. A real server runs them at once and has a network in between. Wall times are the shortest of a few;
CPU is that of the whole process that holds the engine.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.result import RESULTS, Result
from bench.store.data import calls
from collector.journal import Journal
from collector.model import Exchange, Reward
from collector.service import Collector
from collector.settings import Settings
from tests.clickhouse.server import ABSENT, PYTHON, Server, running

_CALLS = 6  # of an episode
_BASE_NS = 1_760_000_000_000_000_000
_TICK = os.sysconf("SC_CLK_TCK")
_QUERIES = {
    "all_episodes": """SELECT count(*), sum(steps), sum(input_tokens), sum(errors), round(sum(reward), 3)
        FROM episodes_v""",
    "by_version": """SELECT s.prompt_version, count(*), avg(e.reward), sum(s.output_tokens) FROM spans_v AS s
        JOIN episodes_v AS e USING (episode_id) GROUP BY s.prompt_version ORDER BY s.prompt_version""",
    "text_scan": "SELECT count(*), sum(length(input_messages)) FROM spans_v WHERE input_messages LIKE '%number 77%'",
}
_HELD = """
SELECT sum(bytes_on_disk) FROM system.parts WHERE active AND database = currentDatabase() AND table = 'calls'
"""

Event = tuple[str, Any]


def narrow(count: int) -> Iterable[Event]:
    """`count` calls of episodes of six, with short messages, and a reward of each episode."""
    for number in range(count):
        episode = number // _CALLS
        start = (
            _BASE_NS + (number // 96) * 3_840_000_000 + number % _CALLS * 600_000_000 + number % 96 // 6 * 40_000_000
        )
        yield (
            "span",
            Exchange(
                span_id=f"{number * 7919 + 13:016x}",
                trace_id=f"{episode * 104729 + 1:032x}",
                episode_id=f"ep-{episode * 2654435761 % 2**48:012x}",
                episode_source="chain",
                start_ns=start,
                end_ns=start + 500_000_000,
                operation="chat",
                route="/v1/chat/completions",
                status="error" if number % 50 == 0 else "ok",
                http_status=200,
                request_model="m",
                response_model="m",
                response_id=f"chatcmpl-{number:024x}",
                finish_reason="stop",
                input_tokens=1200 + number % 300,
                output_tokens=100 + number % 50,
                prompt_slot="agent",
                prompt_version=1 + episode % 3,
                input_messages=f'[{{"role":"user","content":"question number {number}"}}]',
                output_messages=f'[{{"role":"assistant","content":"answer {number}"}}]',
            ),
        )
        if number % _CALLS == 0:
            yield (
                "reward",
                Reward(
                    reward_id=f"rw-{episode:020x}",
                    target_kind="response" if episode % 4 == 0 else "episode",
                    target_id=f"chatcmpl-{number:024x}"
                    if episode % 4 == 0
                    else f"ep-{episode * 2654435761 % 2**48:012x}",
                    value=episode % 100 / 100,
                    ts_ns=start,
                ),
            )


def wide(count: int) -> Iterable[Event]:
    """`count` calls of about 6 KB."""
    return (("span", one) for one in calls(count))


def write(data_dir: Path, events: Iterable[Event]) -> int:
    """Journal all; returns bytes."""
    journal = Journal(data_dir / "journal", "w0")
    for event in events:
        journal.append(*event)
    journal.close()
    return journal.bytes


def opened(data_dir: Path, url: str | None) -> Collector:
    """The collector of a journal, which it loads."""
    store = {"data_dir": str(data_dir), "url": url, "memory_limit_mb": 4096, "query_timeout": 120}
    return Collector(Settings.model_validate({"store": store}), background=False)


class _Clock:
    """Wall and CPU seconds of one process."""

    def __init__(self, pid: int) -> None:
        self._stat = Path(f"/proc/{pid}/stat")

    def cpu(self) -> float:
        fields = self._stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def best(self, ask: Callable[[], object], rounds: int) -> tuple[float, float]:
        """(shortest wall ms, mean CPU ms) of some runs."""
        walls, before = [], self.cpu()
        for _ in range(rounds):
            began = time.perf_counter()
            ask()
            walls.append(time.perf_counter() - began)
        return 1000 * min(walls), 1000 * (self.cpu() - before) / rounds


def measure(result: Result, engine: str, data_dir: Path, url: str | None, pid: int, sizes: tuple[int, int]) -> None:
    """Fill in one engine's figures: `sizes` are (narrow spans, wide spans)."""
    clock = _Clock(pid)

    def note(name: str, value: float) -> None:
        result.measures[f"{engine}_{name}"] = round(value, 2)

    for name, count, made in (("narrow", sizes[0], narrow), ("wide", sizes[1], wide)):
        folder = data_dir / f"{engine}-{name}"
        written = write(folder, made(count))
        began, cpu = time.perf_counter(), clock.cpu()
        collector = opened(folder, None if url is None else url + name)
        wall = time.perf_counter() - began
        note(f"ingest_{name}_spans_per_s", count / wall)
        note(f"ingest_{name}_cpu_us_per_span", (clock.cpu() - cpu) / count * 1e6)
        result.notes[f"{name}_journal_bytes_per_span"] = written // count
        if name == "narrow":
            _read(result, clock, collector, note)
        collector.close()


def _read(result: Result, clock: _Clock, collector: Collector, note: Callable[[str, float], None]) -> None:
    page = collector.episodes(50)
    shown = page["episodes"][7]["episode_id"]
    asked: dict[str, Callable[[], object]] = {
        "page": lambda: collector.episodes(50),
        "next_page": lambda: collector.episodes(50, page["next"]),
        "one_episode": lambda: collector.episode(shown),
        **{name: _query(collector, sql) for name, sql in _QUERIES.items()},
    }
    for name, ask in asked.items():
        wall, cpu = clock.best(ask, 5)
        note(f"{name}_ms", wall)
        note(f"{name}_cpu_ms", cpu)
    answers = [[float(one) for one in row] for sql in _QUERIES.values() for row in collector.query(sql).json()["rows"]]
    rounded = [[round(one, 6) for one in row] for row in answers]
    result.notes["same_answers"] = result.notes.setdefault("answers", rounded) == rounded


def _query(collector: Collector, sql: str) -> Callable[[], object]:
    return lambda: collector.query(sql)


def main() -> int:
    """Read the flags, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.clickhouse", description=__doc__)
    parser.add_argument("--spans", type=int, default=300_000, help="narrow spans of the reading figures")
    parser.add_argument("--wide", type=int, default=10_000, help="6 KB spans of the ingest figures")
    flags = parser.parse_args()
    if not PYTHON.exists():
        print(ABSENT)
        return 1
    began = time.monotonic()
    result = Result("clickhouse", {})
    result.notes["narrow_spans"], result.notes["wide_spans"] = flags.spans, flags.wide
    result.notes["load_average_before"] = os.getloadavg()[0]
    sizes = (flags.spans, flags.wide)
    with tempfile.TemporaryDirectory(prefix="bench-clickhouse") as path, running(Path(path) / "server") as server:
        measure(result, "duckdb", Path(path), None, os.getpid(), sizes)
        measure(result, "clickhouse", Path(path), server.url("bench_"), server.pid, sizes)
        _sizes(result, Path(path), server, flags.wide)
    result.notes["load_average_after"] = os.getloadavg()[0]
    result.write(time.monotonic() - began)
    picture(result, RESULTS / "clickhouse.svg")
    result.show()
    return 0


def _sizes(result: Result, folder: Path, server: Server, wide: int) -> None:
    """Bytes of a 6 KB span on disk, once DuckDB is closed and ClickHouse has merged its parts, as it does by itself."""
    server.ask("bench_wide", "OPTIMIZE TABLE calls FINAL")
    held = int(server.ask("bench_wide", _HELD))
    result.measures["clickhouse_bytes_per_wide_span"] = round(held / wide, 1)
    size = (folder / "duckdb-wide" / "ratchet.duckdb").stat().st_size
    result.measures["duckdb_bytes_per_wide_span"] = round(size / wide, 1)


def picture(result: Result, path: Path) -> None:
    """Milliseconds of each question in either engine, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = ["page", "next_page", "one_episode", *_QUERIES]
    figure, axes = pyplot.subplots(figsize=(8, 3.6))
    for shift, engine in ((-0.2, "duckdb"), (0.2, "clickhouse")):
        values = [result.measures[f"{engine}_{name}_ms"] for name in names]
        axes.barh([index + shift for index in range(len(names))], values, 0.38, label=engine)
    axes.set_yticks(range(len(names)), names)
    axes.set_xscale("log")
    axes.set_xlabel(f"ms at {result.notes['narrow_spans']:,} spans")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
