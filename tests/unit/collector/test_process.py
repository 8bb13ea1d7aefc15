import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from collector.__main__ import main
from collector.service import Collector
from tests.patience import within
from tests.unit.collector.rows import call, settings, write

ROOT = Path(__file__).parents[3]


class Process:
    """`python -m collector` on a socket in a folder of its own."""

    def __init__(self, data_dir: Path, folder: str, pipe: int | None = None) -> None:
        self.socket = str(Path(folder) / "c.sock")
        command = [sys.executable, "-P", "-m", "collector", "--socket", self.socket, "--config", "-"]
        if pipe is not None:
            command += ["--parent-fd", str(pipe)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            pass_fds=[] if pipe is None else [pipe],
        )
        assert self.popen.stdin is not None
        self.popen.stdin.write(settings(data_dir).model_dump_json())
        self.popen.stdin.close()
        self.http = httpx.Client(transport=httpx.HTTPTransport(uds=self.socket), base_url="http://c", timeout=30)

    def wait_until_it_listens(self) -> None:
        end = time.monotonic() + 60
        while True:
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
                probe.connect(self.socket)
                return
            assert self.popen.poll() is None, self.popen.stderr and self.popen.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.05)

    def end(self) -> None:
        self.http.close()
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(30)
        if self.popen.stderr is not None:
            self.popen.stderr.close()


@contextlib.contextmanager
def running(data_dir: Path, pipe: int | None = None) -> Iterator[Process]:
    with tempfile.TemporaryDirectory(prefix="rt") as folder:
        process = Process(data_dir, folder, pipe)
        try:
            process.wait_until_it_listens()
            yield process
        finally:
            process.end()


def test_a_term_ends_it_cleanly_with_everything_loaded(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        accepted = process.http.post("/reward", json={"episode_id": "ep-a", "value": 1})
        assert accepted.status_code == 202
        write(tmp_path, call(1))
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(30) == 0
    assert not list((tmp_path / "journal").glob("*.open"))
    assert not (tmp_path / "ratchet.duckdb.wal").exists()
    collector = Collector(settings(tmp_path), background=False)
    assert collector.episode("ep-a")["reward"] == 1.0
    assert collector.loader.counters.lines == 0, "nothing was left to load"
    collector.close()


def test_nobody_else_reads_what_it_stores(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with running(tmp_path) as process:
        process.http.post("/reward", json={"episode_id": "e", "value": 1}).raise_for_status()
        process.http.post("/api/flush").raise_for_status()
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert {path.name for path in files} >= {"ratchet.duckdb", "ratchet.duckdb.wal"}
        assert [path.name for path in files if path.stat().st_mode & 0o077] == []


def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    acknowledged = []
    for _ in range(2):
        with running(tmp_path) as process:
            for number in range(20):
                answer = process.http.post("/reward", json={"episode_id": "ep-a", "value": number})
                acknowledged.append(answer.json()["reward_id"])
            process.popen.kill()
            process.popen.wait(30)
    collector = Collector(settings(tmp_path), background=False)
    rows = collector.query("SELECT reward_id FROM rewards", 1000).json()["rows"]
    collector.close()
    assert sorted(row[0] for row in rows) == sorted(acknowledged)


def test_the_death_of_the_parent_ends_it(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with running(tmp_path, reading) as process:
        os.close(reading)
        os.close(writing)
        begin = time.monotonic()
        process.popen.wait(30)
        assert time.monotonic() - begin < within(5)  # a second, and what a busy machine adds


def test_a_second_one_on_the_same_directory_does_not_start(tmp_path: Path) -> None:
    collector = Collector(settings(tmp_path))
    config = settings(tmp_path).model_dump_json()
    assert main(["--socket", "unused", "--config", config]) == 1
    collector.close()


def test_the_command_line_is_checked() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--config", "{}"])
    assert caught.value.code == 2
