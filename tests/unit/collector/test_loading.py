import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from collector import loading
from collector.loader import Loader
from collector.loading import Loading
from collector.settings import Storage
from collector.store import Store
from tests.unit.collector.rows import call, write


@pytest.fixture
def idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loading]:
    """It has a loader thread that does nothing by itself."""
    monkeypatch.setattr(loading, "_TICK_SECONDS", 3600.0)
    directory = tmp_path / "journal"
    directory.mkdir()
    store = Store(tmp_path / "ratchet.duckdb", directory, Storage(), {})
    made = Loading(Loader(store, directory), store)
    made.start()
    yield made
    made.stop()
    store.close()


def spans(store: Store) -> int:
    count: int = store.query("SELECT count(*) FROM spans", 1).json()["rows"][0][0]
    return count


def test_what_is_sealed_is_there_for_who_reads(tmp_path: Path, idle: Loading) -> None:
    write(tmp_path, call(1))
    assert spans(idle._store) == 0
    assert spans(idle.fresh()) == 1


def test_readers_don_t_cost_a_batch_each(tmp_path: Path, idle: Loading) -> None:
    write(tmp_path, call(1))
    idle.fresh()
    write(tmp_path, call(2))
    idle.fresh()
    assert idle._loader.counters.segments == 1
    time.sleep(0.6)
    assert spans(idle.fresh()) == 2


def test_a_reader_waits_for_a_batch_only_so_long(
    tmp_path: Path, idle: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()
    monkeypatch.setattr(idle._loader, "load_once", lambda: held.wait(10))
    write(tmp_path, call(1))
    began = time.monotonic()
    assert spans(idle.fresh()) == 0
    assert time.monotonic() - began < 5
    held.set()


def test_readers_are_answered_when_it_stops(idle: Loading) -> None:
    idle.stop()
    began = time.monotonic()
    idle.fresh()
    assert time.monotonic() - began < loading._PATIENCE_SECONDS
