"""Versions through a real worker: matched, injected, sticky, swapped, pinned."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from proxy import metrics
from tests.fake_upstream import FakeUpstream
from tests.unit.proxy.harness import Registry, Worker, worker

OWN = 'You are a geography helper.\nBe "kind".'
BETTER = "Answer with the city only, in {language}."


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture
def proxy(upstream: FakeUpstream, tmp_path: Path) -> Iterator[Worker]:
    registry = Registry()
    registry.add("geo", OWN, "Name the city.")
    registry.add("tutor", "Teach {name} in {language}, please.", "{name}: " + BETTER)
    with worker(tmp_path, upstream.url, registry) as running:
        yield running


def body(prompt: str, role: str = "system", **more: Any) -> bytes:
    messages = [{"role": role, "content": prompt}, {"role": "user", "content": "Capital of France?"}]
    return json.dumps({"model": "m", "messages": messages, "big": 12345678901234567890123, **more}).encode()


def call(proxy: Worker, raw: bytes, scope: str = "", path: str = "chat/completions", **headers: str) -> httpx.Response:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return proxy.client.post(f"{proxy.root}{scope}/v1/{path}", content=raw, headers=given, timeout=20)


def promote(proxy: Worker, slot: str, **arms: float) -> None:
    proxy.registry.promote(slot, {name.removeprefix("v"): share for name, share in arms.items()})
    proxy.catch_up()


def failures(reason: str) -> float:
    return metrics.REGISTRY.get_sample_value("ratchet_inject_failures_total", {"reason": reason}) or 0.0


def test_the_agents_own_text_is_version_one_and_nothing_changes(proxy: Worker, upstream: FakeUpstream) -> None:
    reply = call(proxy, body(OWN))
    assert upstream.requests[0].body == body(OWN)
    assert reply.headers["x-ratchet-versions"] == "geo@1"
    span = proxy.span(count=1)
    assert (span["prompt_slot"], span["prompt_version"], span["propensity"]) == ("geo", 1, 1.0)


def test_a_promoted_version_replaces_that_message_only(proxy: Worker, upstream: FakeUpstream) -> None:
    promote(proxy, "geo", v2=1.0)
    reply = call(proxy, body(OWN))
    assert upstream.requests[0].body == body("Name the city.")
    assert reply.headers["x-ratchet-versions"] == "geo@2"
    assert json.loads(proxy.span(count=1)["input_messages"])[0]["content"] == "Name the city."


@pytest.mark.parametrize("role", ["system", "developer", "user"])
def test_a_template_is_inverted_and_the_other_version_rendered(
    proxy: Worker, upstream: FakeUpstream, role: str
) -> None:
    promote(proxy, "tutor", v2=1.0)
    call(proxy, body("Teach Ada {x} in French, please.", role))
    assert upstream.requests[0].json["messages"][0]["content"] == "Ada {x}: Answer with the city only, in French."
    span = proxy.span(count=1)
    assert json.loads(span["attributes"])["variables"] == {"name": "Ada {x}", "language": "French"}


def test_a_text_part_of_a_message_can_be_the_prompt(proxy: Worker, upstream: FakeUpstream) -> None:
    promote(proxy, "geo", v2=1.0)
    parts = [{"type": "text", "text": OWN, "cache_control": {"type": "ephemeral"}}]
    call(proxy, json.dumps({"messages": [{"role": "system", "content": parts}]}).encode())
    expected = [{"type": "text", "text": "Name the city.", "cache_control": {"type": "ephemeral"}}]
    assert upstream.requests[0].json["messages"][0]["content"] == expected


@pytest.mark.parametrize(
    ("path", "raw", "where"),
    [
        ("responses", {"instructions": OWN, "input": "hi"}, lambda sent: sent["instructions"]),
        ("responses", {"input": [{"role": "developer", "content": OWN}]}, lambda sent: sent["input"][0]["content"]),
        ("messages", {"system": OWN, "messages": []}, lambda sent: sent["system"]),
        ("messages", {"system": [{"type": "text", "text": OWN}]}, lambda sent: sent["system"][0]["text"]),
        ("completions", {"prompt": OWN}, lambda sent: sent["prompt"]),
    ],
)
def test_every_dialect_has_its_place_for_the_prompt(
    proxy: Worker, upstream: FakeUpstream, path: str, raw: Any, where: Any
) -> None:
    promote(proxy, "geo", v2=1.0)
    call(proxy, json.dumps({"model": "m", **raw}).encode(), path=path)
    assert where(upstream.requests[0].json) == "Name the city."
    assert "Name the city." in proxy.span(count=1)["input_messages"]


def test_an_episode_keeps_its_version_when_another_is_promoted(proxy: Worker, upstream: FakeUpstream) -> None:
    assert call(proxy, body(OWN), "/e/old").headers["x-ratchet-versions"] == "geo@1"
    promote(proxy, "geo", v2=1.0)
    assert call(proxy, body(OWN), "/e/old").headers["x-ratchet-versions"] == "geo@1"
    assert call(proxy, body(OWN), "/e/new").headers["x-ratchet-versions"] == "geo@2"
    promote(proxy, "geo", v1=1.0)
    assert call(proxy, body(OWN), "/e/new").headers["x-ratchet-versions"] == "geo@2"


def test_an_episode_that_began_with_another_prompt_keeps_its_time_too(proxy: Worker) -> None:
    call(proxy, body("something else"), "/e/old")
    promote(proxy, "geo", v2=1.0)
    assert call(proxy, body(OWN), "/e/old").headers["x-ratchet-versions"] == "geo@1"


def test_an_episode_keeps_its_version_over_a_restart(upstream: FakeUpstream, tmp_path: Path) -> None:
    registry = Registry()
    registry.add("geo", OWN, "Name the city.")
    with worker(tmp_path, upstream.url, registry) as first:
        call(first, body(OWN), "/e/old")
    registry.promote("geo", {"2": 1.0})
    with worker(tmp_path, upstream.url, registry) as second:
        assert call(second, body(OWN), "/e/old").headers["x-ratchet-versions"] == "geo@1"
        assert call(second, body(OWN), "/e/new").headers["x-ratchet-versions"] == "geo@2"


def test_traffic_is_divided_and_its_share_recorded(proxy: Worker) -> None:
    promote(proxy, "geo", v1=0.5, v2=0.5)
    seen = {call(proxy, body(OWN), f"/e/{n}").headers["x-ratchet-versions"] for n in range(30)}
    assert seen == {"geo@1", "geo@2"}
    assert {span["propensity"] for span in proxy.spans} == {0.5}


def test_a_pinned_version_wins_over_the_deployed_one(proxy: Worker, upstream: FakeUpstream) -> None:
    reply = call(proxy, body(OWN), "/e/x/with/geo@2")
    assert upstream.requests[0].body == body("Name the city.")
    assert reply.headers["x-ratchet-versions"] == "geo@2"
    assert (proxy.span(count=1)["prompt_version"], proxy.span()["propensity"]) == (2, 1.0)


def test_a_pinned_candidate_is_served_by_its_hash(proxy: Worker, upstream: FakeUpstream) -> None:
    ident = proxy.registry.candidate("tutor", "Candidate for {name}.")
    raw = body("Teach Ada in French, please.")
    reply = call(proxy, raw, f"/e/x/with/tutor@{ident}")
    assert upstream.requests[0].json["messages"][0]["content"] == "Candidate for Ada."
    assert reply.headers["x-ratchet-versions"] == f"tutor@{ident}"
    span = proxy.span(count=1)
    assert (span["prompt_slot"], span["prompt_version"], span["prompt_candidate"]) == ("tutor", None, ident)


def test_several_slots_are_pinned_at_once(proxy: Worker, upstream: FakeUpstream) -> None:
    messages = [{"role": "system", "content": OWN}, {"role": "user", "content": "Teach Ada in French, please."}]
    reply = call(proxy, json.dumps({"messages": messages}).encode(), "/e/x/with/geo@2,tutor@2")
    assert [message["content"] for message in upstream.requests[0].json["messages"]] == [
        "Name the city.",
        "Ada: Answer with the city only, in French.",
    ]
    assert reply.headers["x-ratchet-versions"] == "geo@2,tutor@2"


def test_a_version_registered_a_moment_ago_can_be_pinned(proxy: Worker, upstream: FakeUpstream) -> None:
    proxy.registry.add("geo", "Third.")
    assert call(proxy, body(OWN), "/e/x/with/geo@3").headers["x-ratchet-versions"] == "geo@3"
    assert upstream.requests[0].json["messages"][0]["content"] == "Third."


@pytest.mark.parametrize(
    ("pin", "status", "code"),
    [
        ("geo@9", 404, "version_not_found"),
        ("geo@c-000000000000", 404, "version_not_found"),
        ("nowhere@1", 404, "slot_not_found"),
        ("geo", 400, "bad_request"),
        ("geo@", 400, "bad_request"),
        ("@1", 400, "bad_request"),
        ("geo@1,", 400, "bad_request"),
        ("geo@latest", 400, "bad_request"),
    ],
)
def test_a_pin_to_nothing_is_refused_and_leaves_a_span(
    proxy: Worker, upstream: FakeUpstream, pin: str, status: int, code: str
) -> None:
    reply = call(proxy, body(OWN), f"/e/x/with/{pin}")
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert reply.json()["error"]["type"] == "ratchet_error"
    assert upstream.requests == []
    span = proxy.span(count=1)
    assert (span["episode_id"], span["error_type"], span["http_status"]) == ("x", code, status)


def test_a_pinned_slot_whose_prompt_is_not_there_fails_open_and_is_not_claimed(
    proxy: Worker, upstream: FakeUpstream
) -> None:
    before = failures("not_matched")
    reply = call(proxy, body("another prompt"), "/e/x/with/geo@2")
    assert upstream.requests[0].body == body("another prompt")
    assert reply.headers["x-ratchet-versions"] == ""
    assert proxy.span(count=1)["prompt_slot"] is None
    assert failures("not_matched") == before + 1


def test_a_version_that_needs_an_unknown_variable_fails_open(proxy: Worker, upstream: FakeUpstream) -> None:
    before = failures("missing_variable")
    ident = proxy.registry.candidate("geo", "Answer in {language}.")
    reply = call(proxy, body(OWN), f"/e/x/with/geo@{ident}")
    assert upstream.requests[0].body == body(OWN)
    assert reply.headers["x-ratchet-versions"] == ""
    assert failures("missing_variable") == before + 1


def test_an_injection_that_fails_lets_the_call_through(
    proxy: Worker, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("proxy.inject.replace", broken)
    before = failures("error")
    reply = call(proxy, body(OWN), "/e/x/with/geo@2")
    assert (reply.status_code, reply.headers["x-ratchet-versions"]) == (200, "")
    assert upstream.requests[0].body == body(OWN)
    assert failures("error") == before + 1


def test_the_header_names_the_slot(proxy: Worker, upstream: FakeUpstream) -> None:
    proxy.registry.add("twin", OWN, "Twin.")
    promote(proxy, "twin", v2=1.0)
    assert call(proxy, body(OWN), x_ratchet_slot="twin").headers["x-ratchet-versions"] == "twin@2"
    before = failures("not_matched")
    assert call(proxy, body(OWN), x_ratchet_slot="unknown").headers["x-ratchet-versions"] == ""
    assert failures("not_matched") == before + 1
    assert "x-ratchet-slot" not in upstream.requests[0].headers


def test_the_header_is_enough_where_the_prompt_is_no_known_version(proxy: Worker, upstream: FakeUpstream) -> None:
    promote(proxy, "geo", v2=1.0)
    made_up = body("Something the agent made up.")
    assert call(proxy, made_up).headers["x-ratchet-versions"] == ""
    assert call(proxy, made_up, x_ratchet_slot="geo").headers["x-ratchet-versions"] == "geo@2"
    assert upstream.requests[-1].json["messages"][0] == {"role": "system", "content": "Name the city."}
    assert upstream.requests[-1].json["messages"][1:] == json.loads(made_up)["messages"][1:]
    # A version that needs variables cannot be rendered from a text that is none of the slot's.
    assert call(proxy, made_up, x_ratchet_slot="tutor").headers["x-ratchet-versions"] == ""
    assert upstream.requests[-1].body == made_up


def test_an_unmatched_prompt_is_counted(proxy: Worker) -> None:
    def unmatched() -> float:
        return metrics.REGISTRY.get_sample_value("ratchet_prompts_unmatched_total") or 0.0

    before = unmatched()
    call(proxy, body("unknown"))
    call(proxy, body(OWN))
    assert unmatched() == before + 1


def test_a_chain_goes_by_the_agents_own_text_not_by_the_injected_one(proxy: Worker) -> None:
    promote(proxy, "geo", v2=1.0)
    messages = [{"role": "system", "content": OWN}, {"role": "user", "content": "France?"}]
    first = call(proxy, json.dumps({"messages": messages}).encode())
    messages += [{"role": "assistant", "content": "Paris"}, {"role": "user", "content": "Italy?"}]
    second = call(proxy, json.dumps({"messages": messages}).encode())
    assert first.headers["x-ratchet-episode"] == second.headers["x-ratchet-episode"]
    assert [span["prompt_version"] for span in proxy.spans] == [2, 2]
