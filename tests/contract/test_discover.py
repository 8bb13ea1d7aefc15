"""From unknown prompts to a slot, against a real server: what is adopted is recognised, and changes nothing."""

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.fake_upstream import FakeUpstream
from tests.served import Served, run_ratchet, served
from tests.unit.proxy.harness import wait_for


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture(scope="module")
def server(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("discover") / "data", upstream.url) as running:
        yield running


def ask(server: Served, city: str) -> httpx.Response:
    prompt = f"You are a guide to {city}.\nAnswer in {len(city)} words, and only about {city}."
    body = {"model": "m", "messages": [{"role": "system", "content": prompt}, {"role": "user", "content": "Where to?"}]}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body)


def test_a_mined_template_is_adopted_and_the_next_calls_are_recognised(server: Served, upstream: FakeUpstream) -> None:
    for city in ("Paris", "Rome", "Lima", "Oslo", "New York"):
        assert ask(server, city).headers["x-ratchet-versions"] == ""
    server.client.flush()
    flags = ("--url", server.url, "--json")
    found = json.loads(run_ratchet("slots", "discover", *flags).stdout)
    best = next(one for one in found["proposals"] if one["role"] == "system")
    assert best["template"] == "You are a guide to {value}.\nAnswer in {number} words, and only about {value}."
    assert (best["calls"], found["calls"]) == (5, 5)

    made = run_ratchet("slots", "adopt", best["proposal"], "--slot", "guide", *flags)
    assert json.loads(made.stdout)["version"] == 1
    wait_for(lambda: ask(server, "Ulan Bator").headers["x-ratchet-versions"] == "guide@1")
    sent = upstream.requests[-1].json["messages"][0]["content"]
    assert sent == "You are a guide to Ulan Bator.\nAnswer in 10 words, and only about Ulan Bator."

    better = "Guide people through {value} in {number} words."
    version = server.client.add_version("guide", template=better)["version"]
    server.client.promote("guide", version)
    wait_for(lambda: ask(server, "Ulan Bator").headers["x-ratchet-versions"] == "guide@2")
    assert upstream.requests[-1].json["messages"][0]["content"] == "Guide people through Ulan Bator in 10 words."
