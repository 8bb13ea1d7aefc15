import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from collector.client import Client
from collector.errors import BadInput, Conflict, RatchetError
from collector.settings import Settings, load
from optimize import jobs
from optimize.apo import shorter
from optimize.apo.factorial import Params
from optimize.apo.job import Stage, run_apo
from optimize.apo.spec import ApoSpec, file_sha256
from optimize.jobs import JobCancelled, JobLock, cancel, decoded
from tests.unit.optimize.world import AGENT, World, script

SEED = "You are a helper."


def model(system: str, user: str) -> str:
    """Knows the answer, and says it alone when the prompt has anything like "ONLY"; wordy else."""
    number = re.findall(r"\d+", user)[-1]
    return number if "ONLY" in system else f"The number is {number}, I think."


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(jobs, "REPORT_SECONDS", 0.0)
    made = World(model)
    yield made
    made.close()


def spec(tmp_path: Path, **changes: Any) -> ApoSpec:
    lines = [json.dumps({"id": f"t{n}", "question": f"Say {n}.", "expected": str(n)}) for n in range(100, 130)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(lines))
    base = ApoSpec(
        slot="s",
        tasks="tasks.jsonl",
        command=tuple(script(tmp_path)),
        grader="exact",
        budget=24,
        holdout=10,
        concurrency=2,
        timeout=20,
        cwd=str(tmp_path),
    )
    return replace(base, **changes)


def settings(tmp_path: Path) -> Settings:
    return load(flags={"store.data_dir": str(tmp_path / "data")}, environ={})


def run(world: World, tmp_path: Path, asked: ApoSpec, **more: Any) -> Any:
    client = cast(Client, world)
    return asyncio.run(run_apo(asked, client, world.url, settings=settings(tmp_path), **more))


def test_an_agent_that_nobody_knows_gets_better_and_the_winner_goes_live(tmp_path: Path, world: World) -> None:
    stages: list[Stage] = []
    done = run(world, tmp_path, spec(tmp_path), on_progress=stages.append)
    assert (done.verdict, done.promoted, done.seed_template) == ("promote", True, SEED)
    assert "ONLY" in done.best_template
    assert (done.gate.before, done.gate.after, done.gate.n) == (0.0, 1.0, 10)
    assert [version["template"] for version in world.versions("s")] == [SEED, done.best_template]
    winner = world.versions("s")[1]
    assert (winner["job_id"], winner["parent"], winner["live"]) == (done.job_id, 1, 1.0)
    (promotion,) = world.promotions
    assert (promotion["evidence"], promotion["job_id"], promotion["traffic"]) == ("gate", done.job_id, 1.0)
    assert next(stage.phase for stage in stages) == "origin"
    assert {stage.phase for stage in stages} == {"origin", "search", "gate", "done"}
    state = world.job(done.job_id)
    assert state["status"] == "done"
    assert decoded(state, "result")["version"] == 2
    json.dumps(done.as_dict())


def test_the_report_is_written_beside_the_data(tmp_path: Path, world: World) -> None:
    done = run(world, tmp_path, spec(tmp_path))
    assert done.report == tmp_path / "data" / "reports" / f"{done.job_id}.html"
    assert "ONLY" in done.report.read_text()
    beside = json.loads(done.report.with_suffix(".json").read_text())
    assert beside["report"] == str(done.report)
    assert len(beside["pairs"]) == 10
    assert (beside["wins"], beside["losses"], beside["holdout"]["method"]) == (10, 0, "fixed")
    assert [(one["id"], one["parent"]) for one in beside["lineage"]] == [("seed", None), ("best", "seed")]
    assert all(part["reason"] for part in beside["parts"])
    assert len(beside["history"]) > 1
    assert "-" + SEED in beside["diff"]


def test_the_budget_is_never_overshot(tmp_path: Path, world: World) -> None:
    done = run(world, tmp_path, spec(tmp_path))
    arms = Counter(event["arm"] for event in world.evaluations(done.job_id))
    assert arms["search"] <= 24
    assert arms["baseline"] == arms["candidate"] == 10
    assert done.rollouts == sum(arms.values())
    assert len(world.spans_) == done.rollouts + 2  # the two that showed the agent's own prompt


def test_no_held_out_task_is_used_by_the_search_or_shown_in_the_prompt(tmp_path: Path, world: World) -> None:
    asked = spec(tmp_path)
    search, held = asked.load()
    runs = [
        {"id": task.id, "question": task.data["question"], "episode": f"run-x-{task.id}-0-0000000{n % 10}"}
        for n, task in enumerate([*search, *held])
    ]
    for made in runs:  # traffic of all tasks, all of it right
        messages = [{"role": "system", "content": SEED}, {"role": "user", "content": made["question"]}]
        world.call({"messages": messages}, made["episode"], None, None)
        world.reward({"episode_id": made["episode"], "value": 1.0, "idempotency_key": made["episode"]})
    done = run(world, tmp_path, asked)
    searched = {event["task_id"] for event in world.evaluations(done.job_id) if event["arm"] == "search"}
    assert searched <= {task.id for task in search}
    shown = " ".join(row.part.text for row in done.search.parts if row.part.kind == "demonstration")
    assert shown
    assert not [task.id for task in held if str(task.data["question"]) in shown]


def test_without_headroom_nothing_is_spent_on_a_search(tmp_path: Path, world: World) -> None:
    world.model = lambda system, user: re.findall(r"\d+", user)[-1]
    done = run(world, tmp_path, spec(tmp_path, budget=100))
    assert (done.verdict, done.promoted, done.gate, done.version) == ("reject", False, None, None)
    assert "nothing to gain" in done.reason
    assert done.rollouts <= Params().headroom_rollouts
    assert done.report is not None


@pytest.mark.parametrize(("how", "promotions"), [("never", []), ("canary", [0.1])])
def test_promotion_is_the_users_choice(tmp_path: Path, world: World, how: Any, promotions: list[float]) -> None:
    done = run(world, tmp_path, spec(tmp_path, promote=how))
    assert (done.verdict, done.promoted, done.version) == ("promote", bool(promotions), 2)
    assert [promotion["traffic"] for promotion in world.promotions] == promotions


def test_a_known_slot_is_improved_from_its_live_version(tmp_path: Path, world: World) -> None:
    for template in ("You are a helper.", "You are kind.", "You are old."):
        world.add_version("s", kind="prompt", template=template)
    world.live["s"] = {2: 0.9, 3: 0.1}
    done = run(world, tmp_path, spec(tmp_path))
    assert (done.seed_template, done.seed_version) == ("You are kind.", 2)
    assert world.version("s", 4)["parent"] == 2


def test_a_broken_agent_ends_the_job_early_with_its_reason(tmp_path: Path, world: World) -> None:
    world.add_version("s", kind="prompt", template=SEED)
    broken = tuple(script(tmp_path, "import sys; sys.exit('no module named cheese')", "broken.py"))
    with pytest.raises(RatchetError, match="rollouts failed: crash"):
        run(world, tmp_path, spec(tmp_path, command=broken), job_id="job-1")
    assert world.job("job-1")["status"] == "failed"
    assert len(world.evaluations("job-1")) <= 8


def test_an_agent_that_makes_no_call_says_so(tmp_path: Path, world: World) -> None:
    with pytest.raises(RatchetError, match="made no call"):
        run(world, tmp_path, spec(tmp_path, command=tuple(script(tmp_path, "print(1)", "mute.py"))))


def test_a_prompt_that_holds_the_tasks_own_words_becomes_a_template(tmp_path: Path, world: World) -> None:
    agent = AGENT.replace('"You are a helper."', '"You answer about " + task["id"] + "; " + task["question"]')
    agent = agent.replace("task = json.loads(sys.stdin.readline())", "task = json.loads(os.environ['RATCHET_TASK'])")
    name = "mixed.py"
    with pytest.raises(BadInput, match="differs from task to task"):  # the id is no word of the task's own
        run(world, tmp_path, spec(tmp_path, command=tuple(script(tmp_path, agent, name))))
    name = "plain.py"
    agent = agent.replace('"You answer about " + task["id"] + "; " + task["question"]', '"Now: " + task["question"]')
    with pytest.raises(JobCancelled):
        run(world, tmp_path, spec(tmp_path, command=tuple(script(tmp_path, agent, name))), on_progress=_cancels(world))
    assert world.versions("s")[0]["template"] == "Now: {question}"


def _cancels(world: World) -> Any:
    def say(stage: Stage) -> None:
        if stage.phase == "search" and not stage.rollouts:
            cancel(cast(Client, world), world.jobs()[0]["job_id"])

    return say


def test_a_cancelled_job_stops_and_keeps_what_it_paid(tmp_path: Path, world: World) -> None:
    def say(stage: Stage) -> None:
        if stage.rollouts == 12 and world.job("job-1")["status"] == "running":
            cancel(cast(Client, world), "job-1")

    with pytest.raises(JobCancelled):
        run(world, tmp_path, spec(tmp_path), job_id="job-1", on_progress=say)
    assert world.job("job-1")["status"] == "cancelled"
    assert 12 <= len(world.evaluations("job-1")) <= 20
    assert not world.promotions


class Killed(BaseException):
    """Stands for a death that runs no handler of ours."""


@pytest.mark.parametrize("at", [3, 13, 27, 44])
def test_a_job_that_died_goes_on_where_it_was_and_pays_for_nothing_twice(tmp_path: Path, world: World, at: int) -> None:
    asked = spec(tmp_path)

    def die(stage: Stage) -> None:
        if len(world.evaluations("job-1")) >= at:
            raise Killed

    with pytest.raises(Killed):
        run(world, tmp_path, asked, job_id="job-1", on_progress=die)
    paid = len(world.evaluations("job-1"))
    assert world.job("job-1")["status"] == "running"
    resumed = run(world, tmp_path, asked, job_id="job-1")
    events = world.evaluations("job-1")
    keys = Counter((event["version_hash"], event["task_id"], event["replicate"]) for event in events)
    assert set(keys.values()) == {1}
    arms = Counter(event["arm"] for event in events)
    assert arms["search"] <= 24
    assert arms["baseline"] == arms["candidate"] == 10
    assert resumed.rollouts == len(events) >= paid
    assert resumed.verdict == "promote"


def test_a_job_under_work_is_not_resumed_beside_itself(tmp_path: Path, world: World) -> None:
    with JobLock(tmp_path / "data", "job-1"), pytest.raises(Conflict, match="another process"):
        run(world, tmp_path, spec(tmp_path), job_id="job-1")


def test_a_second_job_pays_only_for_what_the_first_did_not_try(tmp_path: Path, world: World) -> None:
    world.add_version("s", kind="prompt", template=SEED)
    run(world, tmp_path, spec(tmp_path, promote="never"))
    second = run(world, tmp_path, spec(tmp_path, promote="never"))
    keys = Counter((e["version_hash"], e["task_id"], e["replicate"]) for e in world.evaluations())
    assert set(keys.values()) == {1}
    assert second.verdict == "promote"


def test_every_candidate_that_the_held_out_tasks_have_seen_counts(tmp_path: Path, world: World) -> None:
    world.add_version("s", kind="prompt", template=SEED)
    first = run(world, tmp_path, spec(tmp_path, promote="never"))
    assert first.gate is not None
    assert first.gate.candidates_tried == 1
    seen = next(event for event in world.evaluations() if event["arm"] == "candidate")
    world.events([{**seen, "version_hash": "another00000", "evaluation_id": "ev-another.job-0", "job_id": "job-0"}])
    second = run(world, tmp_path, spec(tmp_path, promote="never"))
    assert second.gate is not None
    seen_now = {event["version_hash"] for event in world.evaluations() if event["arm"] == "candidate"}
    assert second.gate.candidates_tried == len(seen_now) >= 2


def test_a_spec_survives_the_store_and_a_changed_task_file_is_refused(tmp_path: Path) -> None:
    asked = spec(tmp_path)
    asked = replace(asked, tasks_sha256=file_sha256(tmp_path / "tasks.jsonl"))
    again = ApoSpec.from_dict(json.loads(json.dumps(asked.as_dict())))
    assert again == asked
    again.load()
    (tmp_path / "tasks.jsonl").write_text('{"id": 1}\n{"id": 2}')
    with pytest.raises(BadInput, match="not the file that the job began with"):
        again.load()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": "magic"}, "engine"),
        ({"budget": 3}, "budget"),
        ({"promote": "maybe"}, "--promote"),
        ({"command": ()}, "after --"),
        ({"grader": "fuzzy"}, "unknown grader"),
        ({"holdout": 30}, "hold out"),
        ({"gate": "never"}, "--gate"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    tmp_path: Path, world: World, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        run(world, tmp_path, spec(tmp_path, **changes))
    assert not world.events_
    assert not world.spans_


def test_an_optimizer_model_writes_parts_through_the_proxy_as_an_episode_of_the_job(
    tmp_path: Path, world: World
) -> None:
    def both(system: str, user: str) -> str:
        if system.startswith("You improve the prompt"):
            return json.dumps([{"op": "add", "text": "Answer CURTLY and stop.", "failures": [1, 2]}])
        number = re.findall(r"\d+", user)[-1]
        return number if "CURTLY" in system else f"The number is {number}, I think."

    world.model = both
    config = settings(tmp_path)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"model": "critic"})})
    client = cast(Client, world)
    done = asyncio.run(run_apo(spec(tmp_path), client, world.url, settings=config, job_id="job-1"))
    assert (done.verdict, done.gate and done.gate.after) == ("promote", 1.0)
    assert "CURTLY" in done.best_template
    assert "job-1-editor" in {span["episode_id"] for span in world.spans_}


def test_a_long_winner_is_said_in_fewer_words_before_it_meets_the_held_out_tasks(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shorter, "LARGE", 50)
    wordy = "Answer CURTLY and stop, " + "because nobody here has the time to read any more than that " * 4 + "today."
    short = f"{SEED} Answer CURTLY and stop."

    def both(system: str, user: str) -> str:
        if system.startswith("You improve the prompt"):
            return json.dumps([{"op": "add", "text": wordy, "failures": [1, 2]}])
        if "in as few words as you can" in user:
            return short
        number = re.findall(r"\d+", user)[-1]
        return number if "CURTLY" in system else f"The number is {number}, I think."

    world.model = both
    config = settings(tmp_path)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"model": "critic"})})
    asked = spec(tmp_path, budget=50)
    done = asyncio.run(run_apo(asked, cast(Client, world), world.url, settings=config))
    assert (done.verdict, done.best_template) == ("promote", short)
    assert "shorter version took its place" in done.search.reason
    beside = json.loads(done.report.with_suffix(".json").read_text()) if done.report else {}
    assert beside["lineage"][-1]["template"] == short
    assert Counter(event["arm"] for event in world.evaluations(done.job_id))["search"] <= 50


def test_an_optimizer_model_that_does_not_answer_does_not_stop_the_search(tmp_path: Path, world: World) -> None:
    config = settings(tmp_path)
    broken = config.optimizer.model_copy(update={"model": "critic", "api_base": "http://127.0.0.1:1/v1"})
    config = config.model_copy(update={"optimizer": broken})
    done = asyncio.run(run_apo(spec(tmp_path), cast(Client, world), world.url, settings=config))
    assert done.verdict == "promote"


def test_replicates_are_means_of_each_held_out_task(tmp_path: Path, world: World) -> None:
    done = run(world, tmp_path, spec(tmp_path, replicates=2))
    arms = Counter((event["arm"], event["replicate"]) for event in world.evaluations(done.job_id))
    assert [arms[arm, number] for arm in ("baseline", "candidate") for number in (0, 1)] == [10, 10, 10, 10]
    assert (done.gate.n, done.gate.before, done.gate.after) == (10, 0.0, 1.0)


def test_an_anytime_gate_ends_as_soon_as_the_gain_is_proven_and_says_so(tmp_path: Path, world: World) -> None:
    done = run(world, tmp_path, spec(tmp_path, gate="anytime", holdout=18, budget=48))
    arms = Counter(event["arm"] for event in world.evaluations(done.job_id))
    assert arms["baseline"] == arms["candidate"] == done.gate.n < 18
    assert (done.verdict, done.promoted, done.gate.method) == ("promote", True, "anytime")
    assert f"decided after {done.gate.n} of 18 tasks" in done.notes[-1]
    page = done.report.read_text()
    assert done.notes[-1] in page and "whenever it stops" in page


@pytest.mark.parametrize("at", [30, 53])
def test_an_anytime_gate_that_died_goes_on_with_the_same_tasks_to_the_same_end(
    tmp_path: Path, world: World, at: int
) -> None:
    asked = spec(tmp_path, gate="anytime", holdout=18, budget=48)
    whole = run(world, tmp_path, asked, job_id="job-0")
    fresh = World(model)

    def die(stage: Stage) -> None:
        if len(fresh.evaluations("job-1")) >= at:
            raise Killed

    try:
        with pytest.raises(Killed):
            run(fresh, tmp_path, asked, job_id="job-1", on_progress=die)
        resumed = run(fresh, tmp_path, asked, job_id="job-1")
        events = fresh.evaluations("job-1")
    finally:
        fresh.close()
    keys = Counter((event["version_hash"], event["task_id"], event["replicate"]) for event in events)
    assert set(keys.values()) == {1}
    assert resumed.gate == whole.gate
    assert [pair.task_id for pair in resumed.pairs] == [pair.task_id for pair in whole.pairs]


def test_forty_tasks_are_enough_and_a_start_at_nothing_is_headroom(tmp_path: Path, world: World) -> None:
    lines = [json.dumps({"id": f"t{n}", "question": f"Say {n}.", "expected": str(n)}) for n in range(100, 140)]
    asked = spec(tmp_path, holdout=0.4, budget=40)
    (tmp_path / "tasks.jsonl").write_text("\n".join(lines))
    done = run(world, tmp_path, asked)
    assert (done.gate.n, done.gate.before, done.verdict) == (16, 0.0, "promote")


def test_a_token_budget_leaves_room_for_the_test_and_is_not_exceeded(tmp_path: Path, world: World) -> None:
    done = run(world, tmp_path, spec(tmp_path, budget=100, budget_tokens=300))
    events = world.evaluations(done.job_id)
    assert sum(event["input_tokens"] + event["output_tokens"] for event in events) <= 300
    assert done.used["tokens"] <= 300
    assert 100 > Counter(event["arm"] for event in events)["search"] > 8


def test_dollars_that_nobody_counts_cannot_be_limited(tmp_path: Path, world: World) -> None:
    with pytest.raises(BadInput, match="budget-usd cannot be held"):
        run(world, tmp_path, spec(tmp_path, budget_usd=1.0), job_id="job-1")
    assert len(world.evaluations("job-1")) == 1
    assert world.job("job-1")["status"] == "failed"
