"""`ratchet run`, `ratchet optimize apo` and `ratchet jobs` as a user types them, through a real server."""

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fake_upstream import FakeUpstream, Received, Reply, chat, error_reply
from tests.served import RATCHET, Served, run_ratchet, served
from tests.unit.optimize.world import AGENT, script

TASKS = [{"id": f"t{n}", "question": f"Say {n}.", "expected": str(n)} for n in range(100, 130)]


def model(request: Received) -> Reply:
    """Says the number alone when the prompt asks for ONLY the answer, else with words around it. It takes its time in a
    search that is to be cancelled, which must not be over before."""
    system, user = (message["content"] for message in request.json["messages"])
    number = re.findall(r"\d+", user)[-1]
    if "broken" in user:
        return error_reply(500)
    reply = chat(number if "ONLY" in system else f"The number is {number}, I think.")
    return replace(reply, parts=(1.0, *reply.parts)) if "cancelled" in system else reply


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream(default=model) as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, upstream: FakeUpstream) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("run") / "data", upstream.url) as running:
        yield running


def tasks(tmp_path: Path, rows: list[dict[str, Any]] = TASKS) -> str:
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "tasks.jsonl"


def ratchet(server: Served, tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_ratchet(*words, env=server.environment(RATCHET_URL=server.url), cwd=tmp_path)


def episodes(server: Served) -> dict[str, dict[str, Any]]:
    server.client.flush()
    return {row["episode_id"]: row for row in server.client.episodes(limit=500)["episodes"]}


def test_run_makes_one_rewarded_episode_a_task(server: Served, tmp_path: Path) -> None:
    words = ["run", "--tasks", tasks(tmp_path), "--grader", "contains", "--json", "--", *script(tmp_path)]
    done = ratchet(server, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["n"], answer["failed"], answer["mean"]) == (30, 0, 1.0)
    assert (answer["calls"], answer["input_tokens"]) == (30, 330)
    assert {rollout["reward"] for rollout in answer["rollouts"]} == {1.0}
    stored = episodes(server)
    made = [stored[rollout["episode_id"]] for rollout in answer["rollouts"]]
    assert [(row["steps"], row["reward"]) for row in made] == [(1, 1.0)] * 30


def test_run_counts_failures_and_says_why(server: Served, tmp_path: Path) -> None:
    rows = [*TASKS[:3], {"id": "bad", "question": "broken 1", "expected": "1"}]
    done = ratchet(
        server, tmp_path, "run", "--tasks", tasks(tmp_path, rows), "--grader", "contains", "--", *script(tmp_path)
    )
    assert done.returncode == 1
    assert "failed: crash" in done.stdout
    assert "bad: crash" in done.stderr
    assert "0.750" in done.stdout


def test_run_pins_the_version_that_is_asked_for(server: Served, tmp_path: Path, upstream: FakeUpstream) -> None:
    client = server.client
    client.add_version("pinned", kind="prompt", template="You are a helper.")
    client.add_version("pinned", kind="prompt", template="Output ONLY the number.")
    common = ["run", "--tasks", tasks(tmp_path, TASKS[:2]), "--grader", "exact", "--json", "--slot", "pinned"]
    live = json.loads(ratchet(server, tmp_path, *common, "--", *script(tmp_path)).stdout)
    second = json.loads(ratchet(server, tmp_path, *common, "--version", "2", "--", *script(tmp_path)).stdout)
    assert (live["mean"], second["mean"]) == (0.0, 1.0)
    stored = episodes(server)
    assert [stored[rollout["episode_id"]]["prompt_version"] for rollout in second["rollouts"]] == [2, 2]
    missing = ratchet(server, tmp_path, *common, "--version", "9", "--", *script(tmp_path))
    assert missing.returncode == 1


def test_an_agents_own_reward_counts(server: Served, tmp_path: Path) -> None:
    own = (
        AGENT
        + "post(os.environ['RATCHET_URL'] + '/reward', {'episode_id': os.environ['RATCHET_EPISODE'], 'value': 0.25})\n"
    )
    words = ["run", "--tasks", tasks(tmp_path, TASKS[:4]), "--grader", "exact", "--json"]
    answer = json.loads(ratchet(server, tmp_path, *words, "--", *script(tmp_path, own)).stdout)
    assert [rollout["reward"] for rollout in answer["rollouts"]] == [0.25] * 4
    server.client.flush()
    rewards = server.client.query("select value from rewards_v where value = 0.25")
    assert rewards["rows"] == [[0.25]] * 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--tasks", "none.jsonl", "--", "python3"], "cannot read"),
        (["run", "--tasks", "tasks.jsonl", "--grader", "fuzzy", "--", "python3"], "known are"),
        (["run", "--tasks", "tasks.jsonl", "--", "/no/such/agent"], "no program"),
        (["run", "--tasks", "tasks.jsonl", "--version", "2", "--", "python3"], "--slot"),
        (["optimize", "apo", "--slot", "s", "--tasks", "tasks.jsonl", "--holdout", "x", "--", "python3"], "--holdout"),
        (["optimize", "apo", "--slot", "s", "--tasks", "tasks.jsonl", "--holdout", "9.5", "--", "python3"], "held-out"),
        (["optimize", "apo", "--slot", "s", "--tasks", "tasks.jsonl", "--engine", "x", "--", "python3"], "no engine"),
        (["optimize", "apo", "--slot", "a b", "--tasks", "tasks.jsonl", "--", "python3"], "slot name"),
        (["run", "--slot", "searched", "--tasks", "tasks.jsonl", "--", "python3"], "no version yet"),
    ],
)
def test_bad_input_exits_2_and_names_it(server: Served, tmp_path: Path, words: list[str], said: str) -> None:
    tasks(tmp_path)
    server.client.add_candidate("searched", "Be brief.")
    done = ratchet(server, tmp_path, *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert not done.stdout


def test_without_a_server_the_way_to_one_is_shown(tmp_path: Path) -> None:
    env = {**os.environ, "RATCHET_URL": "http://127.0.0.1:1"}
    done = run_ratchet("run", "--tasks", tasks(tmp_path), "--", "python3", "x.py", env=env, cwd=tmp_path)
    assert done.returncode == 1
    assert "start one with `ratchet serve`" in done.stderr


def agent(tmp_path: Path, name: str) -> list[str]:
    """An agent with a prompt of its own, since the prompts of a server's slots are told apart by their text."""
    return script(tmp_path, AGENT.replace("You are a helper.", f"You are the {name} helper."))


def apo(tmp_path: Path, slot: str) -> list[str]:
    how = ["--slot", slot, "--tasks", tasks(tmp_path), "--grader", "exact", "--budget", "40", "--holdout", "12"]
    how += ["--concurrency", "8"]
    return ["optimize", "apo", *how, "--json", "--", *agent(tmp_path, slot)]


def test_the_whole_loop_from_an_unknown_agent_to_a_live_better_prompt(
    server: Served, tmp_path: Path, upstream: FakeUpstream
) -> None:
    client = server.client
    calls, spans = len(upstream.requests), count_spans(server)
    done = ratchet(server, tmp_path, *apo(tmp_path, "looped"))
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["verdict"], answer["promoted"], answer["version"]) == ("promote", True, 2)
    assert (answer["holdout"]["before"], answer["holdout"]["after"], answer["holdout"]["n"]) == (0.0, 1.0, 12)
    assert answer["seed_template"] == "You are the looped helper."
    assert Path(answer["report"]).is_file()
    assert Path(answer["report"]).is_relative_to(server.data_dir)
    assert "held-out test" in done.stderr

    log = [(entry["action"], entry["evidence"], entry["job_id"]) for entry in client.deployments("looped")]
    assert log[-1] == ("promote", "gate", answer["job_id"])
    client.flush()
    events = client.evaluations(answer["job_id"])
    assert Counter(event["arm"] for event in events)["search"] <= 40
    assert answer["rollouts"] == len(events)
    assert count_spans(server) - spans == len(upstream.requests) - calls == len(events) + 2  # two to learn its prompt
    hashes = {event["episode_id"]: f"c-{event['version_hash']}" for event in events}
    rows = client.query("select episode_id, prompt_slot, prompt_candidate from spans_v")["rows"]
    injected = {episode: candidate for episode, slot, candidate in rows if slot == "looped"}
    assert injected == hashes  # every rollout got the prompt that it was paid for
    shown = json.loads(ratchet(server, tmp_path, "jobs", "show", answer["job_id"], "--json").stdout)
    assert shown["status"] == "done"

    words = ["run", "--tasks", tasks(tmp_path), "--grader", "exact", "--json", "--", *agent(tmp_path, "looped")]
    after = ratchet(server, tmp_path, *words)
    assert json.loads(after.stdout)["mean"] == 1.0  # the same agent, nothing pinned


def count_spans(server: Served) -> int:
    server.client.flush()
    return int(server.client.query("select count(*) from spans_v")["rows"][0][0])


def paid(server: Served, slot: str) -> list[dict[str, Any]]:
    server.client.flush()
    return [event for event in server.client.evaluations() if event["slot"] == slot]


def started(server: Served, tmp_path: Path, slot: str, rollouts: int) -> tuple["subprocess.Popen[str]", str]:
    """A search of its own process, once it has paid for that many rollouts; and its job."""
    env = server.environment(RATCHET_URL=server.url)
    words = [*RATCHET, *apo(tmp_path, slot)]
    process = subprocess.Popen(
        words, env=env, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 100
    while len(events := paid(server, slot)) < rollouts:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < until
    return process, events[0]["job_id"]


def test_a_search_killed_with_9_is_resumed_and_pays_for_nothing_twice(server: Served, tmp_path: Path) -> None:
    process, job = started(server, tmp_path, "killed", 10)
    process.kill()
    process.communicate()
    before = paid(server, "killed")
    assert len(before) < 64
    done = ratchet(server, tmp_path, "jobs", "resume", job, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["job_id"], answer["verdict"]) == (job, "promote")
    after = paid(server, "killed")
    keys = Counter((event["version_hash"], event["task_id"], event["replicate"]) for event in after)
    assert set(keys.values()) == {1}
    assert [event["evaluation_id"] for event in after[: len(before)]] == [event["evaluation_id"] for event in before]
    assert Counter(event["arm"] for event in after)["search"] <= 40
    again = ratchet(server, tmp_path, "jobs", "resume", job)
    assert again.returncode == 2
    assert "is done" in again.stderr


def agents_of(pattern: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and pattern in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_search_leaves_no_agent_running(server: Served, tmp_path: Path, number: signal.Signals) -> None:
    process, job = started(server, tmp_path, number.name, 6)
    process.send_signal(number)
    _, said = process.communicate(timeout=100)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], said
    assert not agents_of(str(tmp_path / "agent.py"))
    client = server.client
    client.flush()
    assert client.job(job)["status"] == "cancelled"


def test_a_search_is_cancelled_from_elsewhere(server: Served, tmp_path: Path) -> None:
    process, job = started(server, tmp_path, "cancelled", 6)
    done = ratchet(server, tmp_path, "jobs", "cancel", job)
    assert done.returncode == 0, done.stderr
    _, said = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "was cancelled" in said
    listed = json.loads(ratchet(server, tmp_path, "jobs", "list", "--json").stdout)["jobs"]
    assert [row["status"] for row in listed if row["job_id"] == job] == ["cancelled"]
