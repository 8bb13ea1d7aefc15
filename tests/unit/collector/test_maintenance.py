from pathlib import Path
from typing import Any

import duckdb
import pytest

from collector.client import Local
from collector.errors import Conflict, Unavailable
from collector.journal import encode
from collector.maintenance import rebuild, verify
from collector.store import Store
from tests.unit.collector.rows import call, settings, write


def reward(key: str, value: float = 1.0) -> tuple[str, dict[str, Any]]:
    return "reward", {"reward_id": key, "target_kind": "episode", "target_id": "ep-a", "value": value, "ts_ns": 1}


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    write(tmp_path, call(1), call(2), reward("a"), reward("a"))
    write(tmp_path, call(3), reward("a"), reward("b"), ("later", {"x": 1}))
    local = Local(tmp_path, settings(tmp_path))
    local.add_version("s", template="a", metrics={"x": 1})
    local.add_candidate("s", "b")
    local.create_key("bot")
    local.events([{"event": "job", "job_id": "j", "kind": "apo", "status": "done", "spec": "{}", "ts_ns": 1}])
    local.close()
    return tmp_path


def test_a_sound_store_verifies(filled: Path) -> None:
    local = Local(filled, settings(filled))
    report = verify(filled / "journal", local)
    local.close()
    assert report.ok
    expected = {"span": 3, "payload": 3, "reward": 2, "version": 1, "candidate": 1, "deployment": 1, "job": 1, "key": 1}
    assert report.journal == report.store == {**expected, "evaluation": 0}
    assert (report.broken, report.quarantined, report.segments) == (0, 0, 3)


def test_quarantined_lines_are_reported_and_are_no_difference(filled: Path) -> None:
    refused = encode("span", {"span_id": "x", "start_ns": "soon"})
    (filled / "journal" / "1-w9-1-aa.ndjson").write_bytes(encode("span", call(9)) + refused + b"torn\n")
    local = Local(filled, settings(filled))
    report = verify(filled / "journal", local)
    local.close()
    assert report.ok
    assert (report.broken, report.quarantined, report.store["span"]) == (1, 2, 4)


def test_a_segment_that_was_lost_and_rows_that_were_lost_are_found(filled: Path) -> None:
    connection = duckdb.connect(str(filled / "ratchet.duckdb"))
    connection.execute("DELETE FROM spans WHERE span_id = ?", [f"{1:016x}"])
    connection.close()
    local = Local(filled, settings(filled))
    report = verify(filled / "journal", local)
    assert not report.ok
    assert (report.journal["span"], report.store["span"]) == (3, 2)
    (filled / "journal" / sorted(path.name for path in (filled / "journal").glob("*.ndjson"))[0]).unlink()
    assert len(verify(filled / "journal", local).missing) == 1
    local.close()


def content(data_dir: Path) -> Any:
    config = settings(data_dir)
    store = Store(data_dir / "ratchet.duckdb", data_dir / "journal", config.store, config.rewards.weights)
    found = store.content()
    store.close()
    return found


def test_a_rebuilt_store_is_identical(filled: Path) -> None:
    before = content(filled)
    assert before["span"][0] == 3
    assert rebuild(settings(filled)) == before
    assert content(filled) == before
    (filled / "ratchet.duckdb").unlink()
    assert rebuild(settings(filled)) == before
    assert sorted(path.name for path in filled.glob("ratchet.duckdb*")) == ["ratchet.duckdb"]


def test_rebuilding_under_a_server_is_refused(filled: Path) -> None:
    local = Local(filled, settings(filled))
    with pytest.raises(Conflict, match="a server is using"):
        rebuild(settings(filled))
    local.close()
    rebuild(settings(filled))


def test_a_rebuild_that_fails_leaves_the_old_store(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(filled)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "load", full)
        with pytest.raises(Unavailable, match="No space left"):
            rebuild(settings(filled))
    assert content(filled) == before
