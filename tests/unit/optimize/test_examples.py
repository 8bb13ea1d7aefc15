import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optimize.dataset import load_tasks
from optimize.grade import grader
from tests.fake_upstream import FakeUpstream, Reply, chat

EXAMPLE = Path(__file__).parents[3] / "examples" / "capital_city"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE.parents[1])


def test_the_agent_imports_the_openai_sdk_and_nothing_of_ratchet() -> None:
    tree = ast.parse((EXAMPLE / "agent.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"json", "os", "sys", "openai"}


def test_the_agents_only_own_settings_are_the_model_and_its_temperature() -> None:
    assert re.findall(r"environ.get\(\"(\w+)\"", (EXAMPLE / "agent.py").read_text()) == [
        "OPENAI_MODEL",
        "OPENAI_TEMPERATURE",
    ]


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


EXAMPLES = EXAMPLE.parent


@pytest.mark.parametrize("name", ["capital_city", "room_selection", "writers"])
def test_agents_import_no_ratchet_code(name: str) -> None:
    tree = ast.parse((EXAMPLES / name / "agent.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"json", "os", "sys", "openai", "pathlib"}


def test_the_classic_script_imports_one_module_of_ours() -> None:
    tree = ast.parse((EXAMPLE / "classic.py").read_text())
    imported = {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"pathlib", "grader", "openai", "optimize.api"}


@pytest.mark.parametrize("name", ["room_selection", "writers"])
def test_every_task_can_be_solved_and_a_wrong_answer_earns_less(name: str) -> None:
    grade = grader(f"python:examples.{name}.grader.grade")
    tasks = load_tasks(EXAMPLES / name / "tasks.jsonl")
    assert len(tasks) >= 40
    for task in tasks:
        if name == "writers":
            best = f"{task.data['product']}: {', '.join(task.data['keys'])}"
            assert [grade(task, best), grade(task, best + " word" * 60), grade(task, "A thing.")] == [1.0, 0.5, 0.0]
        else:
            fits = task.data["expected"] or ["none"]
            wrong = next(room for room in task.data["rooms"] if room not in fits)
            said = [fits[0], f"Take {fits[0]} please", wrong, f"{fits[0]} or {wrong}"]
            assert [grade(task, answer) for answer in said] == [1.0, 0.5, 0.0, 0.0]


def _ran(name: str, task: dict[str, object], upstream: FakeUpstream) -> str:
    env = {**os.environ, "OPENAI_BASE_URL": upstream.url, "OPENAI_API_KEY": "k"}
    command = [sys.executable, str(EXAMPLES / name / "agent.py")]
    done = subprocess.run(command, input=json.dumps(task) + "\n", env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_room_agent_asks_its_tools_before_it_answers() -> None:
    def call(name: str, **arguments: object) -> Reply:
        function = {"name": name, "arguments": json.dumps(arguments)}
        return chat(None, tool_calls=[{"id": f"call-{name}", "type": "function", "function": function}])

    task = load_tasks(EXAMPLES / "room_selection" / "tasks.jsonl")[0]
    with FakeUpstream() as upstream:
        upstream.reply(call("list_rooms"))
        upstream.reply(call("is_free", room="Aspen", day="Monday", hour=9))
        upstream.reply(call("is_free", room="Nowhere", day="Monday", hour=9))
        upstream.reply(chat("Aspen"))
        assert _ran("room_selection", task.data, upstream) == "Aspen"
        said = [message["content"] for message in upstream.requests[-1].json["messages"] if message["role"] == "tool"]
    assert "Aspen" in said[0] and "busy" not in said[0]
    assert said[1] in ("true", "false")
    assert said[2].startswith("error")


def test_the_writer_writes_from_the_planners_plan() -> None:
    task = load_tasks(EXAMPLES / "writers" / "tasks.jsonl")[0]
    with FakeUpstream() as upstream:
        upstream.reply(chat("the plan"))
        upstream.reply(chat("the note"))
        assert _ran("writers", task.data, upstream) == "the note"
        planner, writer = (request.json["messages"] for request in upstream.requests)
    assert planner[0]["content"] != writer[0]["content"]
    assert "the plan" in writer[1]["content"]
