import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.errors import BadInput
from collector.settings import Optimizer
from optimize.dataset import make_task
from optimize.grade import GradeError, check_tasks, grader, read_score

PARIS = make_task({"id": "france", "country": "France", "expected": "Paris"})
LIST = make_task({"id": "ukraine", "expected": ["Kyiv", "Kiev"]})
NOTHING = make_task({"id": "x", "question": "?"})


@pytest.mark.parametrize(
    ("spec", "answer", "score"),
    [
        ("exact", " Paris\n", 1.0),
        ("exact", "paris", 0.0),
        ("exact", "Paris.", 0.0),
        ("contains", "It is Paris, of course.", 1.0),
        ("contains", "It is Lyon.", 0.0),
        ("regex:^{expected}$", "Paris", 1.0),
        ("regex:^{expected}$", "Parisian", 0.0),
        ("regex:\\d{4}", "in 1999", 1.0),
        ("json:capital", '{"capital": "Paris"}', 1.0),
        ("json:capital", '{"capital": "Lyon"}', 0.0),
        ("json:capital", "Paris", 0.0),
        ("json:capital", '["Paris"]', 0.0),
        ("json:a.b=3", '{"a": {"b": 3}}', 1.0),
        ("json:a.b=3", '{"a": 3}', 0.0),
    ],
)
def test_graders_score_what_they_say(spec: str, answer: str, score: float) -> None:
    assert grader(spec)(PARIS, answer) == score


def test_a_list_of_expected_answers_accepts_any_of_them() -> None:
    assert [grader("exact")(LIST, text) for text in ("Kyiv", "Kiev", "Odesa")] == [1.0, 1.0, 0.0]


@given(st.text(min_size=1, max_size=20))
def test_a_field_in_a_pattern_is_matched_as_text_not_as_a_pattern(value: str) -> None:
    assert grader("regex:^(?:{expected})$")(make_task({"expected": value, "id": 1}), value) == 1.0


def test_a_task_with_nothing_to_compare_is_a_grader_failure_not_a_zero() -> None:
    with pytest.raises(GradeError, match="neither"):
        grader("exact")(NOTHING, "x")


def test_tasks_are_checked_before_anything_is_paid() -> None:
    check_tasks("exact", [PARIS, LIST])
    check_tasks("json:key=1", [NOTHING])
    for spec in ("exact", "contains", "json:key"):
        with pytest.raises(BadInput, match="'x' has none"):
            check_tasks(spec, [PARIS, NOTHING])


@pytest.mark.parametrize("spec", ["", "fuzzy", "exact:1", "regex:", "python:", "judge", "json:"])
def test_an_unknown_grader_is_refused_with_the_list_of_known_ones(spec: str) -> None:
    with pytest.raises(BadInput, match=r"known are: exact, contains, regex:PATTERN"):
        grader(spec)


def test_a_broken_pattern_is_refused_at_once() -> None:
    with pytest.raises(BadInput, match="pattern"):
        grader("regex:(")


@pytest.fixture
def user_grader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "ratchet_test_user_grader"
    (tmp_path / f"{name}.py").write_text(
        "def half(task, answer): return 0.5 if answer == task['expected'] else None\n"
        "def boom(task, answer): raise KeyError('colour')\n"
        "def nan(task, answer): return float('nan')\n"
        "def word(task, answer): return 'good'\n"
        "constant = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield name
    sys.path[:] = path
    sys.modules.pop(name, None)


def test_a_function_of_the_user_is_imported_from_the_current_directory(user_grader: str) -> None:
    grade = grader(f"python:{user_grader}.half")
    assert grade(PARIS, "Paris") == 0.5
    assert grade(PARIS, "Lyon") is None


@pytest.mark.parametrize(
    ("function", "said"), [("boom", "raised KeyError"), ("nan", "not finite"), ("word", "not a number")]
)
def test_a_function_that_breaks_is_a_grader_failure_with_its_reason(user_grader: str, function: str, said: str) -> None:
    with pytest.raises(GradeError, match=said):
        grader(f"python:{user_grader}.{function}")(PARIS, "Paris")


@pytest.mark.parametrize("path", ["{}.none", "{}.constant", "no_such_module_here.f", "bare"])
def test_a_function_that_cannot_be_imported_is_bad_input(user_grader: str, path: str) -> None:
    with pytest.raises(BadInput):
        grader(f"python:{path.format(user_grader)}")


@pytest.mark.parametrize(
    "reply", ["good", "{}", '{"score": 2}', '{"score": "1"}', '{"score": true}', '{"score": NaN}', "[1]", "null"]
)
def test_a_judge_must_answer_in_strict_json(reply: str) -> None:
    with pytest.raises(GradeError):
        read_score(reply)


@pytest.fixture
def judge() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append({**body, "key": self.headers["authorization"]})
            content = json.dumps({"choices": [{"message": {"content": '{"score": 0.25, "reason": "partly"}'}}]})
            self.send_response(200 if body["model"] == "good" else 500)
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
        server.shutdown()


def test_a_judge_is_asked_over_http_and_its_score_is_the_reward(judge: tuple[str, list[dict[str, Any]]]) -> None:
    base, seen = judge
    assert grader("judge:good", Optimizer(api_base=base, api_key="k"))(PARIS, "Lutetia") == 0.25
    assert seen[0]["key"] == "Bearer k"
    assert "Lutetia" in seen[0]["messages"][1]["content"]


def test_a_judge_that_fails_is_a_grader_failure(judge: tuple[str, list[dict[str, Any]]]) -> None:
    with pytest.raises(GradeError, match="did not answer"):
        grader("judge:bad", Optimizer(api_base=judge[0]))(PARIS, "Paris")
