"""A full disk, a torn tail, a corrupted write-ahead log, a clock that jumps: what a running server makes of them."""

import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from collector.journal import encode
from tests.fake_upstream import FakeUpstream, chat
from tests.faults import figures, processes
from tests.served import Served, served
from tests.unit.collector.days import write_day
from tests.unit.collector.rows import call


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream(lambda _: chat("Paris")) as running:
        yield running


def ask(server: Served, episode: str) -> str:
    body = {"model": "fake-model", "messages": [{"role": "user", "content": "Capital of France?"}]}
    answer = httpx.post(f"{server.url}/e/{episode}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == 200
    return answer.headers["x-ratchet-span"]


def stored(server: Served, key: str = "span_id", table: str = "spans") -> list[str]:
    server.client.flush()
    return [row[0] for row in server.client.query(f"SELECT {key} FROM {table} ORDER BY 1", 100_000)["rows"]]


@pytest.mark.parametrize("room", [0, 50])
def test_a_full_disk_is_served_through_counted_and_red(tmp_path: Path, upstream: FakeUpstream, room: int) -> None:
    """A limit on the size of files stands for the disk: the kernel refuses to write, at once or in mid-line."""
    with served(tmp_path / "data", upstream.url) as server:
        before = [ask(server, "before") for _ in range(5)]
        (worker,) = processes.find(server.process.pid, "proxy.worker")
        unlimited = resource.prlimit(worker, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        for _ in range(5):
            ask(server, "during")
        health = httpx.get(f"{server.url}/healthz")
        assert health.status_code == 503
        dropped = health.json()["journal"]["dropped"]
        assert dropped == 5
        reward = httpx.post(f"{server.url}/reward", json={"episode_id": "before", "value": 1})
        assert reward.status_code in (202, 503)
        taken = [reward.json()["reward_id"]] if reward.status_code == 202 else []
        resource.prlimit(worker, resource.RLIMIT_FSIZE, unlimited)
        after = [ask(server, "after") for _ in range(5)]
        processes.until(lambda: httpx.get(f"{server.url}/healthz").status_code == 200, 10, "healthy again")
        found = stored(server)
        spans = figures.account(f"disk_full_{room}", before + after, found, served=15, counted_as_dropped=dropped)
        assert (spans.lost, spans.doubled) == (0, 0)
        assert stored(server, "reward_id", "rewards") == taken
        assert found == sorted(before + after)
        text = httpx.get(f"{server.url}/metrics").text
        assert [line for line in text.splitlines() if "ratchet_journal_lines_total" in line and "dropped" in line]


def test_a_full_disk_under_the_collector_costs_nothing_once_there_is_room(
    tmp_path: Path, upstream: FakeUpstream
) -> None:
    """Calls are answered and journalled all the while; what could not be loaded is, when it can."""
    with served(tmp_path / "data", upstream.url) as server:
        before = [ask(server, "before") for _ in range(5)]
        assert stored(server) == sorted(before)
        (collector,) = processes.find(server.process.pid, "collector")
        unlimited = resource.prlimit(collector, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        during = [ask(server, "during") for _ in range(20)]
        processes.until(lambda: loader(server)["errors"], 20, "the loader has met the limit")
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        for pid in {collector, *processes.find(server.process.pid, "collector")}:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
        after = [ask(server, "after") for _ in range(5)]
        everything = before + during + after
        processes.until(lambda: len(stored(server)) >= len(everything), 30, "everything is loaded")
        figure = figures.account("disk_full_collector", everything, stored(server), errors=loader(server)["errors"])
        assert (figure.lost, figure.doubled) == (0, 0)


def loader(server: Served) -> dict[str, int]:
    counters: dict[str, int] = server.client.stats()["loader"]
    return counters


def test_a_torn_tail_is_trimmed_and_a_corrupt_line_set_aside(tmp_path: Path, upstream: FakeUpstream) -> None:
    data_dir = tmp_path / "data"
    with served(data_dir, upstream.url) as server:
        spans = [ask(server, "torn") for _ in range(10)]
        processes.kill_all(server.process)
    segments = [path for path in (data_dir / "journal").iterdir() if path.is_file()]
    latest = max(segments, key=lambda path: (path.suffix == ".open", path.stat().st_mtime))
    with latest.open("ab") as file:
        file.write(encode("span", call(1))[:-20])  # half a line, as a machine that stops leaves it
    orphan = data_dir / "journal" / "1600000000000000000-w9-1-aa.open"
    line = encode("span", call(2))
    orphan.write_bytes(line.replace(b"question", b"quastion") + encode("span", call(3)) + line[:40])
    with served(data_dir, upstream.url) as server:
        stats, found = server.client.stats(), stored(server)
        figures.account("torn_tail", [*spans, f"{3:016x}"], found, kills=1, quarantined=stats["quarantined"])
        assert found == sorted([*spans, f"{3:016x}"])
        assert stats["quarantined"] in (1, 2)


def test_a_corrupted_log_of_the_database_costs_a_rebuild_and_nothing_else(
    tmp_path: Path, upstream: FakeUpstream
) -> None:
    data_dir = tmp_path / "data"
    with served(data_dir, upstream.url) as server:
        for number in range(3):
            write_day(data_dir, 3, *(call(0, span_id=f"{number:08x}{index:08x}") for index in range(200)))
        spans = [ask(server, "wal") for _ in range(10)]
        server.client.compact()
        write_day(data_dir, 2, *(call(0, span_id=f"{9:08x}{index:08x}") for index in range(200)))
        before = stored(server)
        assert len(before) == 810
        processes.kill_all(server.process)
    log = data_dir / "ratchet.duckdb.wal"
    damaged = log if log.exists() else data_dir / "ratchet.duckdb"
    with damaged.open("r+b") as file:
        file.seek(damaged.stat().st_size // 3)
        file.write(b"\0" * 4096)
    began = time.monotonic()
    with served(data_dir, upstream.url) as server:
        found = stored(server)
        took = round(time.monotonic() - began, 1)
        figures.account("corrupted_wal", before, found, kills=1, overwritten=damaged.name, seconds_to_rebuild=took)
        assert found == before
        assert set(spans) <= set(before)
        assert "moved aside" in server.log.read_text() or not list(data_dir.glob("*.corrupt-*"))


def test_a_clock_that_jumps_loses_and_doubles_nothing(tmp_path: Path, upstream: FakeUpstream) -> None:
    data_dir = tmp_path / "data"
    with served(data_dir, upstream.url) as server:
        spans = [ask(server, "clock") for _ in range(3)]
        write_day(data_dir, -4000, call(1))  # a writer whose clock was years ahead
        write_day(data_dir, 15_000, call(2))  # and one whose clock was decades behind
        expected = sorted([*spans, f"{1:016x}", f"{2:016x}"])
        assert stored(server) == expected
        assert server.client.compact()["spans"] == 1
        assert stored(server) == expected
        spans += [ask(server, "clock") for _ in range(3)]
        assert len(stored(server)) == 8
    with served(data_dir, upstream.url) as server:
        assert len(stored(server)) == 8
        assert loader(server)["lag_s"] == 0
        figures.account("clocks_years_apart", [*spans, f"{1:016x}", f"{2:016x}"], stored(server))
