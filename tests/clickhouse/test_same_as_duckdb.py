"""The same journal in DuckDB and in ClickHouse: the same rows of the public views, the same answers of every call."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from collector.bodies import ExportBody
from collector.client import Local
from collector.maintenance import verify
from collector.service import Collector
from tests.clickhouse.server import Server
from tests.unit.collector.rows import call, settings, write
from tests.unit.collector.test_settle import own
from tests.unit.collector.test_store import reward

VIEWS = {
    "spans_v": "span_id",
    "rewards_v": "reward_id",
    "episodes_v": "episode_id",
    "versions_v": "slot",
    "deployments_v": "revision",
    "jobs_v": "job_id",
    "evaluations_v": "evaluation_id",
    "payloads_v": "span_id",
}
ODD = "it's \\ \"odd\"\ttab\nline é 日本 {x:String} '; DROP TABLE calls --"


def events() -> list[Any]:
    """Calls of forty episodes, two of them observed by their agents too, and everything else that a journal holds."""
    dice = random.Random(7)
    found: list[Any] = []
    for number in range(120):
        failed = number % 11 == 0
        found.append(
            call(
                number,
                episode_id=f"ep-{number % 40}",
                trace_id=f"{number % 40 + 100:032x}",
                start_ns=1_700_000_000_000_000_000 + dice.randrange(10**12),
                end_ns=1_700_000_002_000_000_000 + dice.randrange(10**12),
                status="error" if failed else "ok",
                http_status=500 if failed else 200,
                error_type="upstream" if failed else None,
                prompt_slot="capital" if number % 3 else None,
                prompt_version=number % 2 + 1 if number % 3 == 1 else None,
                prompt_candidate="c-abc" if number % 3 == 2 else None,
                adapter_slot="qwen" if number % 5 == 0 else None,
                adapter_version=2 if number % 5 == 0 else None,
                propensity=0.5 if number % 3 else None,
                input_tokens=number if number % 4 else None,
                output_tokens=2 * number,
                cost_usd=number / 1024 if number % 2 else None,
                stream=number % 2 == 0,
                temperature=0.25,
                ttft_ms=1.5,
                seed=-number,
                tools=json.dumps([{"name": ODD}]) if number % 7 == 0 else None,
                token_ids=json.dumps({"prompt": [1, 2], "completion": [[3]]}) if number % 13 == 0 else None,
                attributes=json.dumps({"variables": {"x": ODD}, "n": 1.50}) if number % 6 == 0 else None,
                input_messages=json.dumps([{"role": "user", "content": ODD + str(number)}]),
            )
        )
    found += [
        reward(1, "span", f"{3:016x}", 0.5),
        reward(2, "episode", "ep-4", 1.0),
        reward(3, "episode", "ep-4", 0.25, ts_ns=50),  # a correction
        reward(4, "response", "chatcmpl-9", 0.75, label=ODD, explanation=ODD),
        reward(5, "trace", f"{107:032x}", -1.0, source="human"),
        reward(6, "response", "never-seen", 1.0),
        reward(7, "episode", "ep-nowhere", 1.0),
        reward(8, "span", "nowhere", 1.0),
        reward(9, "episode", "ep-5", 2.0, name="style"),
        reward(10, "episode", "ep-6", 2.0, name="unweighted"),
        reward(11, "episode", ODD, 2.0),
        reward(12, "span", f"a{1:015x}", 0.125),  # an echo of a call
        reward(13, "trace", f"{7:032x}", 0.5),  # the agent's own trace
        reward(2, "episode", "ep-4", 1.0),  # sent twice
    ]
    found += [own(0, None, "invoke_agent"), own(1, 0, response_id="chatcmpl-1", input_tokens=5)]
    found += [own(2, 0, "execute_tool"), own(2, 0, "execute_tool")]
    found += [own(5, None, "chat", trace_id=f"{8:032x}", response_id="nobody", episode_id="t-8", input_tokens=3)]
    found.append(call(200, response_id="chatcmpl-1", episode_id="ep-x", trace_id=f"{9:032x}", start_ns=1_500))
    version = {"slot": "capital", "version": 1, "kind": "prompt", "hash": "h", "template": ODD, "created_ns": 5}
    found += [
        ("version", {**version, "match": {"role": "system"}, "note": ODD}),
        ("version", {**version, "version": 2, "parent": 1, "metrics": {"reward": 0.5}}),
        ("candidate", {"slot": "capital", "candidate": "c-abc", "template": ODD, "ts_ns": 6}),
        ("deployment", {"revision": 1, "slot": "capital", "action": "promote", "arms": {"1": 1.0}, "ts_ns": 7}),
        ("job", {"job_id": "j-1", "kind": "apo", "status": "running", "spec": {"n": 1}, "ts_ns": 8}),
        ("job", {"job_id": "j-1", "kind": "apo", "status": "done", "spec": {"n": 1}, "ts_ns": 9}),
        (
            "evaluation",
            {"evaluation_id": "e-1", "job_id": "j-1", "reward": 0.5, "ok": True, "seconds": 1.5, "ts_ns": 9},
        ),
        (
            "evaluation",
            {"evaluation_id": "e-1", "job_id": "j-1", "reward": 0.5, "ok": True, "seconds": 1.5, "ts_ns": 9},
        ),
    ]
    return found


def pair(folder: Path, url: str, bodies: list[Any], segments: int) -> tuple[Collector, Collector]:
    """The same events, in so many segments, in both engines."""
    size = len(bodies) // segments + 1
    for at in range(0, len(bodies), size):
        write(folder / "duckdb", *bodies[at : at + size], role=f"w{at:03d}")
    shutil.copytree(folder / "duckdb", folder / "clickhouse")
    weights = {"rewards": {"weights": {"reward": 1.0, "style": 0.5}}}
    return (
        Collector(settings(folder / "duckdb", **weights), background=False),
        Collector(settings(folder / "clickhouse", store={"url": url}, **weights), background=False),
    )


@pytest.fixture(scope="module")
def both(clickhouse: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Collector, Collector]]:
    made = pair(tmp_path_factory.mktemp("both"), clickhouse.url(), events(), 3)
    yield made
    for one in made:
        one.close()


def rows(collector: Collector, view: str) -> dict[str, Any]:
    found = collector.query(f"SELECT * FROM {view}").json()
    named = [dict(sorted(zip(found["columns"], row, strict=True))) for row in found["rows"]]
    return {"columns": sorted(found["columns"]), "rows": sorted(named, key=lambda row: json.dumps(row))}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_has_the_same_rows(both: tuple[Collector, Collector], view: str) -> None:
    ours, theirs = (rows(one, view) for one in both)
    assert ours["rows"], "nothing to compare"
    assert theirs == ours


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_arrival_changes_no_row(clickhouse: Server, tmp_path: Path, seed: int) -> None:
    bodies = events()
    random.Random(seed).shuffle(bodies)
    one, other = pair(tmp_path, clickhouse.url(), bodies, 9)
    try:
        for view in ("spans_v", "rewards_v", "episodes_v"):
            assert rows(other, view) == rows(one, view), view
    finally:
        one.close()
        other.close()


def same(both: tuple[Collector, Collector], ask: Any) -> Any:
    ours, theirs = (ask(one) for one in both)
    assert theirs == ours
    return ours


def test_pages_of_episodes_are_the_same_to_the_last(both: tuple[Collector, Collector]) -> None:
    seen, cursor = [], None
    while True:
        page = same(both, lambda one: one.episodes(7, cursor))  # noqa: B023 (asked at once)
        seen += [row["episode_id"] for row in page["episodes"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert len(seen) == len(set(seen)) == 42


@pytest.mark.parametrize(
    "where",
    [
        {"slot": "capital"},
        {"slot": "qwen", "version": 2},
        {"version": 1},
        {"min_reward": 0.5},
        {"max_reward": 0.5},
        {"status": "error"},
        {"status": "ok", "slot": "capital", "min_reward": 0.1},
        {"slot": ODD},
    ],
)
def test_filters_of_episodes_are_the_same(both: tuple[Collector, Collector], where: dict[str, Any]) -> None:
    same(both, lambda one: one.episodes(500, None, **where))


def test_every_episode_is_the_same(both: tuple[Collector, Collector]) -> None:
    for number in range(0, 40, 3):
        assert same(both, lambda one: one.episode(f"ep-{number}"))["steps"]  # noqa: B023 (asked at once)
    assert len(same(both, lambda one: one.episode("ep-x"))["rewards"]) == 2
    assert same(both, lambda one: one.episode("t-8"))["steps"]
    assert same(both, lambda one: one.episode(ODD))["rewards"]


@pytest.mark.parametrize(
    "where", [{}, {"episode_id": "ep-7"}, {"slot": "capital", "version": 2}, {"status": "error"}, {"version": 2}]
)
def test_spans_are_the_same(both: tuple[Collector, Collector], where: dict[str, Any]) -> None:
    assert same(both, lambda one: one.spans(500, None, **where))["spans"]


def test_the_rest_of_the_calls_answer_the_same(both: tuple[Collector, Collector]) -> None:
    assert len(same(both, lambda one: sorted(row["reward_id"] for row in one.unmatched_rewards(50)))) == 4
    assert same(both, lambda one: one.jobs())[0]["status"] == "done"
    assert len(same(both, lambda one: one.evaluations("j-1"))) == 1
    assert same(both, lambda one: one.versions("capital"))
    assert same(both, lambda one: one.deployments())
    assert same(both, lambda one: one.discover(200)) is not None
    counts = ("spans", "episodes", "rewards", "unknown_prompts", "unmatched_rewards", "segments", "quarantined")
    assert same(both, lambda one: {name: one.stats()[name] for name in counts})["spans"] == 124


def test_exports_are_the_same(both: tuple[Collector, Collector]) -> None:
    def everything(one: Collector) -> Any:
        found = one.export(ExportBody(limit=500))
        for episode in found["episodes"]:
            for name, key in (("spans", "span_id"), ("echoes", "span_id"), ("rewards", "reward_id")):
                episode[name] = sorted(episode[name], key=lambda row: row[key])
        return found

    assert sum(len(episode["spans"]) for episode in same(both, everything)["episodes"]) == 124


def test_what_the_optimizer_asks_is_answered_the_same(both: tuple[Collector, Collector]) -> None:
    from optimize import jobs, logged, runner
    from optimize.apo import examples
    from optimize.rl import gather

    for sql in (examples.BEST, runner.RECENT, logged.CALLS, logged.LABELS, gather.REWARDS, gather.SPANS):
        ours, theirs = (one.query(sql).json() for one in both)
        assert theirs["columns"] == ours["columns"]
        key = json.dumps
        assert sorted(theirs["rows"], key=key) == sorted(ours["rows"], key=key), sql
    assert same(both, lambda one: one.query(jobs.CANCELLATIONS).json()["rows"]) == []


def test_the_journal_is_found_whole_by_verify(clickhouse: Server, tmp_path: Path) -> None:
    write(tmp_path, *events())
    local = Local(tmp_path, settings(tmp_path, store={"url": clickhouse.url()}))
    try:
        report = verify(tmp_path / "journal", local)
        assert report.ok, report
    finally:
        local.close()
