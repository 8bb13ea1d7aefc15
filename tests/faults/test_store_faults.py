"""A full disk, a torn tail, a corrupted write-ahead log, a clock that jumps: what a running server makes of them."""

import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from collector.journal import encode
from tests.fake_upstream import FakeUpstream, chat
from tests.faults import processes
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


def stored(server: Served) -> list[str]:
    server.client.flush()
    return [row[0] for row in server.client.query("SELECT span_id FROM spans ORDER BY 1", 100_000)["rows"]]


def kill_all(server: Served) -> None:
    children = processes.children(server.process.pid)
    for pid in (server.process.pid, *children):
        os.kill(pid, signal.SIGKILL)
    server.process.wait(10)
    processes.until(lambda: not any(processes.parent(pid) for pid in children), 10, "all have ended")


def test_a_full_disk_is_served_through_counted_and_red(tmp_path: Path, upstream: FakeUpstream) -> None:
    """A limit on the size of files stands for the disk: the kernel refuses to write, as it would there."""
    with served(tmp_path / "data", upstream.url) as server:
        before = [ask(server, "before") for _ in range(5)]
        (worker,) = processes.find(server.process.pid, "proxy.worker")
        unlimited = resource.prlimit(worker, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        for _ in range(5):
            ask(server, "during")
        health = httpx.get(f"{server.url}/healthz")
        assert health.status_code == 503
        assert health.json()["journal"]["dropped"] == 5
        assert httpx.post(f"{server.url}/reward", json={"episode_id": "before", "value": 1}).status_code in (202, 503)
        resource.prlimit(worker, resource.RLIMIT_FSIZE, unlimited)
        after = [ask(server, "after") for _ in range(5)]
        processes.until(lambda: httpx.get(f"{server.url}/healthz").status_code == 200, 10, "healthy again")
        assert stored(server) == sorted(before + after)
        text = httpx.get(f"{server.url}/metrics").text
        assert [line for line in text.splitlines() if "ratchet_journal_lines_total" in line and "dropped" in line]
        print("\ndisk full: 5 of 5 calls served, 5 counted as dropped, health red, then green; 10 of 10 others stored")


def test_a_torn_tail_is_trimmed_and_a_corrupt_line_set_aside(tmp_path: Path, upstream: FakeUpstream) -> None:
    data_dir = tmp_path / "data"
    with served(data_dir, upstream.url) as server:
        spans = [ask(server, "torn") for _ in range(10)]
        kill_all(server)
    segments = [path for path in (data_dir / "journal").iterdir() if path.is_file()]
    latest = max(segments, key=lambda path: (path.suffix == ".open", path.stat().st_mtime))
    with latest.open("ab") as file:
        file.write(encode("span", call(1))[:-20])  # half a line, as a machine that stops leaves it
    orphan = data_dir / "journal" / "1600000000000000000-w9-1-aa.open"
    line = encode("span", call(2))
    orphan.write_bytes(line.replace(b"question", b"quastion") + encode("span", call(3)) + line[:40])
    with served(data_dir, upstream.url) as server:
        assert stored(server) == sorted([*spans, f"{3:016x}"])
        stats = server.client.stats()
        assert stats["quarantined"] in (1, 2)
        print(f"\ntorn tail: 10 of 10 acknowledged spans, {stats['quarantined']} lines in quarantine, the rest loaded")


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
        kill_all(server)
    log = data_dir / "ratchet.duckdb.wal"
    damaged = log if log.exists() else data_dir / "ratchet.duckdb"
    with damaged.open("r+b") as file:
        file.seek(damaged.stat().st_size // 3)
        file.write(b"\0" * 4096)
    began = time.monotonic()
    with served(data_dir, upstream.url) as server:
        assert stored(server) == before
        assert set(spans) <= set(before)
        took = time.monotonic() - began
        print(f"\n{damaged.name} overwritten: 810 of 810 spans, 600 from the archive, {took:.1f} s after the start")
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
        assert server.client.stats()["loader"]["lag_s"] == 0
    print("\nclock jumps of years both ways: 8 of 8 spans, once")
