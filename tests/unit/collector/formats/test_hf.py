"""The folders that `ratchet export --format hf` writes are opened by `datasets` and pass TRL's own checks."""

import json
from pathlib import Path
from typing import Any

import pytest

from collector.errors import NotFound
from collector.formats import hf
from tests.unit.collector.formats.world import ASKED, FIRST, SECOND, chat, filled, opened, reward
from tests.unit.collector.rows import write


def episodes(data_dir: Path) -> list[dict[str, Any]]:
    local = opened(data_dir)
    found: list[dict[str, Any]] = local.export(500)["episodes"]
    local.close()
    return found


def load(folder: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(folder / "cache"))


@pytest.fixture
def judged(tmp_path: Path) -> list[dict[str, Any]]:
    """The same question answered well and badly, in plain words; and one episode with a tool."""
    question = [{"role": "user", "content": "Capital of France?"}]
    other = [{"role": "user", "content": [{"type": "text", "text": "Capital of Peru?"}]}]
    write(
        tmp_path,
        chat(1, question, {"role": "assistant", "content": "Paris"}, episode_id="good"),
        chat(2, question, {"role": "assistant", "content": "Lyon"}, episode_id="bad"),
        chat(3, question, {"role": "assistant", "content": "Nice"}, episode_id="unjudged"),
        chat(4, other, {"role": "assistant", "content": "Lima"}, episode_id="same-1"),
        chat(5, other, {"role": "assistant", "content": "Lima"}, episode_id="same-2"),
        chat(6, question, {"role": "assistant", "content": "x"}, episode_id="failed", status="error"),
        reward(1, "episode", "good", 1.0),
        reward(2, "episode", "bad", 0.0),
        reward(3, "episode", "same-1", 1.0),
        reward(4, "episode", "same-2", 0.0),
    )
    return episodes(tmp_path)


def test_preferences_are_the_best_against_the_worst_of_one_prompt(tmp_path: Path, judged: list[dict[str, Any]]) -> None:
    count, left = hf.write(tmp_path / "out", judged, "preference")
    (row,) = load(tmp_path / "out")
    assert count == 1
    assert (row["prompt"], row["chosen"], row["rejected"]) == (
        [{"role": "user", "content": "Capital of France?"}],
        [{"role": "assistant", "content": "Paris"}],
        [{"role": "assistant", "content": "Lyon"}],
    )
    assert (row["reward_chosen"], row["reward_rejected"]) == (1.0, 0.0)
    assert left == {"no reward": 2, "no difference": 1}


def test_prompt_and_completion_are_a_row_a_call_and_failures_are_counted(
    tmp_path: Path, judged: list[dict[str, Any]]
) -> None:
    count, left = hf.write(tmp_path / "out", judged, "prompt-completion")
    rows = {row["episode_id"]: row for row in load(tmp_path / "out")}
    assert (count, len(rows), left) == (5, 5, {"failed": 1})
    assert rows["same-1"]["prompt"] == [{"role": "user", "content": "Capital of Peru?"}]
    assert (rows["good"]["reward"], rows["unjudged"]["reward"]) == (1.0, None)


def test_a_conversation_is_one_row_and_its_tools_come_along(tmp_path: Path) -> None:
    found = [one for one in episodes(filled(tmp_path / "data")) if one["episode_id"] == "ep-t"]
    assert hf.write(tmp_path / "sft", found, "sft")[0] == 1
    (row,) = load(tmp_path / "sft")
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert row["messages"][2]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    hf.write(tmp_path / "trajectory", found, "trajectory")
    (row,) = load(tmp_path / "trajectory")
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert [message["role"] for message in row["completion"]] == ["assistant", "tool", "assistant"]
    assert [step["span_id"] for step in json.loads(row["steps"])] == [f"{10:016x}", f"{11:016x}"]
    assert row["reward"] == 1.0
    assert (ASKED, FIRST, len(SECOND)) == (SECOND[:2], SECOND[2], 4)


def test_a_call_with_an_image_is_left_out_and_counted(tmp_path: Path) -> None:
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
    write(tmp_path, chat(1, image, {"role": "assistant", "content": "a cat"}))
    with pytest.raises(NotFound, match="1 not text"):
        hf.write(tmp_path / "out", episodes(tmp_path), "sft")


@pytest.mark.parametrize(
    ("form", "columns"), [("sft", "messages"), ("preference", "chosen"), ("prompt-completion", "completion")]
)
def test_trl_knows_each_form_as_conversational(
    tmp_path: Path, judged: list[dict[str, Any]], form: hf.Form, columns: str
) -> None:
    utils = pytest.importorskip("trl.data_utils")
    hf.write(tmp_path / "out", judged, form)
    rows = load(tmp_path / "out")
    assert columns in rows.column_names
    assert all(utils.is_conversational(row) for row in rows)
    assert all(set(message) == {"role", "content"} for message in rows[0][columns])
