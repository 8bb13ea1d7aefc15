"""A collector whose ClickHouse does not answer: nothing here needs one."""

from pathlib import Path

import pytest

from collector import bodies, clickhouse
from collector.clickhouse_http import Failed, Server
from collector.service import Collector
from collector.store import Store
from tests.unit.collector.days import write_day
from tests.unit.collector.rows import call, settings, write

AWAY = {"url": "clickhouse://127.0.0.1:1/db"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


def opened(folder: Path) -> Collector:
    return Collector(settings(folder, store=AWAY), background=False)


def test_versions_promotions_and_revoked_keys_survive_restarts_while_clickhouse_is_away(folder: Path) -> None:
    collector = opened(folder)
    collector.add_version("s", bodies.VersionBody(template="one"))
    collector.close()
    collector = opened(folder)
    collector.add_version("s", bodies.VersionBody(template="two"))
    revision = collector.promote("s", bodies.PromoteBody(version=2))
    made = collector.create_key(bodies.KeyBody(name="k"))
    collector.revoke_key(made["key_id"])
    collector.close()
    collector = opened(folder)
    assert [row["template"] for row in collector.versions("s")] == ["one", "two"]
    assert collector.registry.revision == revision
    assert collector.registry.keys.get(made["key_id"]).revoked_ns is not None
    collector.add_version("s", bodies.VersionBody(template="three"))
    assert [row["version"] for row in collector.versions("s")] == [1, 2, 3]
    collector.close()


def test_switching_engines_starts_the_local_file_over_and_the_journal_fills_it(folder: Path) -> None:
    collector = Collector(settings(folder), background=False)
    write(folder, call(1), call(2))
    assert collector.flush()["pending"] == 0
    collector.close()
    collector = opened(folder)
    assert collector.store.loaded() == set(), "ClickHouse has none of what DuckDB had loaded"
    collector.close()
    collector = Collector(settings(folder), background=False)
    assert collector.store.content()["span"][0] == 2
    collector.close()


def test_a_segment_that_leaves_the_journal_is_known_no_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = opened(folder)
    path = write_day(folder, 3, call(1))
    kept = write_day(folder, 2, call(2), ("evaluation", {"evaluation_id": "e", "ok": True, "ts_ns": 1}))
    monkeypatch.setattr(clickhouse.ClickHouse, "load", lambda self, segments: Store.load(self, segments))
    monkeypatch.setattr(clickhouse.ClickHouse, "noted", lambda self, names: set(names))
    collector.flush()
    assert path.stem in collector.store.loaded()
    left = path.with_suffix(".trimmed")
    left.write_bytes(b"half of it")
    collector.keeper.compact(dry_run=True)
    assert path.stem in collector.store.loaded()
    collector.keeper.compact()
    assert not path.exists()
    assert not left.exists(), "a compaction that was killed left it"
    assert path.stem not in collector.store.loaded()
    assert not collector.loader.is_loaded(path.stem)
    assert kept.stem in collector.store.loaded(), "what is still in the journal must not be loaded again"
    monkeypatch.undo()
    collector.close()


def test_a_refused_password_does_not_keep_the_collector_down(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **more: object) -> object:
        raise Failed("Authentication failed", 516)

    monkeypatch.setattr(Server, "rows", refuse)
    collector = opened(folder)
    write(folder, call(1))
    assert collector.flush()["pending"] == 1
    assert collector.loader.counters.errors > 0
    assert "Authentication failed" in collector.stats()["clickhouse"]
    collector.close()
