"""The supervisor's parts, with small stand-ins for the collector and the workers."""

import asyncio
import fcntl
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest

from collector.errors import BadInput, Conflict, Unavailable
from collector.settings import Key, Server, Settings, Storage
from proxy import supervisor
from proxy.child import Command
from proxy.supervisor import Runtime, Supervisor, claim, listen, url_of

COLLECTOR = """
import os, socket, sys, threading, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
os.read(int(sys.argv[2]), 1)
"""
WORKER = """
import os, sys
sys.stdin.read()
print("ready", flush=True)
os.read(int(sys.argv[1]), 1)
"""


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    def collector(settings: Settings, shared: Runtime) -> Command:
        argv = [sys.executable, "-c", COLLECTOR, str(shared.collector_socket), str(shared.alive_fd)]
        return Command(argv, fds=(shared.alive_fd,))

    def worker(settings: Settings, shared: Runtime, *_: object, **__: object) -> Command:
        return Command([sys.executable, "-c", WORKER, str(shared.alive_fd)], b"{}", fds=(shared.alive_fd,))

    monkeypatch.setattr(supervisor, "collector_command", collector)
    monkeypatch.setattr(supervisor, "worker_command", worker)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with listen("127.0.0.1", 0) as bound:
        yield bound


def settings_in(directory: Path, workers: int = 2) -> Settings:
    return Settings(server=Server(port=0, workers=workers), store=Storage(data_dir=directory))


async def supervised(settings: Settings, listener: socket.socket, act: Callable[[Supervisor, Runtime], object]) -> int:
    with supervisor.runtime() as shared:
        server = Supervisor(settings, listener, shared)
        return await server.run(lambda url: act(server, shared))  # type: ignore[arg-type,return-value]


def test_a_taken_port_is_a_clear_refusal(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(Conflict, match=rf"port {port}: address already in use; .*--port"):
        listen("127.0.0.1", port)


def test_a_host_that_is_none_is_bad_input() -> None:
    with pytest.raises(BadInput, match=r"server\.host"):
        listen("no such host!", 0)


def test_the_listener_is_reusable_at_once_and_has_a_real_port(listener: socket.socket) -> None:
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    assert url_of(listener, "127.0.0.1") == f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert url_of(listener, "0.0.0.0").startswith("http://127.0.0.1:")
    assert url_of(listener, "::1").startswith("http://[::1]:")


def test_the_data_directory_is_private(tmp_path: Path) -> None:
    claim(tmp_path / "deep" / "data")
    assert stat.S_IMODE((tmp_path / "deep" / "data").stat().st_mode) == 0o700


def test_a_held_data_directory_is_refused_and_the_holder_named(tmp_path: Path) -> None:
    (tmp_path / "server.json").write_bytes(orjson.dumps({"url": "http://127.0.0.1:4000", "pid": 4242, "started_ns": 1}))
    with open(tmp_path / "collector.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Conflict, match=r"pid 4242, http://127\.0\.0\.1:4000.*--data-dir"):
            claim(tmp_path, patience=0.1)
    claim(tmp_path, patience=0.1)


def test_a_data_directory_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="--data-dir"):
        claim(tmp_path / "file" / "data")


def test_the_runtime_directory_is_private_short_and_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with supervisor.runtime() as shared:
        assert stat.S_IMODE(shared.directory.stat().st_mode) == 0o700
        assert len(str(shared.collector_socket)) <= supervisor.SOCKET_PATH_LIMIT
        (shared.directory / "left over").write_text("x")
    assert not shared.directory.exists()


def test_no_key_is_on_a_command_line(listener: socket.socket, tmp_path: Path) -> None:
    secret = "sk-a-very-secret-key"
    settings = Settings(server=Server(keys=(Key(name="agent", key=secret),)), store=Storage(data_dir=tmp_path))
    shared = Runtime(tmp_path, 7)
    collector = supervisor.collector_command(settings, shared)
    worker = supervisor.worker_command(settings, shared, listener, 0, first=True)
    assert secret not in " ".join([*collector.argv, *worker.argv])
    assert secret.encode() in worker.stdin
    assert Settings.model_validate(orjson.loads(worker.stdin)["settings"]) == settings


def test_the_collector_can_read_its_settings_whatever_is_configured(tmp_path: Path) -> None:
    entries = [{"model_name": name, "litellm_params": {"model": f"openai/{name}"}} for name in ("fast", "big")]
    given = {"model_list": entries, "upstream": {"fallbacks": {"fast": ["big"]}}, "store": {"data_dir": str(tmp_path)}}
    command = supervisor.collector_command(Settings.model_validate(given), Runtime(tmp_path, 0))
    assert Settings.model_validate_json(command.stdin).store.data_dir == tmp_path


def test_it_tells_when_it_is_ready_and_cleans_up(stand_ins: None, listener: socket.socket, tmp_path: Path) -> None:
    seen: list[dict[str, object]] = []

    def act(server: Supervisor, shared: Runtime) -> None:
        seen.append(orjson.loads((tmp_path / "server.json").read_bytes()))
        seen.append(orjson.loads(shared.state.read_bytes()))
        os.kill(os.getpid(), signal.SIGTERM)

    assert asyncio.run(supervised(settings_in(tmp_path), listener, act)) == 0
    assert seen[0]["pid"] == os.getpid()
    assert seen[0]["url"] == f"http://127.0.0.1:{seen[0]['url'].rsplit(':')[-1]}"  # type: ignore[attr-defined]
    assert seen[1] == {"restarts": {"collector": 0, "worker0": 0, "worker1": 0}}
    assert not (tmp_path / "server.json").exists()


def test_a_worker_that_dies_is_restarted_and_counted(stand_ins: None, listener: socket.socket, tmp_path: Path) -> None:
    counted: list[object] = []

    def act(server: Supervisor, shared: Runtime) -> None:
        victim = server._workers[0]
        first = victim.pid
        victim.signal(signal.SIGKILL)

        async def watch() -> None:
            deadline = time.monotonic() + 10
            while victim.pid in (None, first) and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            counted.append(orjson.loads(shared.state.read_bytes())["restarts"]["worker0"])
            server.ask()

        server._watching = asyncio.ensure_future(watch())  # type: ignore[attr-defined]

    assert asyncio.run(supervised(settings_in(tmp_path, workers=1), listener, act)) == 0
    assert counted == [1]


def test_a_worker_that_cannot_start_ends_the_server_with_its_reason(
    stand_ins: None, monkeypatch: pytest.MonkeyPatch, listener: socket.socket, tmp_path: Path
) -> None:
    code = "import sys; sys.exit('the cache is unreadable')"
    monkeypatch.setattr(supervisor, "worker_command", lambda *_, **__: Command([sys.executable, "-c", code]))
    with pytest.raises(Unavailable, match=r"worker0 did not start.*\nthe cache is unreadable"):
        asyncio.run(supervised(settings_in(tmp_path, workers=1), listener, lambda *_: None))


def test_asked_twice_it_ends_at_once(
    stand_ins: None, monkeypatch: pytest.MonkeyPatch, listener: socket.socket, tmp_path: Path
) -> None:
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    monkeypatch.setattr(supervisor, "worker_command", lambda *_, **__: Command([sys.executable, "-c", stubborn]))

    def act(server: Supervisor, shared: Runtime) -> None:
        server.ask()
        asyncio.get_running_loop().call_later(0.1, server.ask)

    begun = time.monotonic()
    assert asyncio.run(supervised(settings_in(tmp_path, workers=1), listener, act)) == 130
    assert time.monotonic() - begun < 10
