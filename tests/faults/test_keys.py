"""Keys made and revoked while two workers serve: who has none is refused, and no file ever holds the secret."""

import json
import time
from pathlib import Path

import httpx

from tests.fake_upstream import FakeUpstream, Received, Reply, json_reply
from tests.faults import processes
from tests.patience import within
from tests.served import Served, run_ratchet, served

BODY = {"model": "fake-model", "messages": [{"role": "user", "content": "Capital of France?"}]}


def call(server: Served, key: str | None) -> httpx.Response:
    """One call over a connection of its own, so that any worker may get it."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{server.url}/v1/chat/completions", json=BODY, headers=headers)


def everywhere(server: Served, key: str | None, status: int) -> float:
    """Until each worker answers the key so; how long that took."""
    began = time.monotonic()

    def answered() -> None:
        processes.until(lambda: call(server, key).status_code == status, 60, f"a worker answers {status}")

    processes.on_each_worker(server.process.pid, answered)
    return time.monotonic() - began


def test_a_key_is_needed_once_one_exists_and_a_revoked_one_is_refused_within_a_second(tmp_path: Path) -> None:
    with FakeUpstream() as upstream, served(tmp_path / "data", upstream.url, "--workers", "2") as server:
        assert call(server, None).status_code == 200
        where = ("--url", server.url)
        printed = run_ratchet("keys", "create", "bot", *where)
        assert printed.returncode == 0, printed.stderr
        assert "first key" in printed.stdout
        first = next(word for word in printed.stdout.split() if word.startswith("sk-rt-"))
        everywhere(server, None, 401)
        second = json.loads(run_ratchet("keys", "create", "other", "--scope", "agent", "--json", *where).stdout)
        everywhere(server, second["key"], 200)
        answer = call(server, first)
        assert answer.status_code == 200
        assert upstream.requests[-1].headers.get("authorization") is None

        revoked = run_ratchet("keys", "revoke", "bot", *where)
        assert revoked.returncode == 0, revoked.stderr
        assert everywhere(server, first, 401) < within(1.0)
        assert call(server, second["key"]).status_code == 200

        listed = json.loads(run_ratchet("keys", "list", "--json", *where).stdout)
        assert [(key["name"], key["revoked_ns"] is None) for key in listed["keys"]] == [("bot", False), ("other", True)]
        assert run_ratchet("keys", "revoke", "nobody", *where).returncode == 1
        assert run_ratchet("keys", "create", "x", "--scope", "root", *where).returncode == 2
        server.client.flush()
        spans = server.client.query("SELECT attributes FROM spans_v WHERE attributes IS NOT NULL", limit=1000)["rows"]
        found = {json.loads(text)["key"] for (text,) in spans}
        assert found == {listed["keys"][0]["key_id"], second["key_id"]}
        log = server.log
    held = [path for path in (*(tmp_path / "data").rglob("*"), log) if path.is_file()]
    secrets = (first.encode(), second["key"].encode())
    assert not [path for path in held for secret in secrets if secret in path.read_bytes()]


def test_a_limit_is_the_servers_and_not_each_workers(tmp_path: Path) -> None:
    with FakeUpstream() as upstream, served(tmp_path / "data", upstream.url, "--workers", "2") as server:
        made = server.client.create_key("bot", limits={"tokens_total": 100})
        everywhere(server, None, 401)
        upstream.forget()  # who asked before the key was known was let through
        answers = [call(server, made["key"]) for _ in range(20)]
        statuses = [answer.status_code for answer in answers]
        assert statuses == [200] * 8 + [429] * 12, "fourteen tokens a call, whichever worker got it"
        assert answers[-1].json()["error"]["code"] == "budget_exceeded"
        server.client.flush()
        of_the_key = f"attributes LIKE '%{made['key_id']}%'"
        sql = f"SELECT http_status, count(*) FROM spans_v WHERE {of_the_key} GROUP BY 1 ORDER BY 1"
        rows = server.client.query(sql)["rows"]
        assert rows == [[200, 8], [429, 12]]
        assert len(upstream.requests) == 8


def test_a_conversation_is_one_episode_whichever_worker_has_it(tmp_path: Path) -> None:
    def answer(request: Received) -> Reply:
        number = len(upstream.requests)
        text = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": f"{number}"}]}
        return json_reply({"id": f"resp_{number}", "object": "response", "status": "completed", "output": [text]})

    with FakeUpstream(answer) as upstream, served(tmp_path / "data", upstream.url, "--workers", "2") as server:
        for way in ("previous_response_id", "conversation"):
            episodes, last = set(), None
            for turn in range(12):
                body: dict[str, object] = {"model": "m", "input": f"{way} {turn}"}
                if way == "conversation":
                    body["conversation"] = {"id": "conv_1"}
                elif last is not None:
                    body["previous_response_id"] = last
                reply = httpx.post(f"{server.url}/v1/responses", json=body)
                last = reply.json()["id"]
                episodes.add(reply.headers["x-ratchet-episode"])
            assert len(episodes) == 1
