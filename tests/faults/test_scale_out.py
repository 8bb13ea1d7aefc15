"""Two hosts feed one collector: outages, kill -9 of either side, a restart and a promotion, with traffic under way."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from collector.errors import Unavailable
from tests.fake_upstream import FakeUpstream
from tests.faults import processes
from tests.faults.processes import until
from tests.faults.traffic import Traffic
from tests.patience import within
from tests.served import Served, served
from tests.unit.collector.days import write_day
from tests.unit.collector.rows import call as row
from tests.wire import Wire, wire

KEY = "the-hub-key-of-this-test"
CONFIGS = Path(__file__).parents[2] / "configs"
BACKLOG = int(os.environ.get("RATCHET_BACKLOG", "150"))  # segments; an hour of a busy worker is 3,600


@dataclass
class Net:
    """A collector and two hosts; between them a wire that can be cut."""

    folder: Path
    upstream: FakeUpstream
    wire: Wire
    hub: Served
    hosts: list[Served]
    _hub: contextlib.ExitStack

    def restart_hub(self) -> None:
        """End it in order, and start it again, on another port."""
        self.wire.cut()
        self._hub.close()
        self.hub = self._hub.enter_context(serve_hub(self.folder, self.upstream))

    def rows(self, sql: str) -> list[list[object]]:
        """Of the collector's store, once all hosts have sent what they have."""
        for host in self.hosts:
            until(lambda host=host: sent(host), 120 + BACKLOG / 10, "the host's journal is sent and loaded")  # type: ignore[misc]
        answer = keyed(self.hub, "POST", "/api/query", {"sql": sql, "limit": 1_000_000})
        return list(answer["rows"])


def sent(host: Served) -> bool:
    try:
        return bool(host.client.flush()["pending"] == 0)
    except Unavailable:  # the collector was killed a moment ago
        return False


def keyed(server: Served, method: str, path: str, body: object = None) -> dict[str, list[list[object]]]:
    answer = httpx.request(method, server.url + path, json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=60)
    assert answer.is_success, answer.text
    return dict(answer.json())


@contextlib.contextmanager
def serve_hub(folder: Path, upstream: FakeUpstream) -> Iterator[Served]:
    config = CONFIGS / "compose-collector.yaml"
    environ = {"RATCHET_COLLECTOR_KEY": KEY, "RATCHET_STORE_URL": ""}
    with served(folder / "hub", upstream.url, "--host", "127.0.0.1", config=config, **environ) as server:
        yield server


@contextlib.contextmanager
def serve_host(folder: Path, name: str, upstream: FakeUpstream, wire: Wire) -> Iterator[Served]:
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump({"store": {"collector": wire.url, "collector_key": KEY}}))
    with served(folder / name, upstream.url, config=config) as server:
        yield server


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    folder = tmp_path_factory.mktemp("net")
    with FakeUpstream() as upstream, wire() as between, contextlib.ExitStack() as hub, contextlib.ExitStack() as hosts:
        first = hub.enter_context(serve_hub(folder, upstream))
        between.join(first.url)
        two = [hosts.enter_context(serve_host(folder, name, upstream, between)) for name in ("a", "b")]
        yield Net(folder, upstream, between, first, two, hub)


def say(host: Served, system: str = "Be brief.") -> httpx.Response:
    """A call that begins an episode."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": f"{time.monotonic_ns()}?"}]
    body = {"model": "fake-model", "messages": messages}
    return httpx.post(f"{host.url}/v1/chat/completions", json=body, timeout=60)


def get(url: str) -> httpx.Response:
    return httpx.get(url, timeout=60)


def test_a_promotion_reaches_every_host_within_a_second(net: Net) -> None:
    first, second = net.hosts
    assert first.client.add_version("tone", template="Be brief.")["version"] == 1
    assert second.client.add_version("tone", template="Be kind.")["version"] == 2, "one registry, whoever is asked"
    for host in net.hosts:
        until(lambda host=host: say(host).headers.get("x-ratchet-versions") == "tone@1", 60, "version 1 is known")  # type: ignore[misc]
    for version in (2, 1, 2):
        first.client.promote("tone", version)
        for host in net.hosts:
            wanted = f"tone@{version}"
            took = until(lambda h=host, w=wanted: say(h).headers["x-ratchet-versions"] == w, 60, "it is promoted")  # type: ignore[misc]
            assert took < within(1.0)
    assert b"Be kind." in net.upstream.requests[-1].body


def test_an_outage_loses_and_doubles_nothing_whoever_is_killed(net: Net) -> None:
    traffics = [Traffic(host.url) for host in net.hosts]
    for traffic in traffics:
        traffic.start(clients=2)
    try:
        more(traffics, 10)
        net.wire.cut()
        more(traffics, 10)
        first, second = net.hosts
        away = get(f"{first.url}/api/episodes")
        assert (away.status_code, away.json()["error"]["code"]) == (503, "collector_away")
        assert get(f"{first.url}/healthz").status_code == 200
        until(lambda: get(f"{second.url}/healthz").json()["backlog"]["segments"] > 0, 60, "the backlog is shown")
        planted = plant(first.data_dir, BACKLOG)
        net.restart_hub()
        more(traffics, 10)
        net.wire.cut_after = 10_000  # breaks a connection in the middle of a segment
        net.wire.join(net.hub.url)
        until(lambda: keyed(net.hub, "GET", "/api/stats")["inbox"]["segments"] > 20, 60, "the backlog arrives")  # type: ignore[call-overload]
        strike(net.hub, "collector")
        strike(first, "collector")
        until(
            lambda: len(list((first.data_dir / "journal").glob("*.ndjson"))) < BACKLOG // 2,
            120 + BACKLOG / 10,
            "it goes on",
        )
        strike(net.hub, "collector")
        more(traffics, 10)
    finally:
        for traffic in traffics:
            traffic.stop()
    stored = [span for (span,) in net.rows("SELECT span_id FROM spans")]
    assert len(stored) == len(set(stored)), "no span twice"
    assert set(stored) >= planted | traffics[0].spans | traffics[1].spans
    rewards = [reward for (reward,) in net.rows("SELECT reward_id FROM rewards")]
    assert len(rewards) == len(set(rewards)), "no reward twice"
    assert set(rewards) >= traffics[0].rewards | traffics[1].rewards
    assert sum(traffic.refused for traffic in traffics) == 0, "every call was answered"
    for host in net.hosts:
        assert get(f"{host.url}/healthz").json()["backlog"]["refused"] == 0


def test_a_host_that_starts_in_an_outage_serves_the_last_versions(net: Net) -> None:
    net.wire.join(net.hub.url)
    with serve_host(net.folder, "c", net.upstream, net.wire) as third:
        until(lambda: say(third).headers.get("x-ratchet-versions") == "tone@2", 60, "the promoted version is served")
    net.wire.cut()
    with serve_host(net.folder, "c", net.upstream, net.wire) as third:
        answer = say(third)
        assert answer.headers["x-ratchet-versions"] == "tone@2"
        target = {"span_id": answer.headers["x-ratchet-span"], "value": 1.0}
        assert httpx.post(f"{third.url}/reward", json=target, timeout=60).status_code == 202
        net.wire.join(net.hub.url)
        until(lambda: get(f"{third.url}/readyz").status_code == 200, 60, "it is ready when the collector is back")
    net.rows("SELECT 1")
    found = net.rows(f"SELECT count(*) FROM rewards_v WHERE span_id = '{answer.headers['x-ratchet-span']}'")
    assert found == [[1]], "what was left was sent before the end"


def more(traffics: list[Traffic], calls: int) -> None:
    """Until each has that many more calls acknowledged."""
    for traffic in traffics:
        wanted = len(traffic.spans) + calls
        until(lambda t=traffic, w=wanted: len(t.spans) >= w, 120, "calls are answered")  # type: ignore[misc]


def plant(data_dir: Path, segments: int) -> set[str]:
    """What an outage leaves behind, without the wait: sealed segments of a call each; their span ids."""
    calls = [row(0xABC0000 + number, episode_id=f"old-{number}") for number in range(segments)]
    for one in calls:
        write_day(data_dir, 0, one, role="worker0")
    return {one.span_id for one in calls}


def strike(server: Served, module: str) -> None:
    """kill -9 of a child."""
    for pid in processes.find(server.process.pid, module):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
