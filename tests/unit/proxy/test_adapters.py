"""Adapter versions through a real worker: the model's name is what is swapped, per episode."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fake_upstream import FakeUpstream
from tests.unit.proxy.harness import Registry, Worker, worker


def lora(registry: Registry, *arms: dict[str, float], match: dict[str, str] | None = None) -> None:
    versions = [
        {"version": number, "base_model": "gemma", "path": f"a{number}", "hash": f"{number}" * 12} for number in (1, 2)
    ]
    registry.slots["lora"] = {"kind": "adapter", "match": match or {}, "versions": versions}
    for one in arms:
        registry.promote("lora", one)


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


def ask(proxy: Worker, model: str = "gemma", scope: str = "", **more: Any) -> httpx.Response:
    body = {"big": 12345678901234567890123, "model": model, "messages": [{"role": "user", "content": model}], **more}
    return proxy.client.post(f"{proxy.root}{scope}/v1/chat/completions", content=json.dumps(body).encode())


def test_calls_for_the_base_model_ask_for_the_version_in_force_and_say_so(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    registry = Registry()
    lora(registry, {"1": 1.0})
    with worker(tmp_path, upstream.url, registry) as proxy:
        got = ask(proxy)
        assert got.headers["x-ratchet-versions"] == "lora@1"
        sent = upstream.requests[-1].body
        assert sent == json.dumps(json.loads(sent) | {"model": "lora@1-111111111111"}).encode()
        assert b"12345678901234567890123" in sent
        span = proxy.span(count=1)
        assert (span["adapter_slot"], span["adapter_version"], span["propensity"]) == ("lora", 1, 1.0)
        assert (span["request_model"], span["prompt_slot"]) == ("gemma", None)
        assert ask(proxy, "other").headers["x-ratchet-versions"] == ""
        assert upstream.requests[-1].json["model"] == "other"


def test_a_version_that_is_not_promoted_is_served_only_where_it_is_pinned(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    registry = Registry()
    lora(registry)
    with worker(tmp_path, upstream.url, registry) as proxy:
        assert ask(proxy).headers["x-ratchet-versions"] == ""
        assert upstream.requests[-1].json["model"] == "gemma"
        assert ask(proxy, scope="/e/e1/with/lora@2").headers["x-ratchet-versions"] == "lora@2"
        assert upstream.requests[-1].json["model"] == "lora@2-222222222222"
        missing = ask(proxy, scope="/e/e1/with/lora@7")
        assert missing.status_code == 404 and "it has 1, 2" in missing.json()["error"]["message"]


def test_an_episode_keeps_its_adapter_and_its_prompt_when_both_are_swapped(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    registry = Registry()
    lora(registry, {"1": 1.0})
    registry.add("geo", "Old.", "New.")
    system = [{"role": "system", "content": "Old."}, {"role": "user", "content": "hi"}]
    with worker(tmp_path, upstream.url, registry) as proxy:
        before = ask(proxy, scope="/e/one", messages=system)
        registry.promote("lora", {"2": 0.5, "1": 0.5})
        registry.promote("geo", {"2": 1.0})
        proxy.catch_up()
        assert before.headers["x-ratchet-versions"] == "geo@1,lora@1"
        assert ask(proxy, scope="/e/one", messages=system).headers["x-ratchet-versions"] == "geo@1,lora@1"
        dealt = {ask(proxy, scope=f"/e/new-{n}", messages=system).headers["x-ratchet-versions"] for n in range(20)}
        assert dealt == {"geo@2,lora@1", "geo@2,lora@2"}
        assert {span["propensity"] for span in proxy.spans[2:]} == {0.5}


def test_a_slot_may_be_for_a_model_by_another_name(upstream: FakeUpstream, tmp_path: Path) -> None:
    registry = Registry()
    lora(registry, {"1": 1.0}, match={"model": "fast"})
    with worker(tmp_path, upstream.url, registry) as proxy:
        assert ask(proxy, "fast").headers["x-ratchet-versions"] == "lora@1"
        assert ask(proxy, "gemma").headers["x-ratchet-versions"] == ""


def test_an_engine_of_the_configuration_is_where_its_model_is_sent(upstream: FakeUpstream, tmp_path: Path) -> None:
    engine = {"api_base": upstream.url, "base_model": "gemma", "api_key": "engine-key"}
    registry = Registry()
    lora(registry, {"1": 1.0})
    with worker(tmp_path, "http://127.0.0.1:9/v1", registry, engines=[engine]) as proxy:
        assert ask(proxy).status_code == 200
        assert upstream.requests[-1].json["model"] == "lora@1-111111111111"
        assert upstream.requests[-1].headers["authorization"] == "Bearer engine-key"
