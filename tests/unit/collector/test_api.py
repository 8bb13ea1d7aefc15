import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest

from collector import api
from collector.service import Collector
from tests.unit.collector.rows import call, settings, write
from tests.unit.collector.serving import served


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    data_dir = tmp_path_factory.mktemp("data")
    write(data_dir, call(1), call(2))
    collector = Collector(settings(data_dir))
    with served(collector) as transport, httpx.Client(transport=transport, base_url="http://c", timeout=40) as http:
        yield http, collector
    collector.close()


@pytest.fixture
def http(world: Any) -> httpx.Client:
    client: httpx.Client = world[0]
    return client


def test_versions_and_deployments(http: httpx.Client) -> None:
    made = http.post(
        "/api/slots/capital/versions", json={"kind": "prompt", "template": "a", "match": {"role": "system"}}
    )
    assert (made.status_code, made.json()["version"]) == (201, 1)
    assert set(made.json()) == {"slot", "version", "hash"}
    http.post("/api/slots/capital/versions", json={"kind": "prompt", "template": "b", "parent": 1, "note": "n"})
    assert [row["live"] for row in http.get("/api/slots/capital/versions").json()["versions"]] == [1.0, 0.0]
    assert http.get("/api/slots/capital/versions/2").json()["note"] == "n"
    promoted = http.post("/api/slots/capital/promote", json={"version": 2, "traffic": 1.0})
    assert promoted.status_code == 200
    revision = promoted.json()["revision"]
    back = http.post("/api/slots/capital/rollback")
    assert back.json() == {"revision": revision + 1}
    again = http.post("/api/slots/capital/rollback", json={"note": "once more"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")
    log = http.get("/api/slots/capital/deployments").json()["deployments"]
    assert [row["evidence"] for row in log] == ["initial", "manual", "manual"]


def test_candidates(http: httpx.Client) -> None:
    made = http.post("/api/slots/cand/candidates", json={"template": "try"})
    assert made.status_code == 201
    candidate = made.json()["candidate"]
    assert http.get(f"/api/slots/cand/candidates/{candidate}").json()["template"] == "try"
    assert http.get("/api/slots/cand/candidates/c-none").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", "/api/slots/a b/versions", {"template": "x"}, 422, "slot"),
        ("POST", "/api/slots/a/versions", {"template": "x", "colour": 1}, 422, "colour"),
        ("POST", "/api/slots/a/versions", {"kind": "song"}, 422, "kind"),
        ("POST", "/api/slots/a/versions", {"template": "x", "match": {"role": "judge"}}, 422, "match.role"),
        ("POST", "/api/slots/none/promote", {"version": 1}, 404, "slot"),
        ("POST", "/api/slots/none/promote", {"version": "x"}, 422, "version"),
        ("POST", "/api/slots/none/promote", {"version": True}, 422, "version"),
        ("POST", "/api/slots/none/promote", {"version": 1, "traffic": 0}, 422, "traffic"),
        ("POST", "/api/slots/none/promote", {"version": 1, "traffic": True}, 422, "traffic"),
        ("POST", "/api/slots/none/candidates", {}, 422, "template"),
        ("GET", "/api/episodes?limit=501", None, 422, "limit"),
        ("GET", "/api/episodes?status=odd", None, 422, "status"),
        ("GET", "/api/episodes?cursor=odd", None, 422, "cursor"),
        ("GET", "/api/episodes/none", None, 404, "episode_id"),
        ("GET", "/api/jobs/none", None, 404, "job_id"),
        ("POST", "/api/query", {"sql": "DROP TABLE spans"}, 400, "sql"),
        ("POST", "/api/query", {"sql": "SELECT 1", "limit": 0}, 422, "limit"),
        ("POST", "/api/events", [{"event": "job"}], 422, "[0].job_id"),
        ("POST", "/reward", {"episode_id": "e", "value": "x"}, 422, "value"),
        ("POST", "/reward", [{"episode_id": "e", "value": 1}, {"value": 1}], 422, "[1].episode_id"),
        ("GET", "/api/nothing", None, 404, None),
        ("DELETE", "/api/slots", None, 405, None),
    ],
)
def test_mistakes_are_answered_in_the_envelope(
    http: httpx.Client, method: str, path: str, body: Any, status: int, param: str | None
) -> None:
    answer = http.request(method, path, json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("ratchet_error", param)


@pytest.mark.parametrize("path", ["/reward", "/api/events", "/api/query", "/api/slots/a/versions"])
def test_what_is_not_json_is_told_so(http: httpx.Client, path: str) -> None:
    answer = http.post(path, content=b'{"value": NaN', headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "body")


def test_a_reward_that_is_no_number_names_its_field(http: httpx.Client) -> None:
    answer = http.post("/reward", content=b'{"episode_id": "e", "value": NaN}')
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "value")


def test_bodies_are_bounded(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_BODY_BYTES", 1 << 20)
    for path in ("/reward", "/api/slots/a/versions"):
        answer = http.post(path, content=b'"' + b"x" * (2 << 20) + b'"', headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_rewards_are_accepted_and_repeated_ones_are_the_same(http: httpx.Client) -> None:
    body = {"response_id": "chatcmpl-1", "value": 1, "idempotency_key": "k"}
    first, second = http.post("/reward", json=body), http.post("/reward", json=[body])
    assert (first.status_code, second.status_code) == (202, 202)
    assert [first.json()] == second.json()
    assert http.post("/api/flush").json()["pending"] == 0
    episode = http.get("/api/episodes/ep-a").json()
    assert episode["reward"] == 1.0
    assert episode["steps"][0]["rewards"][0]["reward_id"] == first.json()["reward_id"]
    http.post("/reward", json={"episode_id": "nobody", "value": 1})
    http.post("/api/flush")
    assert [row["target_id"] for row in http.get("/api/rewards/unmatched").json()["rewards"]] == ["nobody"]


def test_reading(http: httpx.Client) -> None:
    page = http.get("/api/episodes", params={"limit": 1, "max_reward": 5}).json()
    assert set(page) == {"episodes", "next"}
    assert [row["span_id"] for row in http.get("/api/spans").json()["spans"]] == [f"{2:016x}", f"{1:016x}"]
    assert http.get("/api/episodes/ep-a/otlp").json()["resourceSpans"]
    assert http.get("/api/stats").json()["spans"] == 2
    assert http.get("/api/identity").json()["data_dir"]
    assert http.get("/api/openapi.json").json()["paths"]["/api/query"]["post"]["requestBody"]


def test_queries_answer_in_json_or_arrow(http: httpx.Client) -> None:
    body = {"sql": "SELECT span_id, step FROM spans_v ORDER BY step", "limit": 1}
    answer = http.post("/api/query", json=body).json()
    assert answer == {"columns": ["span_id", "step"], "rows": [[f"{1:016x}", 0]], "truncated": True}
    arrow = http.post("/api/query", json=body, headers={"accept": "application/vnd.apache.arrow.stream"})
    assert arrow.headers["x-ratchet-truncated"] == "true"
    with pa.ipc.open_stream(arrow.content) as reader:
        assert reader.read_all().to_pylist() == [{"span_id": f"{1:016x}", "step": 0}]


def test_jobs_and_evaluations_by_events(http: httpx.Client) -> None:
    job = {"event": "job", "job_id": "j", "kind": "apo", "status": "running", "spec": "{}", "ts_ns": 1}
    evaluation = {
        "event": "evaluation",
        "evaluation_id": "e",
        "job_id": "j",
        "slot": "s",
        "version_hash": "h",
        "task_id": "t",
        "ok": False,
        "reason": "timeout",
        "answer": "the key is sk-abcdefgh12345678",
        "ts_ns": 1,
    }
    answer = http.post("/api/events", json=[job, evaluation])
    assert (answer.status_code, answer.json()) == (202, {"accepted": 2})
    http.post("/api/flush")
    shown = http.get("/api/jobs/j").json()
    assert (shown["status"], shown["spec"], shown["result"]) == ("running", {}, None)
    assert len(http.get("/api/jobs").json()["jobs"]) == 1
    (row,) = http.get("/api/evaluations", params={"job_id": "j"}).json()["evaluations"]
    assert (row["reason"], row["reward"]) == ("timeout", None)
    assert row["answer"] == "the key is [redacted]"


def poll(http: httpx.Client, **params: Any) -> tuple[dict[str, Any], float]:
    begin = time.monotonic()
    answer = http.get("/api/deployments", params=params)
    return answer.json(), time.monotonic() - begin


def test_a_poll_answers_at_once_when_the_caller_is_behind_or_asks_for_nothing(http: httpx.Client) -> None:
    snapshot, _ = poll(http)
    for params in ({"after": snapshot["revision"] + 7}, {"after": snapshot["revision"], "serial": -1}):
        found, seconds = poll(http, **params)
        assert found == snapshot
        assert seconds < 5


def test_a_poll_waits_as_long_as_asked(http: httpx.Client) -> None:
    snapshot, _ = poll(http)
    found, seconds = poll(http, after=snapshot["revision"], serial=snapshot["serial"], timeout=0.2)
    assert found == snapshot
    assert seconds >= 0.2


def test_a_poll_answers_as_soon_as_something_changes(http: httpx.Client, world: Any) -> None:
    collector: Collector = world[1]
    before, _ = poll(http)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(poll, http, after=before["revision"])
        while not collector._listeners:
            time.sleep(0.005)
        http.post("/api/slots/polled/versions", json={"template": "a"})
        after, seconds = waiting.result(20)
    assert after["revision"] == before["revision"] + 1
    assert seconds < 10
    assert collector._listeners == []


def test_stopping_does_not_wait_for_polls(tmp_path: Path) -> None:
    collector = Collector(settings(tmp_path))
    done: list[dict[str, Any]] = []
    with served(collector) as transport:
        http = httpx.Client(transport=transport, base_url="http://c", timeout=40)
        thread = threading.Thread(target=lambda: done.append(poll(http, after=0)[0]))
        thread.start()
        while not collector._listeners:
            time.sleep(0.005)
        begin = time.monotonic()
    thread.join(10)
    http.close()
    collector.close()
    assert done[0]["revision"] == 0
    assert time.monotonic() - begin < 10


def test_what_was_not_foreseen_is_answered_in_the_envelope_and_logged(
    http: httpx.Client, world: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def crash() -> Any:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(world[1], "slots", crash)
    answer = http.get("/api/slots")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert any("GET /api/slots failed" in record.message for record in caplog.records)
