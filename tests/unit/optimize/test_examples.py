import ast
import re
from pathlib import Path

import pytest

from optimize.dataset import load_tasks
from optimize.grade import grader

EXAMPLE = Path(__file__).parents[3] / "examples" / "capital_city"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE.parents[1])


def test_the_agent_imports_the_openai_sdk_and_nothing_of_ratchet() -> None:
    tree = ast.parse((EXAMPLE / "agent.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"json", "os", "sys", "openai"}


def test_the_agents_only_own_setting_is_the_models_name() -> None:
    assert re.findall(r"environ.get\(\"(\w+)\"", (EXAMPLE / "agent.py").read_text()) == ["OPENAI_MODEL"]


def test_the_countries_are_many_enough_for_a_proof_and_each_has_its_capital() -> None:
    tasks = load_tasks(EXAMPLE / "tasks.jsonl")
    assert len(tasks) >= 130
    assert len({task.data["country"] for task in tasks}) == len(tasks)
    grade = grader("python:examples.capital_city.grader.grade")
    for task in tasks:
        spellings = task.expected if isinstance(task.expected, list) else [task.expected]
        assert [grade(task, f" {name}\n") for name in spellings] == [1.0] * len(spellings)


@pytest.mark.parametrize(
    ("answer", "score"),
    [("Paris", 1.0), ("paris", 0.3), ("Paris.", 0.3), ("It is Paris, in France", 0.3), ("Parisian", 0.0), ("", 0.0)],
)
def test_a_wordy_right_answer_earns_a_part(answer: str, score: float) -> None:
    tasks = {task.id: task for task in load_tasks(EXAMPLE / "tasks.jsonl")}
    assert grader("python:examples.capital_city.grader.grade")(tasks["france"], answer) == score
