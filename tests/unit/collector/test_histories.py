import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import pytest

from collector import histories
from collector.maintenance import rebuild
from collector.service import Collector
from tests.unit.collector.days import write_day
from tests.unit.collector.rows import call, scalar, settings, write

AGENTS, TURNS = 4, 5


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called long, and how much of it is sorted at a time, in a size for tests."""
    monkeypatch.setattr(histories, "_LONG_BYTES", 2_000)
    monkeypatch.setattr(histories, "STRETCH_BYTES", 30_000)


def conversations() -> list[Any]:
    """Agents that take turns, each sending all that it was told so far."""
    rng = random.Random(1)
    told: dict[int, list[dict[str, str]]] = {agent: [] for agent in range(AGENTS)}
    calls = []
    for number in range(AGENTS * TURNS):
        agent = number % AGENTS
        told[agent].append({"role": "user", "content": rng.randbytes(1_000).hex()})
        calls.append(call(number, episode_id=f"ep-{agent}", input_messages=json.dumps(told[agent])))
    return calls


def loaded(data_dir: Path, calls: list[Any]) -> Collector:
    """A batch a call, as slow agents make them."""
    collector = Collector(settings(data_dir), background=False)
    for one in calls:
        write(data_dir, one)
        collector.flush()
    return collector


def test_long_histories_are_sorted_by_episode_and_stay_whole(tmp_path: Path, soon: None) -> None:
    calls = conversations()
    collector = loaded(tmp_path, calls)
    with collector.store._cursor() as cursor:
        sorted_ones = [episode for (episode,) in cursor.execute("SELECT episode_id FROM payloads").fetchall()]
    assert len(sorted_ones) > AGENTS
    assert [one for one, other in pairwise(sorted_ones) if one == other], "side by side"
    read = collector.query("SELECT span_id, input_messages FROM spans_v ORDER BY span_id").json()["rows"]
    assert read == [[one.span_id, one.input_messages] for one in calls]
    collector.close()


def test_sorted_or_not_the_content_is_the_same(tmp_path: Path, soon: None) -> None:
    collector = loaded(tmp_path, conversations())
    before = collector.store.content()
    collector.close()
    assert rebuild(settings(tmp_path)) == before


def test_a_store_opened_again_knows_what_waits(tmp_path: Path, soon: None) -> None:
    collector = loaded(tmp_path, conversations()[:6])
    waiting = collector.store._unsorted
    collector.close()
    collector = Collector(settings(tmp_path), background=False)
    assert waiting > 0 and collector.store._unsorted > 0
    collector.close()


def test_an_archived_day_takes_what_still_waits(tmp_path: Path, soon: None) -> None:
    calls = conversations()[:6]
    write_day(tmp_path, 2, *calls)
    collector = Collector(settings(tmp_path), background=False)
    assert scalar(collector, "SELECT count(*) FROM fresh_payloads") == len(calls)
    before = collector.store.content()
    assert collector.keeper.compact()["spans"] == len(calls)
    assert scalar(collector, "SELECT count(*) FROM fresh_payloads") == 0
    assert collector.store.content() == before
    collector.close()


def test_histories_that_cannot_be_sorted_stay_and_are_read(
    tmp_path: Path, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(cursor: Any) -> None:
        raise duckdb.OutOfMemoryException("no room to sort")

    monkeypatch.setattr(histories, "settle", no_room)
    calls = conversations()
    collector = loaded(tmp_path, calls)
    assert scalar(collector, "SELECT count(*) FROM fresh_payloads") == len(calls)
    assert scalar(collector, "SELECT count(*) FROM spans_v WHERE input_messages IS NOT NULL") == len(calls)
    collector.close()
