"""kill -9 of everything, at any moment, under load: what was acknowledged is in the raw tables, once.

RATCHET_DRILLS says how many times; `make faults` does it 200 times.
"""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from collector.errors import RatchetError
from tests.fake_upstream import FakeUpstream, chat
from tests.faults import processes
from tests.faults.accounts import settle
from tests.faults.traffic import Traffic
from tests.served import Served, served
from tests.unit.collector.days import write_day
from tests.unit.collector.rows import call

DRILLS = int(os.environ.get("RATCHET_DRILLS", "6"))
VICTIMS = ("collector", "worker", "collector", "supervisor", "worker", "all")
WORK = ("compact", "load", "promote")
MOMENTS = {"compact": 0.2, "load": 0.7, "promote": 0.05}  # the longest wait before the kill, in seconds
_START_SECONDS = 60.0


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def lives(data_dir: Path, upstream: str, **environ: str) -> Iterator[Served]:
    """Servers on the same data, one after the other, each until it was killed."""
    while True:
        with served(data_dir, upstream, **environ) as server:
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
    """One kill after the other, with something under way each time: a segment to load, a compaction, a promotion."""

    def __init__(self, data_dir: Path, traffic: Traffic, seed: int = 11) -> None:
        self.data_dir = data_dir
        self.traffic = traffic
        self.old: set[str] = set()  # spans of earlier days
        self.killed = dict.fromkeys(VICTIMS, 0)
        self.during = dict.fromkeys(WORK, 0)  # kills while that was known to be under way (a load: to be due)
        self._random = random.Random(seed)
        self._helpers: list[threading.Thread] = []

    def once(self, server: Served, number: int) -> bool:
        """One kill; whether the server goes on."""
        victim, work = VICTIMS[number % len(VICTIMS)], WORK[(number + number // len(VICTIMS)) % len(WORK)]
        under_way = self._begin(server, work, number)
        time.sleep(self._random.uniform(0.0, MOMENTS[work]))
        children = processes.children(server.process.pid)
        self.during[work] += under_way()
        strike(server, victim)
        self.killed[victim] += 1
        if victim in ("supervisor", "all"):
            self.traffic.url = None
            processes.until(lambda: not any(processes.parent(pid) for pid in children), 20, "the children have ended")
            return False
        processes.until(lambda: ready(server.url), _START_SECONDS, f"the server is ready after drill {number}")
        return True

    def _begin(self, server: Served, work: str, number: int) -> Callable[[], bool]:
        """Start what is to be under way; how to ask whether it still is."""
        if work == "promote":
            return self._help(lambda: self.traffic.promote("s", 1 + number // 3 % 2))  # another one each time
        self._add_day(number, 300 if work == "load" else 40)
        if work == "load":
            return lambda: True
        with contextlib.suppress(RatchetError):
            server.client.flush()  # what is compacted has to be loaded
        return self._help(self.traffic.compact)

    def _add_day(self, number: int, count: int) -> None:
        calls = [call(0, span_id=f"{number:08x}{index:08x}", episode_id=f"old-{number}") for index in range(count)]
        write_day(self.data_dir, 2 + number, *calls)
        self.old |= {one.span_id for one in calls}

    def _help(self, work: Callable[[], object]) -> Callable[[], bool]:
        helper = threading.Thread(target=work)
        self._helpers.append(helper)
        helper.start()
        return helper.is_alive

    def end(self) -> None:
        for helper in self._helpers:
            helper.join(30)


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
                processes.kill_all(server.process)
        finally:
            traffic.stop()
            servers.close()
            drill.end()
    kills = sum(drill.killed.values())
    settle("kill", data_dir, traffic, drill.old, kills=kills, killed=drill.killed, during=drill.during)
