"""The capital city study's own reckoning; the model itself is asked by `make study-capital` alone."""

import json
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="training needs the extra `rl`")

from bench.capital import SETTINGS, TASKS, Answer, Study, read, rows_of, table
from optimize.dataset import load_tasks


def answers(*rewards: float) -> list[Answer]:
    """Four answers to each of as many tasks as it takes."""
    tasks = load_tasks(TASKS)
    return [
        Answer(tasks[at // 4], (2, 10 + at // 4), (40 + at, 41), (-1.0, -2.0), "x", value)
        for at, value in enumerate(rewards)
    ]


def test_grpo_compares_the_answers_to_a_task_and_imitation_all_answers() -> None:
    given = answers(1, 0, 0, 0, 0.3, 0, 0, 0)
    first = {name: [row.advantages[0] for row in rows_of(given, "base", name)[0]] for name in ("grpo", "rft")}
    assert first["grpo"][0] == pytest.approx(first["grpo"][4], rel=1e-3)
    assert sum(first["grpo"][:4]) == pytest.approx(0, abs=1e-6)
    assert first["rft"][0] > 0.9 and 0.1 < first["rft"][4] < 0.2
    assert set(SETTINGS) == {"sft", "rft", "grpo"}


def test_a_broken_study_goes_on_with_what_is_measured(tmp_path: Path) -> None:
    entry = {"greedy": [1.0, 0.0], "sampled": 0.5, "contains": 1.0, "seconds": 9.0, "cpu_seconds": 5.0}
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_text("".join(json.dumps({"seed": 1, "method": name, **entry}) + "\n" for name in ("grpo", "sft")))
    two.write_text(json.dumps({"seed": 0, "method": "sft", **entry}) + "\n")
    found = read([one, two, tmp_path / "absent.jsonl"])
    assert {name: [entry["seed"] for entry in entries] for name, entries in found.items()} == {
        "sft": [0, 1],
        "grpo": [1],
    }
    assert table(found).row_count == 2


def test_the_three_splits_share_no_country(tmp_path: Path) -> None:
    study = Study(None, 0, tmp_path, print)  # type: ignore[arg-type]  # no question is asked
    names = [{task.id for task in some} for some in (study.training, study.validation, study.held)]
    assert [len(some) for some in names] == [64, 26, 64] and len(set.union(*names)) == 154
