"""Starting, ending, dying: what happens to the others when one process goes."""

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from collector.errors import RatchetError
from tests.fake_upstream import FakeUpstream
from tests.faults import load, processes
from tests.faults.load import Call, Script
from tests.patience import within
from tests.served import RATCHET, Served, run_ratchet, served

START = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One for the drills after which it is as before."""
    data = tmp_path_factory.mktemp("shared") / "data"
    with FakeUpstream(Script()) as upstream, served(data, upstream.url) as running:
        yield running


def ask(server: Served, label: str = "call-0:json", **more: Any) -> httpx.Response:
    body = {"model": "fake-model", "messages": [{"role": "user", "content": label}], **more}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)


def ready(server: Served) -> bool:
    return httpx.get(f"{server.url}/readyz").status_code == 200


def count(server: Served, table: str) -> int:
    server.client.flush()
    return int(server.client.query(f"SELECT count(*) FROM {table}")["rows"][0][0])


def test_the_supervisors_death_ends_its_children_within_a_second(tmp_path: Path) -> None:
    with FakeUpstream(Script()) as upstream:
        slow = Call(0, "slow", "running-when-it-died")
        with served(tmp_path / "data", upstream.url, "--workers", "2") as server:
            children = processes.children(server.process.pid)
            sockets = [argument for pid in children for argument in processes.arguments(pid) if "ratchet-" in argument]
            assert len(children) == 3
            client = threading.Thread(target=lambda: asyncio.run(load.run(server.url, [slow], Script(), 1)))
            client.start()
            processes.until(lambda: upstream.requests, 30, "the call is running")
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
            took = processes.until(lambda: not any(processes.parent(pid) for pid in children), 30, "all have ended")
            client.join()
            print(f"\nsupervisor killed -9: its children were gone after {took:.2f} s")
            assert took < within(1.0)
            assert sockets and not os.path.exists(os.path.dirname(sockets[0]))
        with served(tmp_path / "data", upstream.url) as server:
            rows = server.client.query("SELECT episode_id, status FROM spans_v")["rows"]
            assert rows == [["running-when-it-died", "cancelled"]]


def test_sigterm_lets_running_streams_end_and_refuses_new_calls(tmp_path: Path) -> None:
    calls = [Call(i, "slow", f"stream-{i}") for i in range(8)]
    with FakeUpstream(Script()) as upstream:
        with served(tmp_path / "data", upstream.url) as server:
            client = threading.Thread(target=lambda: asyncio.run(load.run(server.url, calls, Script(), 8)))
            client.start()
            processes.until(lambda: len(upstream.requests) == 8, 30, "all streams are running")
            server.process.send_signal(signal.SIGTERM)
            processes.until(lambda: refused(server), 30, "new connections are refused")
            client.join()
            assert server.process.wait(timeout=30) == 0
        assert [load.answer(call) for call in calls] == ["abcdefghij"] * 8
        assert all(call.whole for call in calls)
        assert not list((tmp_path / "data" / "journal").glob("*.open"))
        assert not (tmp_path / "data" / "ratchet.duckdb.wal").exists()
        assert not (tmp_path / "data" / "server.json").exists()
        with served(tmp_path / "data", upstream.url) as server:
            assert count(server, "spans_v WHERE status = 'ok'") == 8


def refused(server: Served) -> bool:
    try:
        httpx.get(f"{server.url}/healthz", timeout=1)
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        return False
    return False


def test_ctrl_c_ends_the_server_in_order_and_twice_at_once(tmp_path: Path) -> None:
    with FakeUpstream(Script()) as upstream:
        with served(tmp_path / "data", upstream.url) as server:
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(timeout=30) == 0
        with served(tmp_path / "data", upstream.url) as server:
            call = Call(0, "leave-stream", "hangs")
            thread = threading.Thread(target=lambda: ask_and_hang(server), daemon=True)
            thread.start()
            processes.until(lambda: upstream.requests, 30, f"{call.kind} is running")
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            assert server.process.poll() is None
            begun = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(timeout=30) == 130
            assert time.monotonic() - begun < within(2)
            thread.join(10)


def ask_and_hang(server: Served) -> None:
    try:
        ask(server, "call-0:leave-stream", stream=True)
    except httpx.TransportError:
        return


def test_rewards_acknowledged_while_the_collector_is_dead_are_there_later_once(server: Served) -> None:
    os.kill(processes.find(server.process.pid, "collector")[0], signal.SIGKILL)
    refusal = httpx.get(f"{server.url}/api/stats")
    assert refusal.status_code == 503
    assert "the collector is not running" in refusal.json()["error"]["message"]
    answers = []
    for number in range(20):
        reward = {"episode_id": f"e-{number}", "value": 1.0, "idempotency_key": f"key-{number}"}
        answers += [httpx.post(f"{server.url}/reward", json=reward) for _ in range(2)]
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["reward_id"] for answer in answers}) == 20
    processes.until(lambda: ready(server), 60, "the collector is back")
    assert count(server, "rewards_v") == 20
    assert b'ratchet_restarts_total{process="collector"} 1.0' in httpx.get(f"{server.url}/metrics").content


def test_calls_are_served_while_the_collector_hangs(server: Served) -> None:
    before = count(server, "spans_v")
    collector = processes.find(server.process.pid, "collector")[0]
    os.kill(collector, signal.SIGSTOP)
    try:
        slowest = 0.0
        for number in range(100):
            begun = time.monotonic()
            assert ask(server, f"call-{number}:json").status_code == 200
            slowest = max(slowest, time.monotonic() - begun)
        print(f"\ncollector stopped: 100 calls answered, the slowest in {slowest * 1000:.0f} ms")
        assert slowest < within(1.0)
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        assert not ready(server)
        # A worker that starts now has nobody to ask: it serves what the cache says.
        victim = processes.find(server.process.pid, "proxy.worker")[0]
        os.kill(victim, signal.SIGKILL)
        assert ask(server).status_code == 200
        assert processes.find(server.process.pid, "proxy.worker") != [victim]
    finally:
        os.kill(collector, signal.SIGCONT)
    processes.until(lambda: ready(server), 60, "the collector answers again")
    assert count(server, "spans_v") == before + 101


def test_a_second_server_on_the_same_data_is_refused_clearly(server: Served) -> None:
    second = run_ratchet("serve", "--port", "0", "--data-dir", str(server.data_dir))
    assert second.returncode == 1
    assert f"pid {server.process.pid}, {server.url}" in second.stderr
    assert "--data-dir" in second.stderr
    assert ask(server).status_code == 200


def test_a_taken_port_is_refused_clearly(server: Served, tmp_path: Path) -> None:
    port = server.url.rsplit(":")[-1]
    second = run_ratchet("serve", "--port", port, "--data-dir", str(tmp_path / "other"))
    assert second.returncode == 1
    assert f"port {port}" in second.stderr and "--port" in second.stderr


def test_a_collector_that_cannot_start_says_why(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "journal").write_text("this is no directory")
    failed = subprocess.run(
        [*RATCHET, "serve", "--port", "0", "--data-dir", str(data)], capture_output=True, text=True, timeout=START
    )
    assert failed.returncode == 1
    assert "did not start" in failed.stderr
    assert "journal" in failed.stderr


def test_bad_settings_are_bad_input() -> None:
    assert run_ratchet("serve", "--upstream", "ftp://nowhere").returncode == 2
    assert run_ratchet("serve", "--host", "0.0.0.0").returncode == 2


def test_no_child_shows_the_settings_on_its_command_line(tmp_path: Path) -> None:
    secret = "a-key-that-ps-must-not-show"
    config = tmp_path / "config.yaml"
    config.write_text(f"server: {{keys: [{{name: me, key: {secret}, scopes: [agent, admin]}}]}}\n")
    with FakeUpstream(Script()) as upstream, served(tmp_path / "data", upstream.url, config=config) as server:
        lines = [" ".join(processes.arguments(pid)) for pid in processes.children(server.process.pid)]
        assert len(lines) == 2
        assert not any(secret in line for line in lines)
        assert httpx.get(f"{server.url}/api/stats").status_code == 401
        allowed = httpx.get(f"{server.url}/api/stats", headers={"authorization": f"Bearer {secret}"})
        assert allowed.status_code == 200


def test_the_log_of_a_quiet_run_is_quiet(tmp_path: Path) -> None:
    with FakeUpstream(Script()) as upstream, served(tmp_path / "data", upstream.url) as server:
        ask(server)
        with pytest.raises(RatchetError):
            server.client.version("no-such-slot", 1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=30) == 0
    printed = server.log.read_text()
    assert f"OPENAI_BASE_URL  {server.url}/v1" in printed
    assert str(tmp_path / "data") in printed and upstream.url in printed
    assert "Traceback" not in printed
    assert "leaked" not in printed
