import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.errors import BadInput
from optimize.dataset import Task, load_tasks, make_task, split


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_tasks_keep_their_order_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    tasks = load_tasks(written(tmp_path, '{"id": "b", "x": 1}', "", "   ", '{"id": 7, "group": "g"}', ""))
    assert [(task.id, task.group) for task in tasks] == [("b", "b"), ("7", "g")]
    assert tasks[0].data == {"id": "b", "x": 1}


def test_a_line_separator_inside_a_string_does_not_break_the_line(tmp_path: Path) -> None:
    assert load_tasks(written(tmp_path, '{"id": "a", "text": "one\u2028two"}'))[0].data["text"] == "one\u2028two"


def test_a_task_without_id_is_named_by_its_content_whatever_the_order_of_its_keys() -> None:
    assert make_task({"a": 1, "b": 2}).id == make_task({"b": 2, "a": 1}).id != make_task({"a": 2, "b": 2}).id


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"id": 1}', "{oops"], "line 2 is not JSON"),
        (['{"id": 1}', "", "[1, 2]"], "line 3 must be a JSON object, not list"),
        (['{"id": "x"}', '{"id": "y"}', '{"id": "x"}'], "line 3: the id 'x' was used in line 1"),
        (["", ""], "holds no task"),
    ],
)
def test_a_bad_file_is_refused_with_the_line_that_is_wrong(tmp_path: Path, lines: list[str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        load_tasks(written(tmp_path, *lines))


def test_a_missing_file_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read"):
        load_tasks(tmp_path / "none.jsonl")


def test_expected_falls_back_to_answer() -> None:
    assert make_task({"expected": ["a"], "answer": "b"}).expected == ["a"]
    assert make_task({"answer": "b"}).expected == "b"
    assert make_task({"question": "?"}).expected is None


def test_the_agent_gets_the_task_as_one_line() -> None:
    line = make_task({"text": "a\nb", "name": "São Tomé"}).json
    assert "\n" not in line
    assert json.loads(line) == {"text": "a\nb", "name": "São Tomé"}


@given(
    groups=st.lists(st.integers(0, 12), min_size=2, max_size=60).filter(lambda drawn: len(set(drawn)) > 1),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 1000),
)
def test_a_split_loses_no_task_and_never_cuts_a_group(groups: list[int], share: float, seed: int) -> None:
    tasks = [Task(str(index), {}, str(group)) for index, group in enumerate(groups)]
    search, held = split(tasks, share, seed)
    assert sorted([*search, *held], key=lambda task: int(task.id)) == tasks
    assert search
    assert held
    assert not {task.group for task in search} & {task.group for task in held}
    again = split(list(reversed(tasks)), share, seed)
    assert {task.id for task in again[1]} == {task.id for task in held}


@given(count=st.integers(2, 80), seed=st.integers(0, 50), data=st.data())
def test_a_split_by_count_holds_out_exactly_that_many_single_tasks(count: int, seed: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, count - 1))
    tasks = [make_task({"id": str(index)}) for index in range(count)]
    assert len(split(tasks, wanted, seed)[1]) == wanted


def test_another_seed_draws_other_tasks() -> None:
    tasks = [make_task({"id": index}) for index in range(50)]
    assert {task.id for task in split(tasks, 20, 1)[1]} != {task.id for task in split(tasks, 20, 2)[1]}


@pytest.mark.parametrize("holdout", [0, 5, 9, 0.0, 1.0, float("nan"), -1])
def test_a_split_that_leaves_a_side_empty_is_refused(holdout: float) -> None:
    with pytest.raises(BadInput):
        split([make_task({"id": index}) for index in range(5)], holdout)


def test_one_group_cannot_be_split() -> None:
    with pytest.raises(BadInput, match="cannot be split"):
        split([Task(str(index), {}, "same") for index in range(9)], 0.4)
