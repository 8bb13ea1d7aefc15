"""Logged calls as tasks: what is taken, what is left out, and where the right answer comes from."""

import asyncio
import json
from pathlib import Path
from typing import Any, cast

import pytest

from collector.client import Client
from collector.errors import BadInput
from optimize.dataset import make_task
from optimize.logged import LABELS, Logged, gather, load, save

COLUMNS = [
    "span_id",
    "episode_id",
    "steps",
    "reward",
    "prompt_slot",
    "request_model",
    "temperature",
    "top_p",
    "max_tokens",
    "seed",
    "tools",
    "attributes",
    "input_messages",
    "output_messages",
]


def call(number: int, **changes: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Help."}, {"role": "user", "content": f"Say {number}."}]
    row = {
        **dict.fromkeys(COLUMNS),
        "span_id": f"s{number}",
        "episode_id": f"e{number}",
        "steps": 1,
        "prompt_slot": "s",
        "request_model": "m",
        "input_messages": json.dumps(messages),
        "output_messages": json.dumps([{"role": "assistant", "content": f"{number}!"}]),
    }
    return {**row, **changes}


class Store:
    """The two queries of `gather`."""

    def __init__(self, rows: list[dict[str, Any]], labels: dict[str, str] | None = None) -> None:
        self.rows, self.labels = rows, labels or {}

    def query(self, sql: str, limit: int) -> dict[str, Any]:
        if sql == LABELS:
            return {"columns": ["episode_id", "label"], "rows": [list(item) for item in self.labels.items()]}
        return {"columns": COLUMNS, "rows": [[row[name] for name in COLUMNS] for row in self.rows]}


def gathered(rows: list[dict[str, Any]], grader: str = "regex:x", **more: Any) -> Logged:
    labels = more.pop("labels", None)
    return asyncio.run(gather(cast(Client, Store(rows, labels)), "s", grader, **more))


def test_a_request_is_kept_as_it_was_and_the_same_question_is_taken_once() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    first = call(1, temperature=0.5, max_tokens=9, tools=json.dumps(tools))
    again = call(1, input_messages=first["input_messages"].replace("Help.", "Help!"))
    found = gathered([first, again, call(2), call(3, prompt_slot="other")])
    assert [task.data["input"] for task in found.tasks] == ["Say 1.", "Say 2."]
    request = found.tasks[0].request
    assert {name: request[name] for name in ("model", "temperature", "max_tokens", "tools")} == {
        "model": "m",
        "temperature": 0.5,
        "max_tokens": 9,
        "tools": tools,
    }
    assert [message["content"] for message in request["messages"]] == ["Help.", "Say 1."]
    assert "messages" not in found.tasks[0].data


def test_the_right_answer_is_the_tasks_the_requests_a_reviewers_or_the_rewarded_one() -> None:
    metadata = json.dumps({"metadata": {"expected": "from the request"}, "variables": {"tone": "kind"}})
    rows = [
        call(1, episode_id="run-abc-t1-0-0123abcd", reward=1.0, attributes=metadata),
        call(2, reward=1.0, attributes=metadata),
        call(3, episode_id="judged", reward=1.0),
        call(4, reward=1.0),
        call(5, reward=0.5),
        call(6),
    ]
    known = [make_task({"id": "t1", "expected": "from the task"})]
    found = gathered(rows, "exact", known=known, labels={"judged": "from a reviewer"})
    assert [task.expected for task in found.tasks] == ["from the task", "from the request", "from a reviewer", "4!"]
    assert found.tasks[1].data["tone"] == "kind"
    assert found.notes == ("2 calls were left out: nobody said what the right answer would have been",)
    assert len(gathered(rows, "regex:x").tasks) == 6


def test_several_step_episodes_are_left_out_and_with_force_taken_each_call_alone() -> None:
    rows = [call(1), call(2), call(3, steps=3, episode_id="long"), call(4, steps=3, episode_id="long")]
    found = gathered(rows)
    assert len(found.tasks) == 2
    assert "1 episodes with several calls were left out: what the agent did after" in found.notes[0]
    forced = gathered(rows, force=True)
    assert len(forced.tasks) == 4
    assert "read the result as a hint" in forced.notes[0]
    with pytest.raises(BadInput, match="all 1 logged episodes of s have several calls"):
        gathered(rows[2:])


def test_nothing_to_replay_is_said() -> None:
    with pytest.raises(BadInput, match="no call under the slot s"):
        gathered([])
    with pytest.raises(BadInput, match="too few"):
        gathered([call(1)])


def test_the_tasks_are_kept_for_a_resumed_job(tmp_path: Path) -> None:
    found = gathered([call(1), call(2), call(3, steps=2)])
    path = tmp_path / "jobs" / "job.tasks.jsonl"
    assert load(path) is None
    save(found, path)
    assert load(path) == found
