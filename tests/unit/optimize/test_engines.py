"""The engines of whole prompts, on a world with a known optimum and a scripted language model."""

import asyncio
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from collector.errors import BadInput, RatchetError
from optimize.apo.beam import rewritten
from optimize.apo.engine import Problem, Progress, Row, SearchResult
from optimize.apo.job import engine_of
from optimize.apo.proposers import Chain
from optimize.budget import Budget
from optimize.evaluation import Outcome, Request
from tests.worlds import SEED_PROMPT, SPECS, World

SEED = SEED_PROMPT


class Script:
    """A language model that rewrites the prompt it is shown, with one more rule: a useful one mostly."""

    def __init__(self, world: World, form: str = "prose") -> None:
        self.world, self.form = world, form
        self.asked: list[str] = []

    async def complete(self, messages: list[dict[str, str]]) -> str:
        text = messages[-1]["content"]
        self.asked.append(text)
        if "Which weaknesses" in text:
            return "The prompt lacks a rule."
        held = max(text.split("----\n") if "----" in text else text.split("```"), key=lambda part: SEED in part).strip()
        number = len(self.asked)
        rule = self.world.rules[(number * 7) % len(self.world.rules)]
        new = f"{held} {rule}" if rule not in held else held
        if self.form == "json":
            return json.dumps({"prompt": new})
        return f"Here is the improved prompt:\n```\n{new}\n```" if self.form == "fenced" else new


def problem(world: World, script: Script | None = None, budget: int = 300, **changes: Any) -> Problem:
    script = script or Script(world)
    made = Problem(
        SEED, world.tasks[:40], world.evaluate, Budget(budget), Chain([]), script.complete, seed=1, concurrency=4
    )
    return replace(made, **changes)


def run(name: str, asked: Problem) -> SearchResult:
    return asyncio.run(engine_of(name).search(asked))


ENGINES = ("beam", "gepa")


@pytest.mark.parametrize("form", ["prose", "json", "fenced"])
def test_the_beam_finds_a_better_prompt_whatever_form_the_model_answers_in(form: str) -> None:
    world = World(SPECS["clean"], 1)
    found = run("beam", problem(world, Script(world, form), 600))
    assert found.changed
    assert world.score(found.best_template) > 0.0
    assert found.calls > 0


def test_gepa_finds_a_better_prompt_within_our_budget() -> None:
    world = World(SPECS["clean"], 1)
    found = run("gepa", problem(world, Script(world, "fenced"), 400))
    assert world.score(found.best_template) > 0.0
    assert world.rollouts == found.rollouts <= 400


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("budget", [20, 57, 131])
def test_the_budget_is_never_overshot_and_no_prompt_meets_a_task_twice(name: str, budget: int) -> None:
    world = World(SPECS["base"], 2)
    seen: Counter[tuple[str, str]] = Counter()

    async def evaluate(requests: Sequence[Request]) -> list[Outcome]:
        seen.update((request.template, request.task.id) for request in requests)
        return await world.evaluate(requests)

    found = run(name, problem(world, budget=budget, evaluate=evaluate))
    assert sum(seen.values()) == found.rollouts <= budget
    assert set(seen.values()) <= {1}
    assert found.stop == "budget"


@pytest.mark.parametrize("name", ENGINES)
def test_a_search_broken_off_goes_the_same_way_again_and_pays_only_for_the_rest(name: str) -> None:
    world = World(SPECS["base"], 3)
    whole = run(name, problem(world, budget=150))
    paid = world.rollouts
    half = [replace(row, paid=True) for row in whole.rows[: len(whole.rows) // 2]]
    known = {(row.template_hash, row.task_id): row for row in half}
    asked: list[Request] = []

    async def evaluate(requests: Sequence[Request]) -> list[Outcome]:
        asked.extend(requests)
        return [_remembered(one, known) or world.outcome(one) for one in requests]

    world.rollouts = 0
    again = run(name, problem(world, budget=150, evaluate=evaluate, rows=half))
    assert (again.best_template, again.rollouts) == (whole.best_template, whole.rollouts)
    assert world.rollouts == paid - len(half)


def _remembered(request: Request, known: dict[tuple[str, str], Row]) -> Outcome | None:
    from optimize.apo.account import template_id

    row = known.get((template_id(request.template), request.task.id))
    return None if row is None else Outcome(request, row.score, cached=True)


@pytest.mark.parametrize("name", ENGINES)
def test_a_prompt_that_loses_a_variable_is_refused_before_any_rollout(name: str) -> None:
    world = World(SPECS["base"], 1)
    seed = "Solve {question} with care."

    async def complete(messages: list[dict[str, str]]) -> str:
        return f"Forget it {len(messages[-1]['content'])}."

    found = run(name, problem(world, budget=120, seed_template=seed, complete=complete))
    assert not found.changed
    assert found.rejected
    assert all("loses the variable" in why for _, why in found.rejected)
    assert {row.template_hash for row in found.rows} == {found.candidates[0].id}


@pytest.mark.parametrize("name", ENGINES)
def test_a_broken_agent_ends_the_search_with_its_reason(name: str) -> None:
    async def evaluate(requests: Sequence[Request]) -> list[Outcome]:
        return [Outcome(request, 0.0, ok=False, reason="crash") for request in requests]

    found = run(name, problem(World(SPECS["base"], 1), evaluate=evaluate))
    assert found.stop == "failures"
    assert re.search(r"\d+ of \d+ rollouts failed: crash", found.reason)
    assert found.rollouts <= 24


@pytest.mark.parametrize("name", ENGINES)
def test_a_prompt_that_is_always_right_costs_one_look(name: str) -> None:
    async def evaluate(requests: Sequence[Request]) -> list[Outcome]:
        return [Outcome(request, 1.0) for request in requests]

    found = run(name, problem(World(SPECS["base"], 1), evaluate=evaluate))
    assert (found.stop, found.changed, found.rollouts) == ("headroom", False, 20)


@pytest.mark.parametrize("name", ENGINES)
def test_without_a_language_model_the_engine_says_what_it_needs(name: str) -> None:
    with pytest.raises(BadInput, match="needs a language model"):
        run(name, problem(World(SPECS["base"], 1), complete=None))


def test_a_model_that_does_not_answer_ends_the_beam_and_not_the_job() -> None:
    async def complete(messages: list[dict[str, str]]) -> str:
        raise RatchetError("nobody there")

    found = run("beam", problem(World(SPECS["base"], 1), complete=complete))
    assert (found.stop, found.changed) == ("no gain", False)


@pytest.mark.parametrize("name", ENGINES)
def test_every_candidate_is_told_with_its_parent_and_reason(name: str) -> None:
    world = World(SPECS["clean"], 4)
    stages: list[Progress] = []
    found = run(name, problem(world, budget=200, on_progress=stages.append))
    ids = {candidate.id for candidate in found.candidates}
    assert len(ids) == len(found.candidates) > 1
    assert found.candidates[0].parent is None
    assert all(candidate.parent in ids for candidate in found.candidates[1:])
    assert all(candidate.reason for candidate in found.candidates)
    assert stages
    assert stages[-1].rollouts <= 200


def test_gepa_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gepa", None)
    with pytest.raises(BadInput, match=r"agent-ratchet\[gepa\]"):
        engine_of("gepa")


@pytest.mark.parametrize(
    ("reply", "prompt"),
    [
        ("Be brief.", "Be brief."),
        ("Sure, here it is:\nBe brief.", "Be brief."),
        ("```text\nBe brief.\n```", "Be brief."),
        ('{"prompt": "Be brief."}', "Be brief."),
        ('[{"op": "add", "text": "Be brief."}]', "Old.\nBe brief."),
        ('{"edits": [{"op": "add", "text": "Be brief."}]}', "Old.\nBe brief."),
        ("", None),
        ("[]", None),
    ],
)
def test_a_reply_is_read_in_prose_and_in_json(reply: str, prompt: str | None) -> None:
    assert rewritten(reply, "Old.") == prompt
