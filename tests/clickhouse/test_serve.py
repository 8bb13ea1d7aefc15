"""`ratchet serve` on ClickHouse, from the first call to a promotion; and what goes on while ClickHouse is away."""

import json
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import yaml

from collector import bodies
from collector.errors import RatchetError
from collector.service import Collector
from tests.clickhouse.server import PASSWORD, Server, fresh, running
from tests.fake_upstream import FakeUpstream
from tests.served import run_ratchet, served
from tests.unit.collector.rows import call, settings, write
from tests.unit.optimize.world import script

CONFIGS = Path(__file__).parents[2] / "configs"
KEY = "the-hub-key-of-this-test"
TASKS = [{"id": f"t{number}", "question": f"Say {number}.", "expected": str(number)} for number in range(3)]


def test_call_reward_episode_query_promotion_and_run(clickhouse: Server, tmp_path: Path) -> None:
    config = tmp_path / "ratchet.yaml"
    config.write_text(yaml.safe_dump({"store": {"url": clickhouse.url()}}))
    with FakeUpstream() as upstream, served(tmp_path / "data", upstream.url, config=config) as server:
        client = server.client
        (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in TASKS))
        words = ["run", "--tasks", "tasks.jsonl", "--grader", "contains", "--json", "--", *script(tmp_path)]
        done = run_ratchet(*words, env=server.environment(RATCHET_URL=server.url), cwd=tmp_path)
        answer = json.loads(done.stdout)
        assert (answer["n"], answer["failed"]) == (3, 0), done.stderr
        client.flush()
        listed = client.episodes()["episodes"]
        assert len(listed) == 3
        assert all(row["reward"] is not None for row in listed)
        client.reward({"episode_id": listed[0]["episode_id"], "value": 7.0})
        client.flush()
        shown = client.episode(listed[0]["episode_id"])
        assert [one["value"] for one in shown["rewards"]][-1] == 7.0
        assert client.query("SELECT count(*) FROM spans_v")["rows"] == [[len(upstream.requests)]]
        client.add_version("greeting", template="Say hello.")
        client.add_version("greeting", template="Say hello to {name}.")
        assert client.promote("greeting", 2) >= 1
        client.flush()
        versions = client.query("SELECT slot, version FROM versions_v ORDER BY version")["rows"]
        assert versions == [["greeting", 1], ["greeting", 2]]
        stats = client.stats()
        assert (stats["loader"]["errors"], stats["loader"]["quarantined"], stats["rebuilt"]) == (0, 0, 0)
    planted = [path for path in tmp_path.rglob("*") if path.is_file() and path != config]
    for path in planted:
        assert PASSWORD.encode() not in path.read_bytes(), f"the password stands in {path}"


def test_two_hosts_one_collector_and_clickhouse_as_the_compose_file_has_them(
    clickhouse: Server, tmp_path: Path
) -> None:
    hub_config, admin = CONFIGS / "compose-collector.yaml", {"authorization": f"Bearer {KEY}"}
    environ = {"RATCHET_COLLECTOR_KEY": KEY, "RATCHET_STORE_URL": clickhouse.url(fresh())}
    with FakeUpstream() as upstream, ExitStack() as stack:
        hub = stack.enter_context(
            served(tmp_path / "hub", upstream.url, "--host", "127.0.0.1", config=hub_config, **environ)
        )
        hosts = []
        for name in ("a", "b"):
            config = tmp_path / f"{name}.yaml"
            config.write_text(yaml.safe_dump({"store": {"collector": hub.url, "collector_key": KEY}}))
            hosts.append(stack.enter_context(served(tmp_path / name, upstream.url, config=config)))
        episodes = set()
        for host in hosts * 2:
            body = {"model": "m", "messages": [{"role": "user", "content": f"{len(episodes)}?"}]}
            answer = httpx.post(f"{host.url}/v1/chat/completions", json=body, timeout=60)
            episodes.add(answer.headers["x-ratchet-episode"])
            host.client.reward({"episode_id": answer.headers["x-ratchet-episode"], "value": 0.5})
        for host in hosts:
            assert host.client.flush()["pending"] == 0
        sql = "SELECT episode_id, steps, reward FROM episodes_v"
        answer = httpx.post(f"{hub.url}/api/query", json={"sql": sql}, headers=admin, timeout=60)
        assert sorted(answer.json()["rows"]) == [[episode, 1, 0.5] for episode in sorted(episodes)]
        assert len(episodes) == 4


def test_while_clickhouse_is_away_everything_goes_on_and_is_there_afterwards(
    clickhouse: Server, tmp_path: Path
) -> None:
    database = fresh()
    with running(tmp_path / "other") as server:
        store = {"url": server.url(database)}
        collector = Collector(settings(tmp_path / "data", store=store), background=False)
        collector.add_version("s", _prompt("t"))
        collector.close()
        server.stop()
        collector = Collector(settings(tmp_path / "data", store=store), background=False)  # it starts all the same
        assert collector.versions("s")[0]["template"] == "t"
        write(tmp_path / "data", call(1), call(2))
        collector.reward({"episode_id": "ep-a", "value": 1.0})
        collector.add_version("s", _prompt("u"))
        assert collector.promote("s", _promotion(2)) >= 1
        collector.journal.seal()
        collector._loading.catch_up()
        stats = collector.stats()
        assert stats["spans"] is None
        assert "does not answer" in stats["clickhouse"]
        assert PASSWORD not in json.dumps(stats)
        assert stats["loader"]["errors"] > 0
        assert stats["loader"]["lag_s"] > 0
        try:
            collector.episodes()
        except RatchetError as error:
            assert error.status == 503
            assert PASSWORD not in error.message
        else:
            raise AssertionError("episodes were read from nowhere")
        server.start()
        deadline = time.monotonic() + 30
        while collector.flush()["pending"] and time.monotonic() < deadline:
            pass
        (row,) = collector.episodes()["episodes"]
        assert (row["steps"], row["reward"]) == (2, 1.0)
        assert len(collector.query("SELECT version FROM versions_v").json()["rows"]) == 2
        assert collector.stats()["loader"]["lag_s"] == 0
        collector.close()


def _prompt(template: str) -> bodies.VersionBody:
    return bodies.VersionBody(template=template)


def _promotion(version: int) -> bodies.PromoteBody:
    return bodies.PromoteBody(version=version)
