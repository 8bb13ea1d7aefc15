"""Prompt search on the real model: what the figures are made of, without the model."""

import argparse
import asyncio
import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.apo_real import figures
from bench.apo_real.answers import Asked, Cache, viable
from bench.apo_real.banks import PROBLEMS
from bench.apo_real.editor import Editor
from bench.apo_real.runs import ENGINES, Run, changes, sampled
from optimize.apo.parts import make

BANK = [make("instruction", f"Rule {number}.") for number in range(6)]


def run(engine: str, seed: int, *curve: tuple[int, str], rollouts: int = 400) -> Run:
    return Run("p", engine, seed, curve, rollouts, 0, "budget")


@given(st.text(min_size=1, max_size=12), st.integers(0, 12))
def test_every_beginning_of_a_right_answer_may_still_become_it(answer: str, length: int) -> None:
    right = answer.strip()
    if right:
        assert viable(f" {right[:length]}", [right])
        assert viable(f" {right} \n", ["other", right])


def test_an_answer_that_went_astray_is_known_to_be_wrong() -> None:
    assert not viable(" Paris.", ["Paris"])
    assert not viable("The", ["Paris", "Lyon"])
    assert viable("Par", ["Paris"])


def test_a_prompt_is_rendered_as_the_engine_does_for_a_base_model() -> None:
    assert Asked("Be kind.", "Capital of Peru?", ("Lima",)).text == "Be kind.\n\nQuestion: Capital of Peru?\nAnswer:"
    assert Asked("", "Capital of Peru?", ("Lima",)).text == "Question: Capital of Peru?\nAnswer:"


def test_answers_survive_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with contextlib.closing(Cache(path)) as cache:
        cache.add("a", right=True, text="Lima")
    with path.open("a") as file:
        file.write('\n{"key": "b", "ri')
    with contextlib.closing(Cache(path)) as cache:
        cache.add("c", right=False, text="Peru")
    with contextlib.closing(Cache(path)) as cache:
        assert cache.known == {"a": True, "c": False}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_has_a_bank_of_twenty_and_an_evaluation_set_that_no_search_sees(name: str) -> None:
    problem = PROBLEMS[name]()
    assert len({part.id for part in problem.bank}) == len(problem.bank) >= 20
    assert {part.kind for part in problem.bank} == {"instruction", "format", "demonstration"}
    search, evaluation = ({task.id for task in tasks} for tasks in (problem.search, problem.evaluation))
    assert (len(search), len(evaluation), search & evaluation) == (60, 60, set())
    shown = "\n".join(part.text for part in problem.bank)
    assert not [task for task in (*problem.search, *problem.evaluation) if problem.question(task) in shown]
    assert PROBLEMS[name]().search == problem.search


def test_the_editor_uses_the_bank_alone_and_is_reproducible() -> None:
    texts = []
    for _ in range(2):
        editor, prompt = Editor("You help.", BANK, seed=3), "You help."
        for _ in range(40):
            reply = asyncio.run(editor.complete([{"role": "user", "content": f"Mend this:\n----\n{prompt}\n----"}]))
            prompt = json.loads(reply)["prompt"]
            assert set(filter(None, prompt.replace("You help.", "").split("Rule"))) <= {
                prompt_end for number in range(6) for prompt_end in (f" {number}.", f" {number}. ", " ")
            }
            texts.append(prompt)
        assert editor.calls == 40
    assert texts[:40] == texts[40:]
    assert len(set(texts)) > 10


def test_the_editor_edits_the_prompt_that_it_is_shown() -> None:
    editor = Editor("You help.", BANK, seed=0)
    first = editor.edited([BANK[0], BANK[1], BANK[2], BANK[3]])
    assert len(set(first)) == len(first) >= 1
    changed = set(first) ^ set(BANK[:4])
    assert 0 < len(changed) <= 6


def test_what_would_be_reported_is_looked_at_on_a_grid() -> None:
    curve = [(0, "seed"), (8, "a"), (12, "b"), (36, "c"), (44, "c")]
    assert sampled(curve, 20) == [(0, "seed"), (20, "b"), (40, "c"), (44, "c")]
    assert changes(sampled(curve, 20)) == ((0, "seed"), (20, "b"), (40, "c"))


def test_the_goal_is_three_points_below_the_best_prompt_at_the_end_of_any_run() -> None:
    truth = {"seed": 0.1, "a": 0.8, "b": 0.78, "lucky": 0.95}
    runs = [run("ratchet", 0, (0, "seed"), (40, "b")), run("gepa", 0, (0, "seed"), (60, "lucky"), (300, "a"))]
    goal = figures.target(runs, truth)
    assert goal == pytest.approx(0.77)
    assert [figures.reached(one, truth, goal) for one in runs] == [40, 60]
    assert figures.reached(run("beam", 0, (0, "seed")), truth, goal) is None
    wavering = [(0, "seed"), (20, "lucky"), (40, "seed"), (80, "b"), (120, "a")]
    assert figures.reached(run("ratchet", 1, *wavering), truth, goal) == 80, "what was lost again was luck"
    assert figures.reached(run("ratchet", 1, *wavering[:3]), truth, goal) is None


def test_a_run_that_never_got_there_is_later_than_any_other() -> None:
    assert figures.middle([10, None, 30]) == 30
    assert figures.middle([10, None, None]) is None
    assert figures.ratio([100, 120, 140], [None, None, 300], 400) == pytest.approx(0.3)
    assert figures.ratio([100, 120, 140], [200, 240, 300], 400) == pytest.approx(0.5)
    assert figures.ratio([None, None, 140], [200, 240, 300], 400) is None


def test_an_interval_holds_the_median_and_says_where_it_is_open() -> None:
    low, high = figures.interval([40, 60, 80, 100, 120])
    assert low is not None
    assert high is not None
    assert 40 <= low <= 80 <= high <= 120
    assert figures.interval([40, 60, None, None, None]) == (40, None)


def test_only_seeds_that_every_engine_has_finished_are_reported() -> None:
    from bench.apo_real.__main__ import whole

    options = argparse.Namespace(seeds=3, engines=["ratchet", "gepa"])
    runs = [
        run("ratchet", 0, (0, "s")),
        run("gepa", 0, (0, "s")),
        run("ratchet", 1, (0, "s")),
        run("gepa", 7, (0, "s")),
    ]
    assert whole(runs, options) == runs[:2]
    assert set(options.engines) < set(ENGINES)
