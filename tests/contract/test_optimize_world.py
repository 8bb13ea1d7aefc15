"""A simulated world once through the whole path: `ratchet serve` in front of a scripted model, an unmodified agent as a
process a task, a scripted editor behind the same proxy, and `ratchet optimize apo`. What it reports can be checked
against the truth, since the world's is known."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from optimize.dataset import Task
from optimize.evaluation import Request
from tests.fake_upstream import FakeUpstream, Received, Reply, chat
from tests.served import run_ratchet, served
from tests.unit.optimize.world import AGENT, script
from tests.worlds import SEED_PROMPT, SPECS, World

BUDGET, HELD = 120, 40
CONFIG = "optimizer: {model: editor}\n"


class Upstream:
    """The model that the agent calls, and the editor that reads what the optimizer writes."""

    def __init__(self, world: World) -> None:
        self.world, self.rng = world, np.random.default_rng(world.seed)
        self.asked: Counter[tuple[str, str]] = Counter()
        self.edits = 0

    def __call__(self, request: Received) -> Reply:
        messages = [message["content"] for message in request.json["messages"]]
        if request.json["model"] == "editor":
            return chat(self._edit(messages[-1]))
        return chat(self._answer(messages[0], messages[-1]))

    def _answer(self, template: str, task: str) -> str:
        self.asked[template, task] += 1
        request = Request(template, Task(task, {}, task), self.asked[template, task])
        return self.world.outcome(request).answer

    def _edit(self, text: str) -> str:
        self.edits += 1
        prompt = text.split("----")[1]
        units = []
        for number, task in re.findall(r'^\[(\d+)\]\ntask: .*"question": ?"(\w+)"', text, re.MULTILINE):
            missing = [rule for rule in self.world.needs[task] if self.world.rules[rule] not in prompt]
            wrong = not missing or self.rng.random() > self.world.spec.hit
            rule = self.rng.integers(10, len(self.world.rules)) if wrong else self.rng.choice(missing)
            units.append({"op": "add", "text": self.world.rules[rule], "failures": [int(number)]})
        return json.dumps(units)


def test_a_world_behind_the_proxy_is_searched_as_it_is_in_process_and_what_is_reported_is_true(tmp_path: Path) -> None:
    world = World(SPECS["clean"], 1)
    upstream = Upstream(world)
    (tmp_path / "ratchet.yaml").write_text(CONFIG)
    rows = [{"id": task.id, "question": task.id, "expected": "yes"} for task in world.tasks]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    agent = script(tmp_path, AGENT.replace("You are a helper.", SEED_PROMPT))
    words = ["optimize", "apo", "--slot", "world", "--tasks", "tasks.jsonl", "--grader", "exact", "--budget"]
    words += [str(BUDGET), "--holdout", str(HELD), "--json", "--", *agent]
    with (
        FakeUpstream(default=upstream) as running,
        served(tmp_path / "data", running.url, config=tmp_path / "ratchet.yaml") as server,
    ):
        env = server.environment(RATCHET_URL=server.url, RATCHET_CONFIG=str(tmp_path / "ratchet.yaml"))
        done = run_ratchet(*words, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        result = json.loads(done.stdout)
        arms = Counter(event["arm"] for event in server.client.evaluations(result["job_id"]))
    assert result["verdict"] == "promote"
    assert world.score(result["best_template"]) > 0.4
    assert upstream.edits > 1
    assert arms["search"] <= BUDGET
    true = [
        world.success(world.present(result["best_template"]), pair["task_id"])
        - world.success(frozenset(), pair["task_id"])
        for pair in result["pairs"]
    ]
    low, high = result["holdout"]["ci95"]
    assert len(true) == HELD
    assert low <= float(np.mean(true)) <= high
