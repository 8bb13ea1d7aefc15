"""A shorter prompt takes the place of a long one where it earns as much, whatever engine found the long one."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest

from optimize.apo.account import Account, template_id
from optimize.apo.engine import Engine, Problem, Row, SearchResult
from optimize.apo.proposers import Bank
from optimize.apo.shorter import MARK, PAIRS, Shortened
from optimize.budget import Budget
from optimize.dataset import Task
from optimize.evaluation import Outcome, Request

SEED = "You answer questions about {country}."
LONG = f"{SEED} ALONE. " + "Please be so kind as to say no more than what was asked for. " * 4
SHORT = f"{SEED} ALONE. Say no more than was asked for."
TASKS = [Task(str(number), {"country": str(number)}, str(number)) for number in range(30)]


class Finds:
    """An engine that tries one prompt on all tasks, beside the seed, and reports it."""

    async def search(self, problem: Problem) -> SearchResult:
        account = Account(problem)
        account.adopt(LONG, SEED)
        await account.run([(prompt, task) for task in problem.tasks for prompt in (SEED, LONG)])
        return account.result(LONG, problem.tasks, "rounds", "that was all")


class Agent:
    """Right where the prompt says ALONE; counts what it is paid for, and remembers it as a store does."""

    def __init__(self) -> None:
        self.paid: dict[tuple[str, str], Request] = {}

    async def evaluate(self, requests: Sequence[Request]) -> list[Outcome]:
        outcomes = []
        for one in requests:
            key = (one.template, one.task.id)
            outcomes.append(Outcome(one, float("ALONE" in one.template), cached=key in self.paid))
            self.paid.setdefault(key, one)
        return outcomes


def problem(agent: Agent, reply: str | Exception = SHORT, *, budget: int = 200, rows: Sequence[Row] = ()) -> Problem:
    async def complete(messages: list[dict[str, str]]) -> str:
        assert LONG in messages[-1]["content"]
        if isinstance(reply, Exception):
            raise reply
        return reply

    return Problem(SEED, TASKS, agent.evaluate, Budget(budget), Bank(), complete, rows=rows)


def run(asked: Problem, engine: Engine | None = None) -> SearchResult:
    return asyncio.run(Shortened(engine or Finds()).search(asked))


def test_a_shorter_prompt_that_earns_as_much_takes_the_place_of_the_long_one_and_pays_for_itself_alone() -> None:
    agent = Agent()
    asked = problem(agent)
    found = run(asked)
    assert found.best_template == SHORT
    assert asked.budget.spent == found.rollouts == len(agent.paid) == 2 * len(TASKS) + PAIRS
    assert "took its place" in found.reason
    told = found.candidates[-1]
    assert (told.template, told.parent, told.score, told.rollouts) == (SHORT, template_id(LONG), 1.0, PAIRS)
    assert {one.template for one in found.candidates} == {SEED, LONG, SHORT}


def test_one_that_earns_less_does_not() -> None:
    found = run(problem(Agent(), SHORT.replace("ALONE", "")))
    assert found.best_template == LONG
    assert "earned less" in found.reason


@pytest.mark.parametrize(
    "reply",
    [
        SHORT.replace("{country}", "it"),
        LONG.replace("Please ", ""),
        "```",
        "",
        ConnectionError("no route"),
    ],
)
def test_a_reply_that_may_not_be_tried_costs_no_rollout(
    reply: str | Exception, caplog: pytest.LogCaptureFixture
) -> None:
    agent = Agent()
    with caplog.at_level(logging.ERROR):
        found = run(problem(agent, reply))
    assert found.best_template == LONG
    assert len(agent.paid) == 2 * len(TASKS)


def test_the_budget_holds_whatever_the_search_leaves() -> None:
    for budget in (60, 65, 69, 70, 75):
        agent = Agent()
        asked = problem(agent, budget=budget)
        found = run(asked)
        assert len(agent.paid) == asked.budget.spent <= budget
        assert (found.best_template == SHORT) == (budget >= 70)  # ten pairs at least


def test_without_a_language_model_nothing_is_kept_back_or_asked() -> None:
    asked = replace(problem(Agent(), budget=2 * len(TASKS)), complete=None)
    assert run(asked).best_template == LONG


def test_a_search_broken_off_in_the_comparison_counts_what_it_paid_there_once() -> None:
    agent = Agent()
    first = problem(agent)
    whole = run(first)
    rows = [replace(row, paid=True) for row in whole.rows]
    assert {row.subset for row in rows} == {(), MARK}
    again = problem(agent, rows=rows)
    resumed = run(again)
    assert resumed.best_template == whole.best_template
    assert again.budget.spent == first.budget.spent
    assert len(agent.paid) == first.budget.spent
