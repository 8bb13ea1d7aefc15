"""`ratchet optimize apo` in its further modes, as a user types it, through a real server: replay, engines, budgets."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from collector.client import Local
from optimize.api import APO, PromptTemplate, Trainer, rollout
from tests.fake_upstream import FakeUpstream, Received, Reply, chat, error_reply
from tests.faults import processes
from tests.served import RATCHET, Served, run_ratchet, served
from tests.unit.optimize.world import script

SEED = "You are a helper."
TASKS = [{"id": f"t{n}", "question": f"Say {n}.", "expected": str(n)} for n in range(100, 130)]
CONFIG = "optimizer: {model: editor}\n"


def model(request: Received) -> Reply:
    """Says the number alone when the prompt asks for CURTLY; the editor, called by the same name, asks for it."""
    body = request.json
    texts = [message["content"] for message in body["messages"]]
    if body["model"] == "editor":
        if "Which weaknesses" in texts[-1]:
            return chat("It is too wordy.")
        held = SEED if SEED in texts[-1] else ""
        return chat(f"```\n{held} Answer CURTLY with the number and stop.\n```")
    number = re.findall(r"\d+", texts[-1])[-1]
    return chat(number if "CURTLY" in texts[0] else f"The number is {number}, I think.")


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream(default=model) as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, upstream: FakeUpstream) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("optimize")
    (folder / "ratchet.yaml").write_text(CONFIG)
    with served(folder / "data", upstream.url, config=folder / "ratchet.yaml") as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ratchet.yaml").write_text(CONFIG)
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TASKS))
    return tmp_path


def ratchet(server: Served, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    config = str(folder / "ratchet.yaml")
    return run_ratchet(*words, env=server.environment(RATCHET_URL=server.url, RATCHET_CONFIG=config), cwd=folder)


def ask(server: Served, episode: str, messages: list[dict[str, str]], **body: Any) -> str:
    url = f"{server.url}/e/{episode}/v1/chat/completions"
    answer = httpx.post(url, json={"model": "m", "messages": messages, **body}, timeout=30).raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


def traffic(server: Served, slot: str, seed: str, steps: int) -> None:
    """30 episodes of an agent under `seed`, some judged by what the right answer would have been."""
    server.client.add_version(slot, kind="prompt", template=seed)
    processes.until(lambda: httpx.get(f"{server.url}/readyz").status_code == 200, 60, "the worker knows the slot")
    for number in range(100, 130):
        messages = [{"role": "system", "content": seed}, {"role": "user", "content": f"Say {number}."}]
        for step in range(steps):
            said = ask(server, f"{slot}-{number}", messages, metadata={"expected": str(number)} if step == 0 else {})
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": f"Again {number}."}]
    server.client.flush()


def test_logged_requests_are_enough_to_find_and_prove_a_better_prompt(server: Served, folder: Path) -> None:
    traffic(server, "single", "You are a helper. Be kind.", 1)
    words = ["--slot", "single", "--replay", "--grader", "exact", "--budget", "60", "--holdout", "12", "--json"]
    done = ratchet(server, folder, "optimize", "apo", *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["verdict"], result["promoted"]) == ("promote", True)
    assert "CURTLY" in result["best_template"]
    assert (result["holdout"]["before"], result["holdout"]["after"]) == (0.0, 1.0)
    assert result["notes"] == []
    server.client.flush()
    sent = [row for row in server.client.episodes(limit=500)["episodes"] if row["episode_id"].startswith("run-")]
    assert len(sent) == result["rollouts"]
    live = next(version for version in server.client.versions("single") if version["live"])
    assert live["template"] == result["best_template"]


def test_episodes_of_several_steps_are_refused_and_told_why_unless_forced(server: Served, folder: Path) -> None:
    traffic(server, "double", "You are a double helper.", 2)
    words = ["optimize", "apo", "--slot", "double", "--replay", "--grader", "exact", "--budget", "40"]
    refused = ratchet(server, folder, *words)
    assert refused.returncode == 2
    said = " ".join(refused.stderr.split())
    assert "several calls" in said
    assert "depended on it" in said
    assert "--force" in said
    forced = ratchet(server, folder, *words, "--force", "--json")
    assert forced.returncode in (0, 1), forced.stderr
    (note,) = [note for note in json.loads(forced.stdout)["notes"] if "several calls" in note]
    assert "read the result as a hint" in note


def test_what_replay_cannot_do_is_said_before_anything_is_paid(server: Served, folder: Path) -> None:
    nobody = ratchet(server, folder, "optimize", "apo", "--slot", "nobody", "--replay", "--grader", "exact")
    assert (nobody.returncode, "no call under the slot" in " ".join(nobody.stderr.split())) == (2, True)
    ungraded = ratchet(server, folder, "optimize", "apo", "--slot", "single", "--replay")
    assert (ungraded.returncode, "needs --grader" in " ".join(ungraded.stderr.split())) == (2, True)
    ray = ratchet(server, folder, "optimize", "apo", "--slot", "s", "--replay", "--grader", "exact", "--runner", "ray")
    assert (ray.returncode, "one machine" in " ".join(ray.stderr.split())) == (2, True)


@pytest.mark.parametrize("engine", ["beam", "gepa"])
def test_a_search_by_whole_prompts_killed_with_9_is_resumed_and_pays_for_nothing_twice(
    server: Served, folder: Path, engine: str
) -> None:
    slot = f"kill-{engine}"
    words = ["optimize", "apo", "--slot", slot, "--engine", engine, "--param", "beam_width=2", "--param"]
    words += ["branch_factor=2", "--tasks", "tasks.jsonl", "--grader", "exact", "--budget", "60", "--holdout", "10"]
    # Not promoted: the next slot's agent has the same prompt, and would be served the better one from the start.
    words += ["--concurrency", "2", "--promote", "never", "--json", "--", *script(folder)]
    config = str(folder / "ratchet.yaml")
    env = server.environment(RATCHET_URL=server.url, RATCHET_CONFIG=config)
    process = subprocess.Popen([*RATCHET, *words], env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        job_id, paid = _until_paid(server, slot, 15, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert paid >= 15
    done = ratchet(server, folder, "jobs", "resume", job_id, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert (result["verdict"], "CURTLY" in result["best_template"]) == ("promote", True)
    events = server.client.evaluations(job_id)
    keys = Counter((event["version_hash"], event["task_id"], event["replicate"]) for event in events)
    assert set(keys.values()) == {1}
    assert Counter(event["arm"] for event in events)["search"] <= 60


def _until_paid(server: Served, slot: str, count: int, process: "subprocess.Popen[bytes]") -> tuple[str, int]:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        server.client.flush()
        paid = [event for event in server.client.evaluations() if event["slot"] == slot]
        if len(paid) >= count:
            return str(paid[0]["job_id"]), len(paid)
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.05)
    raise AssertionError(f"{len(paid)} rollouts in a minute")


def test_a_token_budget_holds_for_rollouts_edits_and_the_test_together(server: Served, folder: Path) -> None:
    words = ["optimize", "apo", "--slot", "tokens", "--budget-tokens", "900", "--tasks", "tasks.jsonl", "--grader"]
    done = ratchet(server, folder, *words, "exact", "--holdout", "10", "--json", "--", *script(folder))
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(done.stdout)
    events = server.client.evaluations(result["job_id"])
    server.client.flush()
    spans = server.client.spans(200, episode_id=f"{result['job_id']}-editor")["spans"]
    counts = [(one["input_tokens"] or 0) + (one["output_tokens"] or 0) for one in [*events, *spans]]
    assert 300 < sum(counts) <= 900
    unpriced = ratchet(server, folder, *words[:4], "--budget-usd", "1", *words[6:], "exact", "--", *script(folder))
    assert (unpriced.returncode, "cannot be held" in " ".join(unpriced.stderr.split())) == (2, True)


def test_an_upstream_that_stumbles_is_not_the_prompts_fault(
    server: Served, upstream: FakeUpstream, folder: Path
) -> None:
    server.client.add_version("stumble", kind="prompt", template=SEED)
    for status in (503, 429):
        upstream.reply(error_reply(status))
    words = ["optimize", "apo", "--slot", "stumble", "--tasks", "tasks.jsonl", "--grader", "exact", "--budget", "20"]
    done = ratchet(server, folder, *words, "--concurrency", "1", "--json", "--", *script(folder))
    assert done.returncode in (0, 1), done.stderr
    assert all(event["ok"] for event in server.client.evaluations(json.loads(done.stdout)["job_id"]))


def test_a_script_beside_a_running_server_writes_into_its_store(server: Served) -> None:
    @rollout
    async def agent(task: dict[str, Any], prompt_template: PromptTemplate) -> float:
        return float("ONLY" in str(prompt_template))

    trainer = Trainer(APO(budget=40), {"prompt_template": PromptTemplate("Help.")}, data_dir=server.data_dir)
    result = trainer.fit(agent, TASKS)
    assert result.verdict == "promote"
    server.client.flush()
    sql = "select count(*) from spans_v where operation = 'invoke_agent' and prompt_slot = 'agent-prompt_template'"
    assert server.client.query(sql)["rows"] == [[result.details["rollouts"]]]
    assert server.client.job(result.details["job_id"])["status"] == "done"


def test_a_script_killed_with_9_pays_for_nothing_twice_when_run_again(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, "script.py"]
    env = {**os.environ, "RATCHET_DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(words, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = tmp_path / "calls.log"
    deadline = time.monotonic() + 100
    while not (log.is_file() and len(log.read_text().splitlines()) >= 25):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0].decode()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    store = Local(tmp_path / "data")
    before = len(store.evaluations())
    store.close()
    calls = len(log.read_text().splitlines())
    assert calls - 2 <= before <= calls  # two at once: what was under way is lost, what was settled is not
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert "verdict promote" in done.stdout, done.stdout + done.stderr
    store = Local(tmp_path / "data")
    events = store.evaluations()
    store.close()
    assert len(log.read_text().splitlines()) == calls + len(events) - before
    keys = Counter((event["version_hash"], event["task_id"], event["replicate"]) for event in events)
    assert set(keys.values()) == {1}


SCRIPT = """
import asyncio
from optimize.api import APO, PromptTemplate, Trainer, rollout

@rollout
async def agent(task, prompt_template):
    await asyncio.sleep(0.05)
    with open("calls.log", "a") as log:
        log.write(prompt_template.format(**task).replace(chr(10), " ") + chr(10))
    return float("ONLY" in str(prompt_template))

resources = {"prompt_template": PromptTemplate("Help with {question}")}
trainer = Trainer(APO(budget=60), resources, n_runners=2)
print("verdict", trainer.fit(agent, [{"question": str(number)} for number in range(40)]).verdict)
"""
