"""Kept answers: off unless configured, the same to the byte, per key, bounded, and every hit a span."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from proxy.cache import Cache
from proxy.dialects import KNOWN
from proxy.dialects.base import Summary
from proxy.identity import Trace
from proxy.paths import Route
from proxy.record import Call
from tests.fake_upstream import FakeUpstream, chat, chat_events, error_reply, sse_reply
from tests.unit.proxy.harness import Worker, worker

KEYS = {"keys": [{"name": "a", "key": "k-a"}, {"name": "b", "key": "k-b"}]}


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture
def proxy(upstream: FakeUpstream, tmp_path: Path) -> Iterator[Worker]:
    with worker(tmp_path, upstream.url, cache={"seconds": 60}, server=KEYS) as running:
        yield running


def call(proxy: Worker, text: str = "Capital?", key: str = "k-a", **more: Any) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **more}
    return proxy.client.post(proxy.url + "/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})


def hits(proxy: Worker) -> list[bool]:
    return [json.loads(span["attributes"]).get("cache") == "hit" for span in proxy.spans]


def test_the_same_call_is_answered_again_and_is_a_span_that_cost_nothing(proxy: Worker, upstream: FakeUpstream) -> None:
    first, second = call(proxy), call(proxy)
    assert first.content == second.content
    own = ("x-ratchet-span", "x-ratchet-episode", "date")
    assert [pair for pair in first.headers.items() if pair[0] not in own] == [
        pair for pair in second.headers.items() if pair[0] not in own
    ]
    assert len(upstream.requests) == 1
    assert hits(proxy) == [False, True]
    hit = proxy.span(count=2)
    assert (hit["status"], hit["attempts"], hit["cost_usd"], hit["output_tokens"]) == ("ok", 0, 0.0, 3)
    assert hit["output_messages"] == proxy.spans[0]["output_messages"]
    assert hit["span_id"] == second.headers["x-ratchet-span"] != first.headers["x-ratchet-span"]


def test_a_stream_comes_back_byte_for_byte(proxy: Worker, upstream: FakeUpstream) -> None:
    upstream.reply(sse_reply(chat_events(usage=False)))
    first, second = call(proxy, stream=True), call(proxy, stream=True)
    assert first.content == second.content == b"".join(chat_events(usage=False))
    assert (hits(proxy), [span["stream"] for span in proxy.spans]) == ([False, True], [True, True])
    assert second.headers["content-type"] == "text/event-stream"


def test_another_key_another_body_or_another_path_is_another_call(proxy: Worker, upstream: FakeUpstream) -> None:
    call(proxy)
    call(proxy, key="k-b")
    call(proxy, "Capital? ")
    call(proxy, seed=1)
    assert hits(proxy) == [False] * 4
    assert len(upstream.requests) == 4


def test_errors_and_cut_streams_are_not_kept(proxy: Worker, upstream: FakeUpstream) -> None:
    upstream.reply(error_reply(500), chat("Paris"))
    assert [call(proxy).status_code for _ in range(2)] == [500, 200]
    upstream.reply(sse_reply(chat_events()[:3], end="reset"))
    with pytest.raises(httpx.RemoteProtocolError):
        call(proxy, "cut", stream=True)
    assert b"[DONE]" in call(proxy, "cut", stream=True).content
    assert hits(proxy) == [False] * 4


def test_without_configuration_nothing_is_kept(upstream: FakeUpstream, tmp_path: Path) -> None:
    with worker(tmp_path, upstream.url, server=KEYS) as proxy:
        call(proxy)
        call(proxy)
        assert len(upstream.requests) == 2


def a_call() -> Call:
    done = Call(Route(KNOWN["chat/completions"], "", ""), KNOWN["chat/completions"], Trace(), None, "")
    done.summary = Summary()
    return done


def test_answers_grow_old(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    kept = Cache(10, 1 << 20)
    kept.put(b"a", 200, [], b"x", a_call())
    now = 109.0
    assert kept.get(b"a") is not None
    now = 111.0
    assert kept.get(b"a") is None


def test_the_room_is_bounded_and_the_least_used_goes_first() -> None:
    kept = Cache(10, 100_000)
    for name in range(20):
        kept.put(b"%d" % name, 200, [], b"x" * 8000, a_call())
        kept.get(b"0")
    assert kept.get(b"0") is not None
    assert kept.get(b"1") is None
    assert kept.get(b"19") is not None
    assert kept._held <= 100_000
    kept.put(b"big", 200, [], b"x" * 10_000, a_call())
    assert kept.get(b"big") is None
