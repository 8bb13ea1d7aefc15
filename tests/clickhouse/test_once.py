"""Each segment once: loaded again, cut off at any point, or with an insert of a killed collector still under way."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from collector import clickhouse as module
from collector.clickhouse_http import Server as Http
from collector.errors import Unavailable
from collector.journal import Journal
from collector.loader import Loader
from collector.settings import Storage
from collector.stores import open_store
from tests.clickhouse.server import ROOT, Server, fresh
from tests.unit.collector.days import write_day
from tests.unit.collector.rows import call, settings, write
from tests.unit.collector.test_settle import own
from tests.unit.collector.test_store import reward

RAW = ("calls", "observed", "rewards", "versions", "evaluations")


class Place:
    """A journal and a database of its own."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder = folder
        self.database = fresh()
        self.server = server
        (folder / "journal").mkdir(parents=True, exist_ok=True)

    def open(self) -> module.ClickHouse:
        made = open_store(
            self.folder / "ratchet.duckdb",
            self.folder / "journal",
            Storage(url=self.server.url(self.database)),
            {"reward": 1.0},
        )
        assert isinstance(made, module.ClickHouse)
        return made

    def load(self) -> Loader:
        """A collector's life: open, load what waits, close."""
        made = self.open()
        loader = Loader(made, self.folder / "journal")
        loader.load_once()
        made.close()
        return loader

    def counts(self) -> dict[str, int]:
        """Rows in the raw tables, past every view."""
        return {table: int(self.server.ask(self.database, f"SELECT count() FROM {table}")) for table in RAW}


@pytest.fixture
def place(clickhouse: Server, tmp_path: Path) -> Iterator[Place]:
    yield Place(tmp_path / "data", clickhouse)


def everything(first: int = 0) -> list[Any]:
    version = {"slot": "s", "version": first + 1, "kind": "prompt", "hash": "h", "template": "t", "created_ns": 5}
    return [
        *(call(number) for number in range(first, first + 5)),
        reward(first, "span", f"{first:016x}"),
        own(first, None, "invoke_agent"),
        ("version", version),
        ("evaluation", {"evaluation_id": f"e-{first}", "job_id": "j", "ok": True, "ts_ns": 1}),
    ]


ONCE = {"calls": 5, "observed": 1, "rewards": 1, "versions": 1, "evaluations": 1}


def test_a_segment_loaded_twice_is_there_once(place: Place) -> None:
    write(place.folder, *everything())
    place.load()
    assert place.counts() == ONCE
    place.load()
    (place.folder / "ratchet.duckdb").unlink()  # whoever lost the local file asks ClickHouse what it has
    place.load()
    assert place.counts() == ONCE


@pytest.mark.parametrize("cut", range(8))
def test_a_load_cut_off_after_any_statement_is_made_good(
    place: Place, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(place.folder, *everything())
    made = place.open()
    with monkeypatch.context() as patch:
        done, insert, run = [0], Http.insert, Http.run

        def gone(*given: Any, **more: Any) -> Any:
            if done[0] == cut:
                raise Unavailable("cut off")
            done[0] += 1
            return (insert if isinstance(given[2] if len(given) > 2 else None, bytes) else run)(*given, **more)

        patch.setattr(Http, "insert", gone)
        patch.setattr(Http, "run", gone)
        loader = Loader(made, place.folder / "journal")
        assert loader.load_once() == 0
        assert loader.counters.errors == 1
    made.close()
    assert place.load().counters.segments == 1
    assert place.counts() == ONCE


def test_an_insert_of_a_killed_collector_that_lands_late_changes_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(place.folder, *everything())
    sent: list[tuple[Any, ...]] = []
    insert = Http.insert
    with monkeypatch.context() as patch:
        patch.setattr(Http, "insert", lambda *given: (sent.append(given), insert(*given))[1])
        place.load()
    late = Http(place.server.url(place.database))
    for _, statement, rows, token in sent:
        if token is not None:
            late.insert(statement, rows, token)
    late.close()
    assert place.counts() == ONCE


def test_segments_come_in_any_number_and_each_counts_once(place: Place) -> None:
    for number in range(6):
        write(place.folder, *everything(10 * number), role=f"w{number}")
    again = next((place.folder / "journal").glob("*.ndjson"))
    shutil.copy(again, place.folder / "kept")
    place.load()
    shutil.copy(place.folder / "kept", again)
    place.load()
    assert place.counts() == {table: 6 * count for table, count in ONCE.items()}


LOADING = """
import sys
from pathlib import Path
from collector.loader import Loader
from collector.settings import Storage
from collector.stores import open_store

folder = Path(sys.argv[1])
made = open_store(folder / "ratchet.duckdb", folder / "journal", Storage(url=sys.argv[2]), {})
loader = Loader(made, folder / "journal")
print("ready", flush=True)
while True:
    loader.load_once()
"""


def test_loaders_killed_with_9_lose_and_double_nothing(place: Place) -> None:
    count = 0
    for kill in range(4):
        for part in range(5):
            write(place.folder, *(call(count + number) for number in range(20)), role=f"k{kill}{part}")
            count += 20
        argv = [sys.executable, "-c", LOADING, str(place.folder), place.server.url(place.database)]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=ROOT)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 * kill)  # not awaited: where it is hit is the point
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    place.load()
    assert place.counts()["calls"] == count
    unique = place.server.ask(place.database, "SELECT uniqExact(span_id) FROM calls")
    assert int(unique) == count


def test_a_line_that_does_not_fit_is_set_aside_and_the_rest_is_there_once(place: Place) -> None:
    journal = Journal(place.folder / "journal", "w0")
    for number in range(3):
        journal.append("span", call(number))
    journal.append("span", {"span_id": "bad", "episode_id": "ep-a", "start_ns": "not a number"})
    journal.append(*reward(1, "episode", "ep-a"))
    journal.close()
    loader = place.load()
    assert (loader.counters.quarantined, loader.counters.segments) == (1, 1)
    assert (place.counts()["calls"], place.counts()["rewards"]) == (3, 1)


def test_old_days_leave_the_journal_and_then_clickhouse(place: Place) -> None:
    from collector.service import Collector

    version = ("version", {"slot": "s", "version": 1, "kind": "prompt", "hash": "h", "template": "t", "created_ns": 5})
    old = write_day(place.folder, 5, call(1), reward(1, "episode", "ep-a"), version)
    only_calls = write_day(place.folder, 4, call(2))
    write_day(place.folder, 0, call(3))
    store = {"url": place.server.url(place.database)}
    collector = Collector(settings(place.folder, store=store), background=False)
    try:
        report = collector.compact(1)
        assert (report["segments"], report["spans"], report["rewards"]) == (2, 2, 1)
        assert not only_calls.exists()
        assert old.read_bytes().count(b"\n") == 1
        assert collector.compact(1)["segments"] == 0
        assert collector.retain(4, dry_run=True)["spans"] == 1
        assert collector.retain(4)["days"] == report["days"][:1]
        assert collector.query("SELECT span_id FROM spans_v ORDER BY 1").json()["rows"] == [
            [f"{2:016x}"],
            [f"{3:016x}"],
        ]
    finally:
        collector.close()
    (place.folder / "ratchet.duckdb").unlink()
    again = Collector(settings(place.folder, store=store), background=False)
    assert again.versions("s")[0]["template"] == "t"
    assert again.stats()["spans"] == 2
    again.close()
