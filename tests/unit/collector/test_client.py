from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from collector.client import Client, Local, Remote, open_client
from collector.errors import BadInput, Conflict, NotFound, QueryError, RatchetError, Unavailable
from collector.service import Collector
from tests.unit.collector.rows import call, settings, write
from tests.unit.collector.serving import served


@pytest.fixture(params=["remote", "local"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    write(tmp_path, call(1), call(2, status="error"), call(3, episode_id="ep:b~"))
    if request.param == "local":
        local = Local(tmp_path, settings(tmp_path))
        yield local
        local.close()
        return
    collector = Collector(settings(tmp_path))
    with served(collector) as transport:
        remote = Remote("http://ratchet", transport=transport)
        yield remote
        remote.close()
    collector.close()


JOB = {"event": "job", "job_id": "j", "kind": "apo", "status": "running", "spec": "{}", "ts_ns": 1}
EVALUATION = {"event": "evaluation", "evaluation_id": "e", "slot": "s", "version_hash": "h", "task_id": "t", "ok": True}


def test_the_registry(client: Client) -> None:
    first = client.add_version("s", template="a", match={"role": "system"})
    assert (first["slot"], first["version"]) == ("s", 1)
    second = client.add_version("s", kind="prompt", template="b", parent=1, job_id="j", metrics={"x": 1}, note="n")
    assert [row["version"] for row in client.versions("s")] == [1, 2]
    assert client.version("s", 2)["hash"] == second["hash"]
    candidate = client.add_candidate("s", "c")
    assert client.candidate("s", candidate) == "c"
    assert client.promote("s", 2, 0.5, evidence="gate", job_id="j", note="why") == 2
    assert client.slots()[0]["live"] == {"2": 0.5, "1": 0.5}
    assert client.rollback("s", note="back") == 3
    assert [row["evidence"] for row in client.deployments("s")] == ["initial", "gate", "manual"]
    assert client.snapshot()["revision"] == 3
    assert client.snapshot(after=2, timeout=5)["revision"] == 3
    assert client.snapshot(after=3, timeout=0.05)["revision"] == 3


def test_reading_what_was_written(client: Client) -> None:
    assert client.flush()["pending"] == 0
    page = client.episodes(limit=1)
    assert [row["episode_id"] for row in page["episodes"]] == ["ep:b~"]
    rest = client.episodes(limit=5, cursor=page["next"], status="error")
    assert [row["episode_id"] for row in rest["episodes"]] == ["ep-a"]
    assert client.episode("ep:b~")["steps"][0]["span_id"] == f"{3:016x}"
    assert [row["span_id"] for row in client.spans(episode_id="ep-a", status="ok")["spans"]] == [f"{1:016x}"]
    assert client.query("SELECT count(*) AS n FROM spans_v", 5) == {"columns": ["n"], "rows": [[3]], "truncated": False}
    assert client.episode_otlp("ep-a")["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["spanId"] == f"{1:016x}"
    assert client.stats()["spans"] == 3


def test_rewards(client: Client) -> None:
    single = client.reward({"episode_id": "ep-a", "value": 1, "idempotency_key": "k"})
    several = client.reward(({"episode_id": "ep-a", "value": 1, "idempotency_key": "k"}, {"span_id": "x", "value": 2}))
    assert several[0] == single
    client.flush()
    assert client.episode("ep-a")["reward"] == 1.0
    assert client.stats()["rewards"] == 2


def test_jobs_and_evaluations(client: Client) -> None:
    client.events([JOB, {**EVALUATION, "job_id": "j", "ts_ns": 5}])
    client.flush()
    assert client.jobs() == [client.job("j")]
    assert [row["evaluation_id"] for row in client.evaluations("j")] == ["e"]
    assert client.evaluations("other") == []


MISTAKES: list[tuple[Callable[[Client], Any], type[RatchetError], str]] = [
    (lambda client: client.versions("none"), NotFound, "slot"),
    (lambda client: client.deployments("none"), NotFound, "slot"),
    (lambda client: client.add_version("s", template="x", colour=1), BadInput, "colour"),
    (lambda client: client.add_version("bad name", template="x"), BadInput, "slot"),
    (lambda client: client.add_candidate("s", ""), BadInput, "template"),
    (lambda client: client.promote("none", 1), NotFound, "slot"),
    (lambda client: client.promote("none", 1, 3.0), BadInput, "traffic"),
    (lambda client: client.episode("none"), NotFound, "episode_id"),
    (lambda client: client.episodes(limit=0), BadInput, "limit"),
    (lambda client: client.query("DROP TABLE spans"), QueryError, "sql"),
    (lambda client: client.job("none"), NotFound, "job_id"),
    (lambda client: client.events([{**JOB, "status": "odd"}]), BadInput, "[0].status"),
    (lambda client: client.reward({"value": 1}), BadInput, "episode_id"),
]


def test_errors_are_of_the_same_class_on_both_sides(client: Client) -> None:
    for ask, kind, param in MISTAKES:
        with pytest.raises(kind) as caught:
            ask(client)
        assert caught.value.param == param


def test_conflicts_cross_the_wire(client: Client) -> None:
    client.add_version("s", template="a")
    with pytest.raises(Conflict, match="nothing to roll back"):
        client.rollback("s")


def test_nobody_there_is_said_in_so_many_words() -> None:
    remote = Remote("http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="is `ratchet serve` running"):
        remote.stats()
    remote.close()


@pytest.mark.parametrize(
    ("answer", "kind", "word"),
    [
        (httpx.Response(200, text="<html>"), Unavailable, "is it a Ratchet server"),
        (httpx.Response(502, text="bad gateway"), Unavailable, "502"),
        (httpx.Response(404, json={"detail": "x"}), Unavailable, "is it a Ratchet server"),
        (httpx.Response(200, json=[1]), Unavailable, "something else"),
        (httpx.Response(401, json={"error": {"message": "no key"}}), RatchetError, "no key"),
    ],
)
def test_somebody_else_there_is_told_apart(answer: httpx.Response, kind: Any, word: str) -> None:
    remote = Remote("http://x", transport=httpx.MockTransport(lambda _: answer))
    with pytest.raises(kind, match=word):
        remote.stats()
    remote.close()


def test_a_slow_server_is_unavailable() -> None:
    def slow(_: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("")

    remote = Remote("http://x", transport=httpx.MockTransport(slow))
    with pytest.raises(Unavailable, match="ReadTimeout"):
        remote.slots()
    remote.close()


def test_the_key_and_the_base_url_are_used() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"slots": []})

    remote = Remote("http://x:1/v1/", "secret", httpx.MockTransport(answer))
    assert remote.slots() == []
    assert str(seen[0].url) == "http://x:1/api/slots"
    assert seen[0].headers["authorization"] == "Bearer secret"
    remote.close()


def test_without_a_server_the_store_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collector.settings.DEFAULT_URL", "http://127.0.0.1:9")
    found = open_client(data_dir=tmp_path, environ={})
    assert isinstance(found, Local)
    with pytest.raises(Conflict, match="a server is using"):
        open_client(environ={"RATCHET_DATA_DIR": str(tmp_path)})
    found.close()


def test_a_server_that_has_the_directory_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json={"data_dir": str(tmp_path.resolve())}))
    real = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **given: real(**{**given, "transport": transport}))
    (tmp_path / "server.json").write_text('{"url": "http://127.0.0.1:1234", "pid": 1}')
    found = open_client(data_dir=tmp_path, environ={"RATCHET_API_KEY": "k"})
    assert isinstance(found, Remote)
    assert found.url == "http://127.0.0.1:1234"
    found.close()
    (tmp_path / "server.json").write_text("{")
    other = open_client(data_dir=tmp_path / "other", environ={})
    assert isinstance(other, Local), "the default port answers for another directory"
    other.close()


def test_a_url_is_taken_at_its_word(tmp_path: Path) -> None:
    for found in (open_client("http://h:1"), open_client(environ={"RATCHET_URL": "http://h:1"})):
        assert isinstance(found, Remote)
        assert found.url == "http://h:1"
        found.close()


def test_a_local_client_leaves_a_store_that_opens_again(tmp_path: Path) -> None:
    for count in (1, 2):
        local = Local(tmp_path, settings(tmp_path))
        local.reward({"episode_id": "e", "value": count})
        assert local.stats()["rewards"] == count
        local.close()
