"""Every command of the README's tour runs as it is written, in its order, against a real server."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import ratchet
from tests.fake_upstream import FakeUpstream, Received, Reply, chat
from tests.served import RATCHET, Served, served

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Every command line of the `sh` blocks, continuation lines joined, comments gone."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    split = (shlex.split(line, comments=True) for line in lines)
    return [words for words in split if words]


def obedient(request: Received) -> Reply:
    """A model that knows one capital well, and answers with the bare name only when it is told to."""
    body = request.json
    system, question = body["messages"][0]["content"], body["messages"][-1]["content"]
    country = question.removeprefix("Capital of ").removesuffix("?")
    capital = CAPITALS[country]
    return chat(capital if "ONLY" in system else f"The capital of {country} is {capital}, of course.")


def _capitals() -> dict[str, str]:
    import json

    rows = map(json.loads, (ROOT / "examples/capital_city/tasks.jsonl").read_text().splitlines())
    return {row["country"]: row["expected"] if isinstance(row["expected"], str) else row["expected"][0] for row in rows}


CAPITALS = _capitals()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with (
        FakeUpstream(default=obedient) as upstream,
        served(tmp_path_factory.mktemp("readme") / "data", upstream.url) as running,
    ):
        yield running


def test_every_command_named_in_the_readme_exists() -> None:
    named = {words[1] for words in commands() if words[0] == "ratchet"}
    assert named <= set(ratchet.COMMANDS)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made = {words[1] for words in commands() if words[0] == "make"}
    assert made == {"demo", "test"}
    assert made <= targets


@pytest.mark.timeout(600)
def test_the_tour_runs_as_written(server: Served, tmp_path: Path) -> None:
    """`python` is the test's own, and its agents, a hundred, import a light client in place of the SDK."""
    light = str(ROOT / "tests/clients/light")
    environment = server.environment(RATCHET_URL=server.url, RATCHET_DATA_DIR=str(server.data_dir), PYTHONPATH=light)
    tour = [words for words in commands() if words[0] == "ratchet" and words[1] != "serve"]
    assert len(tour) >= 7
    tasks = tmp_path / "tasks.jsonl"
    lines = (ROOT / "examples/capital_city/tasks.jsonl").read_text().splitlines(keepends=True)
    tasks.write_text("".join(lines[:20]))  # the same tasks, fewer of them
    for words in tour:
        replaced = {"python": sys.executable, "examples/capital_city/tasks.jsonl": str(tasks)}
        line = [*RATCHET, *(replaced.get(word, word) for word in words[1:])]
        done = subprocess.run(line, capture_output=True, text=True, timeout=400, check=False, env=environment, cwd=ROOT)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    (live,) = server.client.slots()
    assert live["slot"] == "capital"
    assert live["live"] == {"1": 1.0}, "the tour ends with a rollback"
    assert live["versions"] == 2


def test_the_reward_is_taken_as_the_readme_posts_it(server: Served) -> None:
    (words,) = [words for words in commands() if words[0] == "curl"]
    assert words[2] == "http://127.0.0.1:4000/reward"
    answer = httpx.post(
        f"{server.url}/reward", content=words[words.index("-d") + 1], headers={"content-type": "application/json"}
    )
    assert answer.status_code == 202
    assert answer.json()["reward_id"]


def test_the_python_lines_run_as_written(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    code = code.replace('"Hello"', '"Capital of France?"')
    environment = {**server.environment(), "PATH": os.environ["PATH"]}
    line = [sys.executable, "-c", f"{code}\nprint(answer.choices[0].message.content)"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert "Paris" in done.stdout, done.stderr
