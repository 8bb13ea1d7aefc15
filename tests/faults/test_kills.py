"""kill -9 of everything, at any moment, under load: what was acknowledged is in the raw tables, once.

RATCHET_DRILLS says how many times; `make faults` does it 200 times.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from collector.client import Local
from collector.maintenance import rebuild, verify
from collector.settings import Settings
from tests.fake_upstream import FakeUpstream, chat
from tests.faults import processes
from tests.faults.traffic import Traffic
from tests.served import Served, served
from tests.unit.collector.days import write_day
from tests.unit.collector.rows import call, settings

DRILLS = int(os.environ.get("RATCHET_DRILLS", "6"))
VICTIMS = ("collector", "worker", "collector", "supervisor", "worker", "all")
_START_SECONDS = 60.0


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def lives(data_dir: Path, upstream: str) -> Iterator[Served]:
    """Servers on the same data, one after the other, each until it was killed."""
    while True:
        with served(data_dir, upstream) as server:
            yield server
            server.process.wait(_START_SECONDS)


def strike(server: Served, victim: str) -> None:
    """kill -9."""
    pid = server.process.pid
    doomed = {
        "collector": processes.find(pid, "collector"),
        "worker": processes.find(pid, "proxy.worker"),
        "supervisor": [pid],
        "all": [pid, *processes.children(pid)],
    }[victim]
    for one in doomed:
        try:
            os.kill(one, signal.SIGKILL)
        except ProcessLookupError:
            continue


class Drill:
    """One kill after the other, with something under way each time."""

    def __init__(self, data_dir: Path, traffic: Traffic, seed: int = 11) -> None:
        self.data_dir = data_dir
        self.traffic = traffic
        self.old: set[str] = set()  # spans of earlier days
        self.killed = dict.fromkeys(VICTIMS, 0)
        self._random = random.Random(seed)
        self._helpers: list[threading.Thread] = []

    def once(self, server: Served, number: int) -> bool:
        """One kill; whether the server goes on."""
        victim = VICTIMS[number % len(VICTIMS)]
        if number % 3 == 0:
            self._add_day(number)
            time.sleep(0.4)
            self._help(self.traffic.compact)
        if number % 4 == 2:
            self._help(lambda: self.traffic.promote("s", 1 + number % 2))
        time.sleep(self._random.uniform(0.02, 0.5))
        children = processes.children(server.process.pid)
        strike(server, victim)
        self.killed[victim] += 1
        if victim in ("supervisor", "all"):
            self.traffic.url = None
            processes.until(lambda: not any(processes.parent(pid) for pid in children), 10, "the children have ended")
            return False
        processes.until(lambda: ready(server.url), _START_SECONDS, f"the server is ready after drill {number}")
        return True

    def _add_day(self, number: int) -> None:
        calls = [call(0, span_id=f"{number:08x}{index:08x}", episode_id=f"old-{number}") for index in range(40)]
        write_day(self.data_dir, 2 + number, *calls)
        self.old |= {one.span_id for one in calls}

    def _help(self, work: Any) -> None:
        helper = threading.Thread(target=work)
        helper.start()
        self._helpers.append(helper)

    def end(self) -> None:
        for helper in self._helpers:
            helper.join(30)


def raw(local: Local, sql: str) -> list[Any]:
    return [row[0] for row in local.query(sql, 10_000_000)["rows"]]


def account(data_dir: Path, drill: Drill, traffic: Traffic) -> None:
    """The raw tables against what was acknowledged."""
    config: Settings = settings(data_dir)
    local = Local(data_dir, config)
    tables = {
        "spans": raw(local, "SELECT span_id FROM spans"),
        "payloads": raw(local, "SELECT span_id FROM payloads_v"),
    }
    rewards = raw(local, "SELECT reward_id FROM rewards")
    revisions = raw(local, "SELECT revision FROM deployments")
    report = verify(data_dir / "journal", local)
    local.close()
    acknowledged = traffic.spans | drill.old
    lost = {name: len(acknowledged - set(found)) for name, found in tables.items()}
    doubled = {name: len(found) - len(set(found)) for name, found in tables.items()}
    lost["rewards"], doubled["rewards"] = len(traffic.rewards - set(rewards)), len(rewards) - len(set(rewards))
    lost["revisions"] = len(set(traffic.revisions) - set(revisions))
    doubled["revisions"] = len(revisions) - len(set(revisions))
    print(
        f"\n{sum(drill.killed.values())} kills {drill.killed}: {traffic.sent} calls sent, {len(traffic.spans)} and"
        f" {len(traffic.rewards)} rewards acknowledged, {len(drill.old)} spans of earlier days,"
        f" {len(traffic.revisions)} promotions; lost {lost}, doubled {doubled}"
    )
    assert not any(lost.values()) and not any(doubled.values())
    assert len(tables["spans"]) <= traffic.sent + len(drill.old)
    assert report.ok, report
    first = rebuild(config)
    assert rebuild(config) == first
    assert first["span"][0] == len(tables["spans"])


@pytest.mark.timeout(3600)
def test_kills_under_load_lose_and_double_nothing(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    traffic = Traffic()
    drill = Drill(data_dir, traffic)
    with FakeUpstream(lambda _: chat("Paris")) as upstream:
        traffic.start()
        servers = lives(data_dir, upstream.url)
        try:
            number = 0
            while number < DRILLS:
                server = next(servers)
                if number == 0:
                    for template in ("one", "two"):
                        server.client.add_version("s", template=template)
                traffic.url = server.url
                alive = True
                while alive and number < DRILLS:
                    alive = drill.once(server, number)
                    number += 1
            if alive:
                traffic.url = None
                strike(server, "all")
        finally:
            traffic.stop()
            servers.close()
            drill.end()
    account(data_dir, drill, traffic)
