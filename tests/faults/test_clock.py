"""The wall clock of every process jumps, under load, over days and years, both ways, and servers die meanwhile.

RATCHET_JUMPS says how many times; `make faults` does them all.
"""

import functools
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fake_upstream import FakeUpstream, chat
from tests.faults import processes
from tests.faults.accounts import settle
from tests.faults.test_kills import lives, ready, strike
from tests.faults.traffic import Traffic
from tests.served import Served

HOUR = 3_600 * 10**9
DAY = 24 * HOUR
# How far the clock is off, one after the other; what is killed there, if anything.
JUMPS = (
    (2 * DAY, None),
    (-3 * DAY, "all"),
    (400 * DAY, None),
    (-HOUR, "worker"),
    (-4000 * DAY, "collector"),
    (DAY, "all"),
    (0, None),
)[: int(os.environ.get("RATCHET_JUMPS", "3"))]
CALLS = 12  # answered between two jumps
MODULE = str(Path(__file__).parent / "clock")


class Clock:
    """The clock of the servers that are started with `environment`."""

    def __init__(self, file: Path) -> None:
        file.write_bytes(bytes(8))
        path = os.pathsep.join(filter(None, (MODULE, os.environ.get("PYTHONPATH"))))
        self.environment = {"TEST_CLOCK": str(file), "PYTHONPATH": path}
        with file.open("r+b") as opened:
            self._offset = mmap.mmap(opened.fileno(), 8)

    def jump(self, offset: int) -> None:
        """From now on it is wrong by so many nanoseconds."""
        struct.pack_into("<q", self._offset, 0, offset)

    def close(self) -> None:
        self._offset.close()


@contextmanager
def clock(file: Path) -> Iterator[Clock]:
    made = Clock(file)
    try:
        yield made
    finally:
        made.close()


def go_on(server: Served, traffic: Traffic) -> None:
    """Some more calls are answered, old days are archived, a version is promoted; and all that can be read."""
    enough = len(traffic.spans) + CALLS
    processes.until(lambda: len(traffic.spans) >= enough, 60, "calls are answered after the jump")
    traffic.promote("s", 1 + len(traffic.revisions) % 2)
    traffic.compact()
    known = set(traffic.spans)
    read = "SELECT span_id FROM spans"

    def readable() -> bool:
        server.client.flush()
        return known <= {row[0] for row in server.client.query(read, 1_000_000)["rows"]}

    processes.until(readable, 30, "what was answered can be read")


@pytest.mark.timeout(600)
def test_a_clock_that_jumps_under_load_loses_and_doubles_nothing(tmp_path: Path) -> None:
    data_dir, traffic, kills = tmp_path / "data", Traffic(), 0
    with FakeUpstream(lambda _: chat("Paris")) as upstream, clock(tmp_path / "clock") as moved:
        servers = lives(data_dir, upstream.url, **moved.environment)
        traffic.start(2)
        try:
            server = next(servers)
            for template in ("one", "two"):
                server.client.add_version("s", template=template)
            for offset, victim in JUMPS:
                traffic.url = server.url
                moved.jump(offset)
                go_on(server, traffic)
                kills += victim is not None
                if victim == "all":
                    traffic.url = None
                    processes.kill_all(server.process)
                    server = next(servers)
                elif victim is not None:
                    strike(server, victim)
                processes.until(functools.partial(ready, server.url), 60, "the server is ready")
            archived = {path.name for path in (data_dir / "archive").glob("[0-9]*")}
            assert len(archived) >= 2, "days were archived while the clock was ahead"
            traffic.url = None
            processes.kill_all(server.process)
        finally:
            traffic.stop()
            servers.close()
    settle("clock", data_dir, traffic, (), kills=kills + 1, jumps=len(JUMPS), archived=len(archived))
