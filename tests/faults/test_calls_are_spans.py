"""N calls = N spans, each in its right episode, exactly once: with everything well, and with processes killed."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from collector.errors import RatchetError
from tests.fake_upstream import FakeUpstream
from tests.faults import load, processes
from tests.faults.load import MIX, Call, Script
from tests.served import Served, served

CALLS = 1000
EPISODES = 50


def mixed(number: int) -> list[Call]:
    return [Call(i, MIX[i % len(MIX)], f"episode-{i % EPISODES}") for i in range(number)]


def recorded(server: Served, expected: int, seconds: float = 60.0) -> list[list[object]]:
    """The spans, once as many as expected can be read, or all there are when that does not come about."""
    deadline = time.monotonic() + seconds
    sql = "SELECT episode_id, input_messages, span_id, status, http_status FROM spans_v"
    while True:
        server.client.flush()
        rows: list[list[object]] = server.client.query(sql, limit=100_000)["rows"]
        if len(rows) >= expected or time.monotonic() > deadline:
            return rows
        time.sleep(0.2)


def label_of(row: Sequence[object]) -> str:
    return str(json.loads(str(row[1]))[-1]["content"])


def assert_each_call_is_one_span(rows: list[list[object]], calls: list[Call]) -> None:
    assert len(rows) == len(calls)
    assert Counter((row[0], label_of(row)) for row in rows) == Counter((call.episode, call.label) for call in calls)
    spans = {str(row[2]) for row in rows}
    assert len(spans) == len(calls)
    assert {call.span for call in calls if call.span} <= spans


def test_a_thousand_mixed_calls_are_a_thousand_spans(tmp_path: Path) -> None:
    calls, script = mixed(CALLS), Script()
    with FakeUpstream(script) as upstream, served(tmp_path / "data", upstream.url) as server:
        begun = time.monotonic()
        asyncio.run(load.run(server.url, calls, script))
        print(f"\n{CALLS} mixed calls in {time.monotonic() - begun:.1f} s")
        rows = recorded(server, CALLS)
        assert_each_call_is_one_span(rows, calls)
        assert {call.status for call in calls if call.kind == "json"} == {200}
        assert {call.status for call in calls if call.kind == "refused"} == {429}
        assert {call.status for call in calls if call.kind == "broken"} == {500}
        assert {call.status for call in calls if call.kind == "reset"} == {502}
        assert {load.answer(call) for call in calls if call.kind in ("json", "sse")} == {"Paris"}
        ends = Counter((label_of(row).partition(":")[2], row[3]) for row in rows)
        assert set(ends) == {
            *((kind, "ok") for kind in ("json", "sse")),
            *((kind, "error") for kind in ("refused", "broken", "reset", "cut")),
            *((kind, "cancelled") for kind in ("leave", "leave-stream")),
        }


def test_killing_the_collector_loses_and_doubles_nothing(tmp_path: Path) -> None:
    calls, script = mixed(CALLS), Script()
    with FakeUpstream(script) as upstream, served(tmp_path / "data", upstream.url) as server:

        def kill(done: int) -> None:
            if done in (CALLS // 4, CALLS // 2, 3 * CALLS // 4):
                for pid in processes.find(server.process.pid, "collector"):
                    os.kill(pid, signal.SIGKILL)

        asyncio.run(load.run(server.url, calls, script, on_done=kill))
        processes.until(lambda: answers(server), 60, "the collector is back")
        assert_each_call_is_one_span(recorded(server, CALLS), calls)
        assert {call.status for call in calls if call.kind in ("json", "sse")} == {200}


def answers(server: Served) -> bool:
    try:
        server.client.stats()
    except RatchetError:
        return False
    return True


@pytest.mark.parametrize("workers", [1, 2])
def test_killing_a_worker_loses_no_acknowledged_call(tmp_path: Path, workers: int) -> None:
    number = 400
    calls, script = mixed(number), Script()
    with (
        FakeUpstream(script) as upstream,
        served(tmp_path / "data", upstream.url, "--workers", str(workers)) as server,
    ):

        def kill(done: int) -> None:
            if done in (number // 3, 2 * number // 3):
                os.kill(processes.find(server.process.pid, "proxy.worker")[0], signal.SIGKILL)

        asyncio.run(load.run(server.url, calls, script, on_done=kill))
        acknowledged = {(call.episode, call.label) for call in calls if call.whole}
        rows = recorded(server, len(acknowledged), 5)
        seen = Counter((row[0], label_of(row)) for row in rows)
        cut_off = sum(not call.whole for call in calls if call.kind in ("json", "sse"))
        print(f"\n{len(acknowledged)} acknowledged, {len(rows)} recorded, {cut_off} cut off by two kills")
        assert not acknowledged - set(seen)
        assert set(seen) <= {(call.episode, call.label) for call in calls}
        assert max(seen.values()) == 1
        assert cut_off <= 2 * 16
