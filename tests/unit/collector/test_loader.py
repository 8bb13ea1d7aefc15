import dataclasses
import errno
import os
import time
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector import loader as loader_module
from collector.journal import Journal, encode
from collector.loader import Loader, kind, sift, summary
from collector.settings import Storage
from collector.store import Store
from tests.unit.collector.rows import call, write


class World:
    """A store, its journal and a loader."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.directory = data_dir / "journal"
        self.directory.mkdir(exist_ok=True)
        self.store = Store(data_dir / "ratchet.duckdb", self.directory, Storage(), {"reward": 1.0})
        self.loader = Loader(self.store, self.directory)

    def rows(self, sql: str) -> list[list[Any]]:
        found: list[list[Any]] = self.store.query(sql, 10_000).json()["rows"]
        return found

    def restart(self) -> None:
        self.store.close()
        self.__init__(self.data_dir)  # type: ignore[misc]


@pytest.fixture
def world(tmp_path: Path) -> Any:
    made = World(tmp_path)
    yield made
    made.store.close()


def test_every_kind_of_event_arrives_in_its_table(world: World) -> None:
    write(
        world.data_dir,
        call(1),
        ("reward", {"reward_id": "rw-1", "target_kind": "episode", "target_id": "ep-a", "value": 1, "ts_ns": 1}),
        ("version", {"slot": "s", "version": 1, "kind": "prompt", "hash": "h", "match": {"role": "system"}}),
        ("candidate", {"slot": "s", "candidate": "c-1", "template": "t", "ts_ns": 1}),
        ("deployment", {"revision": 1, "slot": "s", "action": "initial", "arms": {"1": 1.0}, "ts_ns": 1}),
        ("evaluation", {"evaluation_id": "ev", "slot": "s", "ok": True, "reward": None, "ts_ns": 1}),
        ("job", {"job_id": "j", "kind": "apo", "status": "running", "spec": "{}", "ts_ns": 1}),
        ("key", {"key_id": "key-1", "action": "create", "name": "bot", "scopes": ["agent"], "limits": {}, "ts_ns": 1}),
        ("something-later", {"a": 1}),
    )
    assert world.loader.load_once() == 9
    assert {name: count for name, (count, _) in world.store.content().items()} == {
        "span": 1,
        "echo": 0,
        "payload": 1,
        "reward": 1,
        "version": 1,
        "candidate": 1,
        "deployment": 1,
        "evaluation": 1,
        "job": 1,
        "key": 1,
    }
    assert world.rows("SELECT arms FROM deployments") == [['{"1":1.0}']]
    assert world.rows("SELECT match FROM versions") == [['{"role":"system"}']]


def test_a_segment_is_loaded_once_also_after_a_restart(world: World) -> None:
    write(world.data_dir, *(call(number) for number in range(50)))
    assert world.loader.load_once() == 50
    assert world.loader.load_once() == 0
    world.restart()
    assert world.loader.load_once() == 0
    assert world.rows("SELECT count(*), count(DISTINCT span_id) FROM spans_v") == [[50, 50]]


def test_open_segments_are_left_alone_until_they_are_sealed(world: World) -> None:
    writer = Journal(world.directory, "w0", seal_seconds=60)
    writer.append("span", call(1))
    assert world.loader.adopt() == 0
    assert world.loader.load_once() == 0
    writer.close()
    assert world.loader.load_once() == 1


def test_orphans_are_adopted_and_loaded(world: World) -> None:
    (world.directory / "1-w0-1-aa.open").write_bytes(encode("span", call(1)) + encode("span", call(2))[:-9])
    assert world.loader.adopt() == 1
    assert world.loader.load_once() == 1
    assert world.loader.counters.adopted == 1


def test_broken_lines_go_to_quarantine_and_the_rest_is_loaded(world: World) -> None:
    good = [encode("span", call(number)) for number in range(4)]
    bad = good[2].replace(b"question", b"quastion")
    path = world.directory / "1-w0-1-aa.ndjson"
    path.write_bytes(good[0] + bad + b"garbage\n" + good[1] + b"   \n" + good[3])
    assert world.loader.load_once() == 3
    assert world.loader.counters.quarantined == 2
    assert (world.directory / "quarantine" / "1-w0-1-aa.bad").read_bytes() == bad + b"garbage\n"
    assert [file.name for file in (world.directory / "quarantine").iterdir()] == ["1-w0-1-aa.bad"]
    assert path.read_bytes().startswith(good[0] + bad), "the journal itself is never rewritten"
    assert world.rows("SELECT lines, quarantined FROM _segments") == [[3, 2]]


def test_lines_that_the_schema_refuses_are_found_and_set_aside(world: World) -> None:
    good = [encode("span", call(number)) for number in range(20)]
    refused = encode("span", {"span_id": "x", "start_ns": "soon"})
    broken = b"torn\n"
    (world.directory / "1-w0-1-aa.ndjson").write_bytes(
        b"".join(good[:7]) + refused + b"".join(good[7:15]) + broken + refused + b"".join(good[15:])
    )
    write(world.data_dir, call(99))
    assert world.loader.load_once() == 21
    assert world.loader.counters.quarantined == 3
    kept = (world.directory / "quarantine" / "1-w0-1-aa.bad").read_bytes()
    assert kept == broken + refused + refused
    assert world.rows("SELECT count(*) FROM spans") == [[21]]


def test_an_empty_or_wholly_broken_segment_is_done_with(world: World) -> None:
    (world.directory / "1.ndjson").write_bytes(b"")
    (world.directory / "2.ndjson").write_bytes(b"nothing good\n")
    assert world.loader.load_once() == 0
    assert world.store.loaded() == {"1", "2"}


def test_lines_larger_than_the_engines_buffer_are_loaded(world: World) -> None:
    write(world.data_dir, call(1, input_messages="x" * (40 << 20)), call(2))
    assert world.loader.load_once() == 2
    assert world.rows("SELECT max(length(input_messages)) FROM payloads_v") == [[40 << 20]]


def test_repeated_rewards_are_dropped_within_and_across_segments(world: World) -> None:
    def reward(value: float, ts_ns: int) -> tuple[str, dict[str, Any]]:
        body = {"reward_id": "rw-k", "target_kind": "episode", "target_id": "e", "value": value, "ts_ns": ts_ns}
        return "reward", body

    write(world.data_dir, reward(1.0, 5), reward(2.0, 6))
    world.loader.load_once()
    write(world.data_dir, reward(3.0, 1))
    world.loader.load_once()
    assert world.rows("SELECT value FROM rewards") == [[1.0]]


def test_a_failure_is_counted_and_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    write(world.data_dir, call(1))

    def broken(*_: Any) -> None:
        raise duckdb.IOException("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "load", broken)
        assert world.loader.load_once() == 0
        assert world.loader.load_once() == 0
    assert world.loader.counters.errors == 2
    assert "No space left" in (world.loader.counters.last_error or "")
    assert world.loader.load_once() == 1
    assert world.loader.counters.lag_s == 0.0


def test_a_segment_that_cannot_be_read_is_left_aside_and_the_rest_is_loaded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    (world.directory / "1-w0-1-aa.ndjson").mkdir()
    write(world.data_dir, call(1), call(2))
    assert world.loader.load_once() == 2
    assert world.loader.counters.unreadable == 1
    assert "directory" in (world.loader.counters.last_error or "")
    (world.directory / "1-w0-1-aa.ndjson").rmdir()
    (world.directory / "1-w0-1-aa.ndjson").write_bytes(encode("span", call(3)))
    assert world.loader.load_once() == 0, "not tried again at once"
    monkeypatch.setattr(world.loader, "_unreadable", {"1-w0-1-aa": 0.0})
    assert world.loader.load_once() == 1
    assert world.loader.counters.unreadable == 0


def test_a_process_without_descriptors_blames_no_segment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    write(world.data_dir, call(1))

    def exhausted(*_: Any) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", exhausted)
        assert world.loader.load_once() == 0
    assert (world.loader.counters.unreadable, world.loader.counters.errors) == (0, 1)
    assert world.loader.load_once() == 1


def at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """The loader's clock jumps ahead."""
    real = time.monotonic
    monkeypatch.setattr(loader_module.time, "monotonic", lambda: real() + seconds)


def test_a_batch_is_due_by_size_or_by_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "_LISTING_SHARE", 0)  # each look is at the directory as it is
    assert not world.loader.due()
    write(world.data_dir, call(1))
    assert not world.loader.due(), "nobody waits for it"
    at(monkeypatch, 5.1)
    assert world.loader.due()
    world.loader.load_once()
    assert not world.loader.due()
    write(world.data_dir, call(2))
    assert not world.loader.due()
    for number in range(3, 7):
        write(world.data_dir, call(number, tools="x" * (4 << 20)))
    assert world.loader.due()


def test_a_batch_is_due_when_somebody_asks_but_not_at_each_question(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not world.loader.due(asked=True)
    write(world.data_dir, call(1))
    assert world.loader.due(asked=True)
    world.loader.load_once()
    write(world.data_dir, call(2))
    assert not world.loader.due(asked=True)
    at(monkeypatch, 0.6)
    assert world.loader.due(asked=True)


def test_only_what_stays_open_is_looked_at_for_adoption(world: World) -> None:
    (world.directory / "1-w0-1-aa.open").write_bytes(encode("span", call(1)))
    assert world.loader.adopt_left() == 0, "its writer may live"
    assert world.loader.adopt_left() == 1
    assert world.loader.load_once() == 1


def test_a_directory_that_takes_long_to_list_is_listed_seldom(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    write(world.data_dir, call(1))
    assert not world.loader.due()
    world.loader._listing = dataclasses.replace(world.loader._listing, took=0.2)
    write(world.data_dir, call(2, tools="x" * (17 << 20)))
    assert not world.loader.due()
    assert world.loader.load_once() == 2, "what is loaded is what is there"
    write(world.data_dir, call(3, tools="x" * (17 << 20)))
    at(monkeypatch, 10.1)
    assert world.loader.due()


@given(
    st.lists(
        st.sampled_from(
            [
                encode("span", call(1)),
                encode("reward", {"a": 1}),
                encode("job", {}),
                encode("something-later", {}),
                encode("span", call(2))[:-30] + b"\n",
                encode("span", call(3)).replace(b"question", b"quastion"),
                b"   \n",
                b"\n",
                b"torn",
                b"{}\n",
                b'{"event":"span","crc":"00000000"}\n',
            ]
        )
    )
)
def test_a_segment_summed_up_is_the_segment_sifted(pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    good, bad = sift(data)
    found = summary(data)
    if found is not None:
        assert bad == []
        assert found == (len(good), max(map(len, good), default=0), frozenset(map(kind, good)))
    known = all(piece.startswith(b'{"event":"') and b"something" not in piece for piece in pieces)
    assert (found is not None) == (not bad and known)


@pytest.mark.parametrize("years", [-20, 20])
def test_a_clock_that_jumps_loads_everything_once(world: World, monkeypatch: pytest.MonkeyPatch, years: int) -> None:
    real = loader_module.time.time_ns
    write(world.data_dir, call(1))
    monkeypatch.setattr("time.time_ns", lambda: real() + years * 365 * 86_400 * 1_000_000_000)
    write(world.data_dir, call(2))
    assert world.loader.load_once() == 2
    monkeypatch.undo()
    write(world.data_dir, call(3))
    assert world.loader.load_once() == 1
    assert world.rows("SELECT count(*), count(DISTINCT span_id) FROM spans") == [[3, 3]]
    assert world.loader.counters.lag_s == 0.0


def test_a_fatal_error_of_the_engine_opens_the_store_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    write(world.data_dir, call(1))

    def fatal(*_: Any) -> None:
        raise duckdb.FatalException("database has been invalidated")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "load", fatal)
        assert world.loader.load_once() == 0
    assert world.loader.load_once() == 1
    assert world.rows("SELECT count(*) FROM spans") == [[1]]


def test_an_unchanged_directory_is_not_listed_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    write(world.data_dir, call(1))
    old = os.stat(world.directory).st_mtime_ns - 10_000_000_000
    os.utime(world.directory, ns=(old, old))
    world.loader.load_once()

    def forbidden(*_: Any) -> list[str]:
        raise AssertionError("listed again")

    with monkeypatch.context() as patch:
        patch.setattr(loader_module.os, "listdir", forbidden)
        assert world.loader.load_once() == 0
    write(world.data_dir, call(2))
    assert world.loader.load_once() == 1


def test_lag_is_the_age_of_what_waits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    write(world.data_dir, call(1))
    (path,) = world.directory.glob("*.ndjson")
    os.utime(path, (path.stat().st_mtime - 100, path.stat().st_mtime - 100))

    def busy(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "load", busy)
        world.loader.load_once()
    assert world.loader.counters.lag_s >= 100


def test_lines_are_sifted_by_their_checksum() -> None:
    good = encode("span", call(1))
    assert sift(good + b"\n   \n" + good[:-3] + b"\n") == ([good[:-1]], [good[:-3]])
    assert kind(good) == "span"
    forged = b'{"not_event":"x"'
    assert sift(forged + b',"crc":"%08x"}\n' % loader_module.crc32(forged))[0] == []
