"""A worker process by itself: what it imports, what it needs, how it ends."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson

from collector.settings import Settings, Storage, Upstream
from proxy.supervisor import Runtime, listen, url_of, worker_command
from proxy.worker import read_spec
from tests.fake_upstream import FakeUpstream
from tests.patience import within

PROBE = """
import sys
import proxy.worker as worker
told = worker._say_ready
def probe():
    heavy = [name for name in ("duckdb", "torch", "litellm", "fastapi", "transformers") if name in sys.modules]
    sys.stderr.write(f"loaded: {heavy}\\n")
    told()
worker._say_ready = probe
worker.main()
"""


@dataclass
class Running:
    url: str
    process: "subprocess.Popen[bytes]"
    alive: int
    listener: socket.socket
    data: Path
    said: str


@contextlib.contextmanager
def running(data: Path, upstream: str, code: str | None = None) -> Iterator[Running]:
    """A worker with no collector, ready to serve."""
    data.mkdir(exist_ok=True)
    settings = Settings(store=Storage(data_dir=data), upstream=Upstream(default=upstream))
    alive, ours = os.pipe()
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(listen("127.0.0.1", 0))
        (data / "runtime").mkdir()
        command = worker_command(settings, Runtime(data / "runtime", alive), listener, 0, first=False)
        argv = list(command.argv) if code is None else [sys.executable, "-P", "-c", code]
        process = undo.enter_context(
            subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=command.fds,
            )
        )
        undo.callback(process.kill)
        os.close(alive)
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(command.stdin)
        process.stdin.close()
        assert process.stdout.readline() == b"ready\n", process.stderr.read().decode()
        said = "" if code is None else next(line for line in process.stderr if line.startswith(b"loaded")).decode()
        yield Running(url_of(listener, "127.0.0.1"), process, ours, listener, data, said)
        with contextlib.suppress(OSError):
            os.close(ours)


def call(worker: Running) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": "Capital of France?"}]}
    return httpx.post(f"{worker.url}/v1/chat/completions", json=body, timeout=30)


def sealed(data: Path) -> list[dict[str, object]]:
    files = (data / "journal").glob("*.ndjson")
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_worker_serves_with_no_collector_and_loads_nothing_heavy(tmp_path: Path) -> None:
    with FakeUpstream() as upstream, running(tmp_path / "data", upstream.url, PROBE) as worker:
        assert worker.said == "loaded: []\n"
        assert call(worker).status_code == 200
        assert httpx.get(f"{worker.url}/healthz").status_code == 200
        assert httpx.get(f"{worker.url}/readyz").status_code == 503


def test_sigterm_seals_the_journal_and_ends_with_zero(tmp_path: Path) -> None:
    with FakeUpstream() as upstream, running(tmp_path / "data", upstream.url) as worker:
        call(worker)
        worker.process.send_signal(signal.SIGINT)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(30) == 0
        assert [line["event"] for line in sealed(worker.data)] == ["span"]
        assert not list((worker.data / "journal").glob("*.open"))


def test_the_end_of_the_supervisor_ends_the_worker_within_a_second(tmp_path: Path) -> None:
    with FakeUpstream() as upstream, running(tmp_path / "data", upstream.url) as worker:
        call(worker)
        begun = time.monotonic()
        os.close(worker.alive)
        worker.process.wait(30)
        assert time.monotonic() - begun < within(1.0)
        assert len(sealed(worker.data)) == 1
        assert not (worker.data / "runtime").exists()


def test_a_worker_boots_from_the_cached_deployments(tmp_path: Path) -> None:
    old, new = "You are a helper.", "You are a better helper."
    versions = [{"version": 1, "template": old, "hash": "1" * 12}, {"version": 2, "template": new, "hash": "2" * 12}]
    log = [{"revision": 1, "slot": "s", "action": "promote", "arms": {"2": 1.0}, "ts_ns": 1}]
    cache = {"revision": 1, "slots": {"s": {"kind": "prompt", "match": {}, "versions": versions}}, "log": log}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "deployments.json").write_bytes(orjson.dumps(cache))
    with FakeUpstream() as upstream, running(tmp_path / "data", upstream.url) as worker:
        messages = [{"role": "system", "content": old}, {"role": "user", "content": "hi"}]
        answer = httpx.post(f"{worker.url}/v1/chat/completions", json={"model": "m", "messages": messages})
        assert answer.headers["x-ratchet-versions"] == "s@2"
        assert upstream.requests[0].json["messages"][0]["content"] == new


def test_the_spec_survives_its_way(tmp_path: Path) -> None:
    settings = Settings(store=Storage(data_dir=tmp_path))
    with listen("127.0.0.1", 0) as listener:
        command = worker_command(settings, Runtime(tmp_path, 9), listener, 3, first=True)
        spec = read_spec(command.stdin)
        assert (spec.index, spec.listen_fd, spec.alive_fd, spec.first) == (3, listener.fileno(), 9, True)
        assert spec.settings == settings
        assert spec.collector_socket == Runtime(tmp_path, 9).collector_socket


def test_without_room_on_the_disk_the_table_lasts_as_long_as_the_server(tmp_path: Path) -> None:
    from proxy.worker import _table

    (tmp_path / "data" / "episodes.tab").mkdir(parents=True)  # cannot be opened as a file
    (tmp_path / "runtime").mkdir()
    with _table(tmp_path / "data", tmp_path / "runtime", alone=False) as table:
        assert table.put_if_absent(b"k" * 16, b"v") == b"v"


def test_importing_the_command_is_quick() -> None:
    code = "import sys, proxy.cli; print(sorted({'uvicorn', 'aiohttp', 'starlette', 'duckdb'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
