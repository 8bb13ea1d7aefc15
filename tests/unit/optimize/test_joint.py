"""Several prompts of one agent in one search."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.client import Client
from collector.errors import BadInput
from collector.settings import load
from optimize import jobs
from optimize.apo.job import run_apo
from optimize.apo.spec import ApoSpec, check
from optimize.joint import divide, join
from tests.unit.optimize.world import AGENT, World, script

TWO = AGENT.replace(
    "print(reply",
    """plan = reply["choices"][0]["message"]["content"]
reply = post(os.environ["OPENAI_BASE_URL"] + "/chat/completions", {"model": "scripted", "messages": [
    {"role": "system", "content": "You write."}, {"role": "user", "content": plan}]})
print(reply""",
)


def model(system: str, user: str) -> str:
    """Both roles add words of their own unless told "ONLY"; the answer is right when neither did."""
    if "helper" in system:
        return user if "ONLY" in system else f"Please {user}"
    number = re.findall(r"\d+", user)[-1]
    polite = "Please" in user
    return number if "ONLY" in system and not polite else f"It is {number}."


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(jobs, "REPORT_SECONDS", 0.0)
    made = World(model)
    yield made
    made.close()


def spec(tmp_path: Path, **changes: Any) -> ApoSpec:
    lines = [json.dumps({"id": f"t{n}", "question": f"Say {n}.", "expected": str(n)}) for n in range(100, 130)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(lines))
    (tmp_path / "grade.py").write_text("")
    made = ApoSpec(
        slot="planner,writer",
        tasks="tasks.jsonl",
        command=tuple(script(tmp_path, TWO)),
        grader="contains",
        budget=90,
        holdout=10,
        concurrency=2,
        cwd=str(tmp_path),
    )
    return replace(made, **changes)


def run(world: World, tmp_path: Path, asked: ApoSpec, **more: Any) -> Any:
    settings = load(flags={"store.data_dir": str(tmp_path / "data")}, environ={})
    return asyncio.run(run_apo(asked, cast(Client, world), world.url, settings=settings, **more))


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.text(), min_size=2, max_size=4))
def test_prompts_are_one_text_and_come_apart_again(prompts: dict[str, str]) -> None:
    assert divide(join(prompts), "x") == prompts


@given(st.text().filter(lambda text: "=== slot" not in text))
def test_any_other_text_is_the_prompt_of_its_slot(text: str) -> None:
    assert divide(text, "x") == {"x": text}


def test_a_prompt_with_a_heading_of_ours_cannot_be_joined() -> None:
    with pytest.raises(BadInput, match="line like"):
        join({"a": "b\n=== slot c ===\nd", "e": "f"})


def test_two_prompts_are_searched_proven_and_promoted_together(tmp_path: Path, world: World) -> None:
    asked = spec(tmp_path, grader="exact")
    world.model = lambda system, user: (
        user if "helper" in system else re.findall(r"\d+", user)[-1] if "ONLY" in system else f"It is {user}."
    )
    done = run(world, tmp_path, asked)
    assert done.verdict == "promote"
    assert [world.versions(slot)[0]["template"] for slot in ("planner", "writer")] == [
        "You are a helper.",
        "You write.",
    ]
    assert "ONLY" in world.versions("writer")[1]["template"]
    assert done.versions.keys() <= {"planner", "writer"}
    assert {one["slot"] for one in world.promotions} == done.versions.keys()
    assert "writer +" in done.search.reason
    events = world.evaluations(done.job_id)
    assert Counter(event["arm"] for event in events)["search"] <= 90
    json.dumps(done.as_dict())


class Killed(BaseException):
    """Stands for a death that runs no handler of ours."""


@pytest.mark.parametrize("at", [10, 40])
def test_a_joint_search_that_died_goes_on_and_pays_for_nothing_twice(tmp_path: Path, world: World, at: int) -> None:
    asked = spec(tmp_path, grader="exact", budget=60)
    world.model = lambda system, user: (
        user if "helper" in system else re.findall(r"\d+", user)[-1] if "ONLY" in system else f"It is {user}."
    )

    def die(stage: Any) -> None:
        if len(world.evaluations("job-1")) >= at:
            raise Killed

    with pytest.raises(Killed):
        run(world, tmp_path, asked, job_id="job-1", on_progress=die)
    done = run(world, tmp_path, asked, job_id="job-1")
    events = world.evaluations("job-1")
    keys = Counter((event["version_hash"], event["task_id"], event["replicate"]) for event in events)
    assert set(keys.values()) == {1}
    assert Counter(event["arm"] for event in events)["search"] <= 60
    assert done.rollouts == len(events)


def test_slots_and_prompts_have_to_agree(tmp_path: Path, world: World) -> None:
    with pytest.raises(BadInput, match="uses 2 prompts that no slot knows, but 3"):
        run(world, tmp_path, spec(tmp_path, slot="a,b,c"))
    with pytest.raises(BadInput, match="named twice"):
        check(spec(tmp_path, slot="a,a"))
    with pytest.raises(BadInput, match="takes one slot"):
        check(spec(tmp_path, mode="replay"))
