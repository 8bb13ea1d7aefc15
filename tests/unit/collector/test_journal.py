import asyncio
import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector import journal
from collector.errors import Unavailable
from collector.journal import Journal, adopt, decode, encode
from tests.unit.collector.rows import call

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
BODIES = st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda key: key not in ("event", "crc")), JSON)


def sealed(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.ndjson"))


def lines(directory: Path) -> list[dict[str, Any]]:
    return [decode(line) for path in sealed(directory) for line in path.read_bytes().splitlines(keepends=True)]


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.005)


@given(BODIES)
def test_a_line_reads_back_as_it_was_written(body: dict[str, Any]) -> None:
    line = encode("job", body)
    assert line.count(b"\n") == 1
    assert decode(line) == {"event": "job", **orjson.loads(orjson.dumps(body))}
    assert orjson.loads(line)["event"] == "job"


@given(BODIES, st.data())
def test_a_changed_byte_is_noticed(body: dict[str, Any], data: st.DataObject) -> None:
    line = encode("job", body)
    at = data.draw(st.integers(0, len(line) - 2))
    changed = line[:at] + bytes([line[at] ^ data.draw(st.integers(1, 255))]) + line[at + 1 :]
    with pytest.raises(ValueError, match="checksum"):
        decode(changed)


@given(BODIES, st.data())
def test_a_torn_line_is_noticed(body: dict[str, Any], data: st.DataObject) -> None:
    line = encode("job", body)
    with pytest.raises(ValueError, match="checksum"):
        decode(line[: data.draw(st.integers(0, len(line) - 2))])


def test_dataclasses_and_dicts_are_lines_alike() -> None:
    assert decode(encode("span", call(1)))["span_id"] == f"{1:016x}"


def test_closing_seals_what_was_written_in_order(tmp_path: Path) -> None:
    writer = Journal(tmp_path, "w0")
    for number in range(100):
        writer.append("span", {"n": number})
    writer.close()
    assert [line["n"] for line in lines(tmp_path)] == list(range(100))
    assert not list(tmp_path.glob("*.open"))
    assert writer.counters == {
        "written": 100,
        "synced": 100,
        "dropped": 0,
        "bytes": sum(path.stat().st_size for path in sealed(tmp_path)),
        "healthy": True,
        "last_error": None,
    }


def test_a_segment_is_sealed_by_age_without_further_lines(tmp_path: Path) -> None:
    writer = Journal(tmp_path, "w0", seal_seconds=0.05)
    writer.append("span", {"n": 1})
    wait_for(lambda: sealed(tmp_path))
    assert lines(tmp_path)[0]["n"] == 1
    writer.close()


def test_a_segment_is_sealed_by_size(tmp_path: Path) -> None:
    writer = Journal(tmp_path, "w0", seal_seconds=60, seal_bytes=1000)
    for _ in range(10):
        writer.append("span", {"text": "x" * 400})
    wait_for(lambda: len(sealed(tmp_path)) >= 3)
    writer.close()
    assert len(lines(tmp_path)) == 10


def test_lines_are_synced_soon_without_anybody_waiting(tmp_path: Path) -> None:
    writer = Journal(tmp_path, "w0", seal_seconds=60)
    writer.append("span", {"n": 1})
    wait_for(lambda: writer.synced == 1)
    assert not sealed(tmp_path)
    writer.close()


def test_a_durable_line_is_on_disk_when_its_future_resolves(tmp_path: Path) -> None:
    writer = Journal(tmp_path, "w0", seal_seconds=60)
    writer.append_durable("reward", {"n": 1}).result(30)
    assert writer.synced == 1
    (opened,) = tmp_path.glob("*.open")
    assert decode(opened.read_bytes())["n"] == 1
    writer.close()


def test_who_stops_waiting_does_not_stop_the_journal(tmp_path: Path) -> None:
    made = Journal(tmp_path, "t")

    async def impatient() -> None:
        waiting = asyncio.wrap_future(made.append_durable("reward", {"n": 1}))
        waiting.cancel()
        await asyncio.sleep(0)

    asyncio.run(impatient())
    made.append_durable("reward", {"n": 2}).result(30)
    made.close()
    assert [line["n"] for line in lines(tmp_path)] == [1, 2]


def test_many_waiters_share_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = 0
    real = os.fdatasync

    def counted(fd: int) -> None:
        nonlocal syncs
        syncs += 1
        time.sleep(0.005)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", counted)
    writer = Journal(tmp_path, "w0", seal_seconds=60)
    for future in [writer.append_durable("reward", {"n": number}) for number in range(200)]:
        future.result(30)
    writer.close()
    assert syncs < 50


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    writer = Journal(tmp_path, "w0", seal_bytes=20_000)

    def work(name: int) -> None:
        for number in range(200):
            writer.append("span", {"thread": name, "n": number, "text": "x" * (number % 97)})

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    found = lines(tmp_path)
    for name in range(4):
        assert [line["n"] for line in found if line["thread"] == name] == list(range(200))


def test_idle_means_idle(tmp_path: Path) -> None:
    writer = Journal(tmp_path, "w0", seal_seconds=0.01)
    writer.append("span", {"n": 1})
    wait_for(lambda: sealed(tmp_path))
    naps: list[float | None] = []
    real = writer._wake.wait

    def counted(timeout: float | None = None) -> bool:
        naps.append(timeout)
        return real(timeout)

    writer._wake.wait = counted  # type: ignore[method-assign]
    time.sleep(0.2)
    assert naps in ([], [None])
    writer.close()


def no_space(*_: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_never_raises_and_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Journal(tmp_path, "w0", seal_seconds=60)
    writer.append("span", {"n": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", no_space)
        writer.append("span", {"n": 2})
        future = writer.append_durable("reward", {"n": 3})
        with pytest.raises(Unavailable, match="No space left"):
            future.result(30)
        assert (writer.dropped, writer.healthy) == (2, False)
        assert "No space left" in (writer.last_error or "")
    writer.append_durable("span", {"n": 4}).result(30)
    assert writer.healthy
    writer.close()
    assert [line["n"] for line in lines(tmp_path)] == [1, 4]


def test_a_torn_write_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Journal(tmp_path, "w0", seal_seconds=60)
    writer.append("span", {"n": 1})
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
        writer.append("span", {"n": 2})
    writer.append("span", {"n": 3})
    writer.close()
    assert [line["n"] for line in lines(tmp_path)] == [1, 3]
    assert writer.dropped == 1


def test_a_tail_that_cannot_be_taken_back_ends_its_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Journal(tmp_path, "w0", seal_seconds=60)
    writer.append("span", {"n": 1})
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
        patch.setattr(os, "ftruncate", no_space)
        writer.append("span", {"n": 2})
    writer.append("span", {"n": 3})
    writer.close()
    first, second = sealed(tmp_path)
    assert first.read_bytes().endswith(b'{"event')
    assert decode(second.read_bytes())["n"] == 3


def test_a_failed_sync_fails_its_waiters_and_stores_nothing_of_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Journal(tmp_path, "w0", seal_seconds=60, sync_seconds=60)
    writer.append("span", {"n": 1})

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        future = writer.append_durable("reward", {"n": 2})
        with pytest.raises(Unavailable, match="Input/output"):
            future.result(30)
        assert not writer.healthy
    writer.append("span", {"n": 3})
    writer.close()
    text = b"".join(path.read_bytes() for path in sealed(tmp_path))
    assert [decode(line)["n"] for line in text.splitlines() if line.strip()] == [1, 3]


def test_what_json_cannot_hold_is_counted_not_raised(tmp_path: Path) -> None:
    writer = Journal(tmp_path, "w0")
    writer.append("span", {"n": 1 << 80})
    with pytest.raises(Unavailable):
        writer.append_durable("span", {"n": {1, 2}}).result(30)
    writer.close()
    assert writer.dropped == 2
    assert not sealed(tmp_path)


def test_after_closing_lines_are_refused(tmp_path: Path) -> None:
    writer = Journal(tmp_path, "w0")
    writer.close()
    writer.append("span", {"n": 1})
    with pytest.raises(Unavailable, match="closed"):
        writer.append_durable("span", {"n": 1}).result(30)
    assert writer.dropped == 2


def test_a_removed_directory_is_made_again(tmp_path: Path) -> None:
    writer = Journal(tmp_path / "journal", "w0")
    (tmp_path / "journal").rmdir()
    writer.append("span", {"n": 1})
    writer.close()
    assert len(lines(tmp_path / "journal")) == 1


def test_the_segment_of_a_living_writer_is_not_adopted(tmp_path: Path) -> None:
    writer = Journal(tmp_path, "w0", seal_seconds=60)
    writer.append("span", {"n": 1})
    assert adopt(tmp_path) == []
    writer.append("span", {"n": 2})
    writer.close()
    assert [line["n"] for line in lines(tmp_path)] == [1, 2]


def test_an_orphan_is_trimmed_and_sealed(tmp_path: Path) -> None:
    whole = encode("span", {"n": 1}) + encode("span", {"n": 2})
    (tmp_path / "1-w0-1-aa.open").write_bytes(whole + encode("span", {"n": 3})[:-5])
    (tmp_path / "2-w0-1-aa.open").write_bytes(b'{"event":"sp')
    assert [path.name for path in adopt(tmp_path)] == ["1-w0-1-aa.ndjson"]
    assert (tmp_path / "1-w0-1-aa.ndjson").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["1-w0-1-aa.ndjson"]


def test_a_torn_tail_longer_than_a_block_is_trimmed(tmp_path: Path) -> None:
    whole = encode("span", {"n": 1})
    (tmp_path / "1.open").write_bytes(whole + b"x" * 200_000)
    (sealed_path,) = adopt(tmp_path)
    assert sealed_path.read_bytes() == whole


def test_temporaries_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    old, new = tmp_path / ".old.tmp", tmp_path / ".new.tmp"
    old.touch()
    new.touch()
    os.utime(old, (1, 1))
    adopt(tmp_path)
    assert not old.exists()
    assert new.exists()


def test_names_sort_by_time_and_never_repeat(tmp_path: Path) -> None:
    names = []
    for _ in range(5):
        writer = Journal(tmp_path, "w0")
        writer.append("span", {})
        writer.close()
        names.append(max(path.name for path in sealed(tmp_path)))
    assert names == sorted(set(names))
    assert all(path.stat().st_mode & 0o077 == 0 for path in sealed(tmp_path))


def test_a_signal_of_sync_trouble_is_in_the_log_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = Journal(tmp_path, "w0")
    for _ in range(5):
        writer.append("span", {"n": 1 << 80})
    writer.close()
    assert len([record for record in caplog.records if "lost" in record.message]) == 1
    assert journal.log.name == "collector.journal"
