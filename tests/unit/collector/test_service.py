import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from safetensors.numpy import save_file

from collector import bodies
from collector.errors import BadInput, Conflict, NotFound, Unavailable
from collector.journal import Journal
from collector.service import Collector
from tests.unit.collector.rows import call, scalar, settings, write


@pytest.fixture
def collector(tmp_path: Path) -> Any:
    made = Collector(settings(tmp_path), background=False)
    yield made
    made.close()


def prompt(text: str, **fields: Any) -> bodies.VersionBody:
    return bodies.VersionBody(template=text, **fields)


def test_one_collector_per_data_directory(tmp_path: Path, collector: Collector) -> None:
    with pytest.raises(Conflict, match="a server is using") as caught:
        Collector(settings(tmp_path))
    assert caught.value.code == "store_in_use"


def test_closing_releases_the_directory_and_twice_is_once(tmp_path: Path) -> None:
    first = Collector(settings(tmp_path))
    first.close()
    first.close()
    second = Collector(settings(tmp_path))
    assert second.slots() == []
    second.close()


def test_a_start_that_fails_releases_the_directory(tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        Collector(settings(tmp_path, slots={"not a name": {"template": "x"}}))
    Collector(settings(tmp_path)).close()


def test_the_background_thread_loads_what_others_write(tmp_path: Path) -> None:
    made = Collector(settings(tmp_path))
    try:
        write(tmp_path, call(1))
        end = time.monotonic() + 10
        while scalar(made, "SELECT count(*) FROM spans") == 0:
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        made.close()


def test_the_loader_thread_outlives_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Collector(settings(tmp_path))
    crashed = threading.Event()
    real = made.loader.due

    def crash(*, asked: bool = False) -> bool:
        crashed.set()
        raise RuntimeError("unforeseen")

    try:
        monkeypatch.setattr(made.loader, "due", crash)
        assert crashed.wait(10)
        monkeypatch.setattr(made.loader, "due", real)
        write(tmp_path, call(1))
        assert made.flush()["pending"] == 0
        assert made._loading._thread is not None
        assert made._loading._thread.is_alive()
    finally:
        made.close()


def test_flush_waits_for_a_living_writer_to_seal(tmp_path: Path, collector: Collector) -> None:
    writer = Journal(tmp_path / "journal", "w0", seal_seconds=0.1)
    writer.append("span", call(1))
    assert collector.flush() == {"loaded": 1, "pending": 0}
    assert scalar(collector, "SELECT count(*) FROM spans") == 1
    writer.close()


def test_flush_gives_up_on_a_writer_that_never_seals(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collector.service._FLUSH_SECONDS", 0.1)
    writer = Journal(tmp_path / "journal", "w0", seal_seconds=60)
    writer.append("span", call(1))
    assert collector.flush() == {"loaded": 0, "pending": 1}
    writer.close()


def test_what_was_acknowledged_is_there_after_a_restart(tmp_path: Path, collector: Collector) -> None:
    collector.add_version("s", prompt("a", match={"role": "system"}, metrics={"holdout": 0.5}, note="n"))
    collector.add_version("s", prompt("b", parent=1, job_id="j"))
    candidate = collector.add_candidate("s", "c")
    assert collector.promote("s", bodies.PromoteBody(version=2, traffic=0.5, evidence="gate", note="why")) == 2
    collector.reward({"episode_id": "ep-a", "value": 1})
    before = (collector.snapshot(), collector.versions("s"), collector.deployments())
    collector.close()
    again = Collector(settings(tmp_path), background=False)
    try:
        assert (again.snapshot(), again.versions("s"), again.deployments()) == before
        assert again.candidate("s", candidate) == "c"
        assert again.versions("s")[0]["metrics"] == {"holdout": 0.5}
        assert scalar(again, "SELECT count(*) FROM rewards_v") == 1
        assert again.rollback("s", bodies.DecisionBody()) == 3
        assert again.slots()[0]["live"] == {"1": 1.0}
    finally:
        again.close()


def test_the_snapshot_is_left_in_a_file_at_each_change(tmp_path: Path, collector: Collector) -> None:
    path = tmp_path / "deployments.json"
    assert orjson.loads(path.read_bytes())["revision"] == 0
    collector.add_version("s", prompt("a"))
    assert orjson.loads(path.read_bytes()) == collector.snapshot()
    assert path.stat().st_mode & 0o077 == 0


def test_slots_of_the_configuration_are_versions(tmp_path: Path) -> None:
    for text, versions in (("a", 1), ("a", 1), ("b", 2)):
        made = Collector(settings(tmp_path, slots={"s": {"template": text, "match": {"role": "system"}}}))
        assert len(made.versions("s")) == versions
        assert made.slots()[0]["live"] == {"1": 1.0}, "a changed text is not live by itself"
        assert made.slots()[0]["match"] == {"role": "system"}
        made.close()


def test_a_broken_disk_changes_nothing(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    collector.add_version("s", prompt("a"))

    def full(*_: Any) -> int:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        for attempt in (
            lambda: collector.add_version("s", prompt("b")),
            lambda: collector.add_candidate("s", "c"),
            lambda: collector.reward({"episode_id": "e", "value": 1}),
        ):
            with pytest.raises(Unavailable):
                attempt()
    assert len(collector.versions("s")) == 1
    assert collector.slots()[0]["candidates"] == 0
    collector.flush()
    assert scalar(collector, "SELECT count(*) FROM rewards") == 0


def test_a_version_whose_deployment_failed_is_kept_and_deployed_later(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = collector.journal.append_durable

    def no_deployments(event: str, body: Any) -> Any:
        future = real(event if event != "deployment" else "job", body if event != "deployment" else {1, 2})
        return future

    with monkeypatch.context() as patch:
        patch.setattr(collector.journal, "append_durable", no_deployments)
        with pytest.raises(Unavailable):
            collector.add_version("s", prompt("a"))
    assert len(collector.versions("s")) == 1
    assert collector.slots()[0]["live"] == {}
    assert collector.add_version("s", prompt("a"))["version"] == 1
    assert collector.slots()[0]["live"] == {"1": 1.0}


def test_listeners_are_told_of_each_change_until_they_stop(collector: Collector) -> None:
    told: list[int] = []
    stop = collector.on_change(lambda: told.append(collector.registry.revision))
    collector.add_version("s", prompt("a"))
    collector.add_version("s", prompt("a"))
    collector.add_candidate("s", "x")
    stop()
    stop()
    collector.add_version("s", prompt("b"))
    assert told == [1]


def test_commands_from_many_threads_give_each_revision_once(collector: Collector) -> None:
    def add(number: int) -> int:
        return int(collector.add_version("s", prompt(f"text {number % 10}"))["version"])

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(add, range(40)))
    assert sorted(set(numbers)) == list(range(1, 11))
    with ThreadPoolExecutor(8) as pool:
        revisions = list(
            pool.map(lambda number: collector.promote("s", bodies.PromoteBody(version=number % 10 + 1)), range(20))
        )
    assert collector.registry.revision == max(revisions)
    assert [row["revision"] for row in collector.deployments()] == list(range(1, max(revisions) + 1))


def test_rewards_are_answered_with_ids_in_order(collector: Collector) -> None:
    single = collector.reward({"episode_id": "e", "value": 1, "idempotency_key": "k"})
    several = collector.reward([{"episode_id": "e", "value": 1, "idempotency_key": "k"}, {"span_id": "s", "value": 2}])
    assert several[0] == single
    collector.flush()
    assert scalar(collector, "SELECT count(*) FROM rewards") == 2


def test_one_bad_reward_of_many_stores_none(collector: Collector) -> None:
    with pytest.raises(BadInput) as caught:
        collector.reward([{"episode_id": "e", "value": 1}, {"episode_id": "e"}])
    assert caught.value.param == "[1].value"
    collector.flush()
    assert scalar(collector, "SELECT count(*) FROM rewards") == 0


JOB = {"event": "job", "job_id": "j", "kind": "apo", "status": "running", "spec": "{}", "ts_ns": 1}
EVALUATION = {"event": "evaluation", "evaluation_id": "e", "slot": "s", "version_hash": "h", "task_id": "t", "ok": True}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"status": "sleeping"}, "[1].status"),
        ({"spec": None}, "[1].spec"),
        ({"ts_ns": "1"}, "[1].ts_ns"),
        ({"colour": 1}, "[1].colour"),
        ({"event": "span"}, "[1]"),
    ],
)
def test_a_bad_event_is_named_and_none_is_stored(collector: Collector, change: dict[str, Any], param: str) -> None:
    with pytest.raises(BadInput) as caught:
        collector.events([JOB, {**JOB, **change}])
    assert caught.value.param == param
    collector.flush()
    assert collector.jobs() == []


def test_the_latest_line_of_a_job_is_its_state(collector: Collector) -> None:
    collector.events([JOB, {**JOB, "status": "done", "ts_ns": 2}, {**JOB, "job_id": "k", "ts_ns": 3}])
    collector.flush()
    assert [(job["job_id"], job["status"]) for job in collector.jobs()] == [("k", "running"), ("j", "done")]
    assert collector.job("j")["status"] == "done"
    with pytest.raises(NotFound):
        collector.job("x")


def test_a_repeated_evaluation_is_stored_once_and_a_missing_reward_stays_missing(collector: Collector) -> None:
    collector.events([{**EVALUATION, "ts_ns": 1}, {**EVALUATION, "ts_ns": 2, "job_id": "j"}])
    collector.events([{**EVALUATION, "ts_ns": 3}, {**EVALUATION, "evaluation_id": "f", "ts_ns": 4, "job_id": "j"}])
    collector.flush()
    assert [row["evaluation_id"] for row in collector.evaluations()] == ["e", "f"]
    assert [row["evaluation_id"] for row in collector.evaluations("j")] == ["f"]
    assert collector.evaluations()[0]["reward"] is None


def page_ids(collector: Collector, **where: Any) -> list[str]:
    return [row["episode_id"] for row in collector.episodes(**where)["episodes"]]


@pytest.fixture
def busy(tmp_path: Path, collector: Collector) -> Collector:
    calls = [
        call(
            number,
            episode_id=f"ep-{number}",
            start_ns=1000 if number < 4 else 1000 + number,
            prompt_slot="s" if number % 2 else "t",
            prompt_version=1 + number % 3,
            status="error" if number == 5 else "ok",
        )
        for number in range(8)
    ]
    write(tmp_path, *calls)
    collector.reward([{"episode_id": f"ep-{number}", "value": number / 10} for number in range(6)])
    collector.flush()
    return collector


def test_pages_are_newest_first_and_lose_none(busy: Collector) -> None:
    found: list[str] = []
    cursor = None
    while True:
        page = busy.episodes(limit=3, cursor=cursor)
        found += [row["episode_id"] for row in page["episodes"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert found == ["ep-7", "ep-6", "ep-5", "ep-4", "ep-3", "ep-2", "ep-1", "ep-0"]


def test_filters_narrow_the_page(busy: Collector) -> None:
    assert page_ids(busy, slot="s") == ["ep-7", "ep-5", "ep-3", "ep-1"]
    assert page_ids(busy, slot="s", version=2) == ["ep-7", "ep-1"]
    assert page_ids(busy, version=1) == ["ep-6", "ep-3", "ep-0"]
    assert page_ids(busy, min_reward=0.3) == ["ep-5", "ep-4", "ep-3"]
    assert page_ids(busy, max_reward=0.1) == ["ep-1", "ep-0"]
    assert page_ids(busy, status="error") == ["ep-5"]
    assert "ep-5" not in page_ids(busy, status="ok")


def test_spans_are_paged_and_filtered_too(busy: Collector) -> None:
    first = busy.spans(limit=5)
    second = busy.spans(limit=5, cursor=first["next"])
    assert len({row["span_id"] for row in first["spans"] + second["spans"]}) == 8
    assert second["next"] is None
    assert [row["episode_id"] for row in busy.spans(episode_id="ep-3")["spans"]] == ["ep-3"]
    assert [row["episode_id"] for row in busy.spans(slot="t", version=1)["spans"]] == ["ep-6", "ep-0"]
    assert [row["episode_id"] for row in busy.spans(status="error")["spans"]] == ["ep-5"]


@pytest.mark.parametrize(
    ("where", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 501}, "limit"),
        ({"cursor": "x"}, "cursor"),
        ({"cursor": "12"}, "cursor"),
        ({"cursor": "9" * 20 + ":a"}, "cursor"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_pages_are_named(collector: Collector, where: dict[str, Any], param: str) -> None:
    with pytest.raises(BadInput) as caught:
        collector.episodes(**where)
    assert caught.value.param == param


def test_an_episode_of_rewards_only_can_be_read_and_none_at_all_is_not_found(collector: Collector) -> None:
    collector.reward({"episode_id": "ep-x", "value": 0.5})
    collector.flush()
    assert collector.episode("ep-x")["reward"] == 0.5
    assert [row["target_id"] for row in collector.unmatched_rewards()] == ["ep-x"]
    for read in (collector.episode, collector.episode_otlp):
        with pytest.raises(NotFound):
            read("ep-none")


def test_stats_count_what_there_is(busy: Collector) -> None:
    stats = busy.stats()
    expected = {"spans": 8, "episodes": 8, "rewards": 6, "unmatched_rewards": 0, "quarantined": 0, "rebuilt": 0}
    assert {key: stats[key] for key in expected} == expected
    assert stats["journal"]["healthy"] is True
    assert stats["loader"]["lag_s"] == 0.0
    assert stats["data_dir"] == str(busy.data_dir.resolve())


def test_kinds_of_versions_do_not_borrow_fields(tmp_path: Path, collector: Collector) -> None:
    for body, param in (
        ({"template": "x", "path": "p"}, "path"),
        ({"template": "x", "base_model": "m"}, "base_model"),
        ({"kind": "adapter", "template": "x", "base_model": "m", "path": "p"}, "template"),
        ({"kind": "adapter", "base_model": "m"}, "path"),
        ({}, "template"),
    ):
        with pytest.raises(BadInput) as caught:
            collector.add_version("s", bodies.VersionBody.model_validate(body))
        assert caught.value.param == param


def test_an_adapter_inside_the_data_directory_is_registered(tmp_path: Path, collector: Collector) -> None:
    folder = tmp_path / "adapters" / "a1"
    folder.mkdir(parents=True)
    save_file({"lora_A": np.ones(3, np.float32)}, folder / "adapter_model.safetensors")
    body = bodies.VersionBody(kind="adapter", base_model="gemma", path="a1")
    assert collector.add_version("q", body)["version"] == 1
    assert collector.slots()[0]["live"] == {}
    assert collector.promote("q", bodies.PromoteBody(version=1)) == 1
