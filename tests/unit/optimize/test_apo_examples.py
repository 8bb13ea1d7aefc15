import asyncio
import json
from typing import Any, cast

from collector.client import Client
from optimize.apo.examples import Tracer, gather, labelled
from optimize.dataset import Task, make_task

SEED = "You are a helper."


def country(name: str) -> Task:
    return make_task({"id": name.lower().replace(" ", "-"), "country": name, "topic": "capitals", "expected": "x"})


SEARCH = [country("France"), country("Papua New Guinea"), country("Niger")]
HELD = [country("Peru"), country("Guinea")]


class Store:
    """Only what `gather` asks of a client."""

    def __init__(self, *rows: tuple[str, str | None, str, str, str]) -> None:
        self.rows = rows

    def query(self, sql: str, limit: int) -> dict[str, Any]:
        columns = ["episode_id", "prompt_slot", "input_messages", "output_messages", "reward"]
        rows = []
        for episode, slot, system, asked, answer in self.rows:
            messages = [{"role": "system", "content": system}, {"role": "user", "content": asked}]
            rows.append([episode, slot, json.dumps(messages), json.dumps([{"role": "x", "content": answer}]), 1.0])
        return {"columns": columns, "rows": rows[:limit]}


def found(*rows: tuple[str, str | None, str, str, str]) -> list[tuple[str, str, str | None]]:
    examples = asyncio.run(gather(cast(Client, Store(*rows)), "s", SEED, SEARCH, HELD))
    return [(example.input, example.output, example.task_id) for example in examples]


def test_full_rewards_of_the_slot_or_of_its_prompt_become_examples() -> None:
    rows = [
        ("a", "s", "A candidate.", "Capital of France?", " Paris \n"),
        ("b", None, SEED, "Capital of Chad?", "N'Djamena"),
        ("c", "other", "Something else.", "Capital of Niger?", "Niamey"),
        ("d", "s", SEED, "Capital of Niger?", ""),
    ]
    assert found(*rows) == [("Capital of France?", "Paris", "france"), ("Capital of Chad?", "N'Djamena", None)]


def test_nothing_of_a_held_out_task_becomes_an_example() -> None:
    by_words = ("a", "s", SEED, "What is PERU's capital?", "Lima")
    by_episode = ("run-ab12-peru-0-0011aabb", "s", SEED, "Where is the government?", "Lima")
    assert found(by_words, by_episode) == []


def test_a_task_is_told_by_whole_words_the_longest_first() -> None:
    tracer = Tracer(SEARCH, HELD)
    assert tracer.trace("a", "Capital of Papua New Guinea?") == ("papua-new-guinea", True)
    assert tracer.trace("a", "Capital of Guinea?") == ("guinea", False)
    assert tracer.trace("a", "Capital of Nigeria?") == (None, True)
    assert tracer.trace("run-ab12-niger-3-0011aabb", "?") == ("niger", True)


def test_a_value_that_tasks_share_tells_none_of_them() -> None:
    assert Tracer(SEARCH, HELD).trace("a", "A question about capitals") == (None, True)


def test_of_equally_long_names_the_held_out_one_counts() -> None:
    assert Tracer([country("Iran")], [country("Peru")]).trace("a", "Iran or Peru?") == ("peru", False)


def test_tasks_that_tell_their_answer_become_examples_of_it() -> None:
    tasks = [
        make_task({"id": "a", "country": "France", "expected": ["Paris", "Paname"]}),
        make_task({"id": "b", "x": 1, "y": "two", "z": "three", "answer": 5}),
        make_task({"id": "c", "country": "Chad"}),
    ]
    found = [(one.input, one.output, one.task_id) for one in labelled(tasks)]
    assert found == [("France", "Paris", "a"), ('{"x": 1, "y": "two", "z": "three"}', "5", "b")]
