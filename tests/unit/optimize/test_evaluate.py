import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from collector.client import Client
from collector.errors import Unavailable
from optimize import patience
from optimize.budget import Budget
from optimize.dataset import make_task
from optimize.evaluate import JournalledEvaluator, context_hash
from optimize.evaluation import Outcome, Request
from optimize.grade import grader
from optimize.rollout import Rollout
from optimize.runner import Runner
from tests.unit.optimize.world import World, script

TASKS = [make_task({"id": str(index), "question": f"Say {index}.", "expected": str(index)}) for index in range(6)]


@pytest.fixture
def world() -> Iterator[World]:
    made = World(lambda system, user: user[4:-1] if system == "Obey." else "no")
    made.add_version("s", kind="prompt", template="You are a helper.")
    yield made
    made.close()


def evaluator(world: World, command: list[str], job: str = "job-1", **options: Any) -> JournalledEvaluator:
    client = cast(Client, world)
    url = options.pop("url", world.url)
    runner = Runner(command, client, url, grade=grader("exact"), concurrency=2, timeout=20)
    return JournalledEvaluator(runner, client, "s", job_id=job, **{"context": "c", **options})


def scores(outcomes: list[Outcome]) -> list[float]:
    return [outcome.score for outcome in outcomes]


def test_each_request_runs_under_its_own_prompt_and_outcomes_keep_the_order(tmp_path: Path, world: World) -> None:
    requests = [Request(template, task) for task in TASKS[:3] for template in ("Obey.", "Refuse.")]
    outcomes = asyncio.run(evaluator(world, script(tmp_path)).evaluate(requests))
    assert [outcome.request for outcome in outcomes] == requests
    assert scores(outcomes) == [1.0, 0.0] * 3
    assert [outcome.answer for outcome in outcomes] == ["0", "no", "1", "no", "2", "no"]
    assert not any(outcome.cached for outcome in outcomes)
    assert outcomes[1].feedback == 'expected: "0"'


def test_every_paid_rollout_is_journalled_with_what_a_reader_needs(tmp_path: Path, world: World) -> None:
    made = evaluator(world, script(tmp_path), model="m")
    asyncio.run(made.evaluate([Request("Obey.", TASKS[1], 2, "candidate", ("a", "b"))]))
    (event,) = world.evaluations("job-1")
    assert event["evaluation_id"].endswith(".job-1")
    known = {name: event[name] for name in ("slot", "task_id", "replicate", "arm", "subset", "reward", "ok", "model")}
    assert known == {
        "slot": "s",
        "task_id": "1",
        "replicate": 2,
        "arm": "candidate",
        "subset": '["a", "b"]',
        "reward": 1.0,
        "ok": True,
        "model": "m",
    }
    assert event["episode_id"] == world.spans_[0]["episode_id"]
    assert (made.rollouts, made.calls) == (1, 1)


def test_what_was_paid_is_found_again_by_this_job_and_by_the_next(tmp_path: Path, world: World) -> None:
    requests = [Request("Obey.", task) for task in TASKS]
    first = evaluator(world, script(tmp_path))
    asyncio.run(first.evaluate(requests[:4]))
    again = asyncio.run(first.evaluate(requests))
    assert [outcome.cached for outcome in again] == [True] * 4 + [False] * 2
    assert scores(again) == [1.0] * 6
    later = asyncio.run(evaluator(world, script(tmp_path), "job-2").evaluate(requests))
    assert all(outcome.cached for outcome in later)
    assert len(world.spans_) == 6


def test_another_replicate_prompt_task_or_context_is_another_rollout(tmp_path: Path, world: World) -> None:
    asyncio.run(evaluator(world, script(tmp_path)).evaluate([Request("Obey.", TASKS[0])]))
    other = make_task({"id": "0", "question": "Say 7.", "expected": "7"})
    more = [Request("Obey.", TASKS[0], 1), Request("Obey!", TASKS[0]), Request("Obey.", other)]
    assert not any(outcome.cached for outcome in asyncio.run(evaluator(world, script(tmp_path)).evaluate(more)))
    changed = evaluator(world, script(tmp_path), context="d")
    assert not asyncio.run(changed.evaluate([Request("Obey.", TASKS[0])]))[0].cached


def test_a_failure_is_remembered_by_its_own_job_and_tried_again_by_the_next(tmp_path: Path, world: World) -> None:
    broken = script(tmp_path, "import sys; sys.exit('no key')")
    request = [Request("Obey.", TASKS[0])]
    (failed,) = asyncio.run(evaluator(world, broken).evaluate(request))
    assert (failed.ok, failed.reason, failed.score) == (False, "crash", 0.0)
    assert "no key" in failed.feedback
    (same,) = asyncio.run(evaluator(world, broken).evaluate(request))
    assert (same.ok, same.reason, same.cached) == (False, "crash", True)
    (mended,) = asyncio.run(evaluator(world, script(tmp_path), "job-2").evaluate(request))
    assert (mended.ok, mended.cached) == (True, False)


def test_a_spent_budget_starts_nothing_and_says_so(tmp_path: Path, world: World) -> None:
    budget = Budget(3)
    made = evaluator(world, script(tmp_path), budget=budget)
    outcomes = asyncio.run(made.evaluate([Request("Obey.", task) for task in TASKS]))
    assert [outcome.reason for outcome in outcomes] == [None] * 3 + ["budget"] * 3
    assert len(world.spans_) == 3
    assert budget.left == 0
    again = asyncio.run(made.evaluate([Request("Obey.", task) for task in TASKS[:3]]))
    assert all(outcome.cached for outcome in again)


def test_rollouts_are_journalled_while_others_still_run(tmp_path: Path, world: World) -> None:
    """A death in the middle of a block then costs what was under way, not the block."""
    slow = make_task({"id": "slow", "question": "Say slow.", "expected": "slow"})
    inner = world.model

    def model(system: str, user: str) -> str:
        if "slow" in user:
            until = 500
            while not world.evaluations("job-1") and until:
                until -= 1
                world_wait.wait(0.02)
        return inner(system, user)

    import threading

    world_wait = threading.Event()
    world.model = model
    requests = [Request("Obey.", task) for task in [slow, TASKS[1]]]
    asyncio.run(evaluator(world, script(tmp_path)).evaluate(requests))
    assert [event["task_id"] for event in world.evaluations("job-1")] == ["1", "slow"]


def test_an_unreachable_proxy_is_no_failure_of_the_prompt(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PAUSES", (0.01,))
    made = evaluator(world, script(tmp_path), url="http://127.0.0.1:1")
    with pytest.raises(Unavailable, match="start `ratchet serve`"):
        asyncio.run(made.evaluate([Request("Obey.", TASKS[0])]))
    assert not world.evaluations()


def test_the_context_changes_with_command_grader_model_and_the_agents_source(tmp_path: Path) -> None:
    command = ["python", "agent.py"]
    (tmp_path / "agent.py").write_text("1")
    (tmp_path / "g.py").write_text("1")

    def of(words: list[str] = command, grade: str = "python:g.f", model: str | None = None) -> str:
        return context_hash(words, grade, model, tmp_path)

    first = of()
    assert first == of()
    assert len({first, of([*command, "-v"]), of(grade="exact"), of(model="m")}) == 4
    (tmp_path / "agent.py").write_text("2")
    edited = of()
    (tmp_path / "g.py").write_text("2")
    assert len({first, edited, of()}) == 3


def test_a_rollout_that_its_model_failed_is_tried_again_and_others_are_not(world: World) -> None:
    tried: list[str] = []

    class Flaky:
        base_url = "nowhere"

        async def run_all(self, plans: Any, on_settled: Any = None) -> list[Rollout]:
            rollouts = []
            for plan in plans:
                tried.append(plan.task.id)
                again = tried.count(plan.task.id) > 1
                made = {"0": (again, True), "1": (False, False), "2": (False, True)}.get(plan.task.id, (True, False))
                reason = None if made[0] else "crash"
                rollouts.append(Rollout(plan.task.id, "e", 1.0, made[0], reason, "", 0.0, upstream=made[1]))
            await on_settled(list(enumerate(rollouts)))
            return rollouts

    made = JournalledEvaluator(Flaky(), cast(Client, world), "s", job_id="job-1", context="c")
    outcomes = asyncio.run(made.evaluate([Request("Obey.", task) for task in TASKS[:4]]))
    assert [outcome.ok for outcome in outcomes] == [True, False, False, True]
    assert [tried.count(task.id) for task in TASKS[:4]] == [2, 1, 3, 1]
    assert len(world.evaluations("job-1")) == 4
