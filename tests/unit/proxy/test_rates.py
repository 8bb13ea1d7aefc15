"""What a key may use: counted over all workers, refused with the time to wait, and one span for each refusal."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.prices import Price, Prices
from proxy.errors import Limited
from proxy.rates import Meter
from tests.fake_upstream import FakeUpstream, Reply, chat, chat_events, sse_reply
from tests.unit.proxy.harness import Worker, wait_for, worker

NOW = 1_800_000_030.0  # thirty seconds into a minute
BODY = {"model": "m", "messages": [{"role": "user", "content": "Capital?"}]}


@pytest.fixture
def meters(tmp_path: Path) -> Iterator[tuple[Meter, Meter]]:
    """Two workers of one server."""
    one, two = Meter(tmp_path / "limits.tab", 0), Meter(tmp_path / "limits.tab", 1)
    yield one, two
    one.close()
    two.close()


def refused(meter: Meter, limits: dict[str, float], now: float = NOW) -> Limited:
    with pytest.raises(Limited) as caught:
        meter.enter("bot", limits, now)
    return caught.value


def test_requests_of_a_minute_are_counted_over_all_workers_and_begin_anew_in_the_next(
    meters: tuple[Meter, Meter],
) -> None:
    limits = {"requests_per_minute": 3.0}
    for meter in (meters[0], meters[1], meters[0]):
        meter.enter("bot", limits, NOW)
        meter.leave("bot", 0, 0.0, NOW)
    error = refused(meters[1], limits)
    assert (error.status, error.code, error.seconds) == (429, "rate_limit_exceeded", 30)
    meters[0].enter("other", limits, NOW)
    meters[1].enter("bot", limits, NOW + 30)


def test_calls_at_once_are_counted_over_all_workers_and_freed_as_they_end(meters: tuple[Meter, Meter]) -> None:
    limits = {"concurrent": 2.0}
    meters[0].enter("bot", limits, NOW)
    meters[1].enter("bot", limits, NOW)
    assert refused(meters[0], limits).code == "concurrency_limit_exceeded"
    meters[1].leave("bot", 0, 0.0, NOW)
    meters[0].enter("bot", limits, NOW)


def test_what_a_killed_worker_ran_is_freed_when_it_starts_again(tmp_path: Path, meters: tuple[Meter, Meter]) -> None:
    limits = {"concurrent": 1.0}
    meters[1].enter("bot", limits, NOW)
    assert refused(meters[0], limits).seconds == 1
    again = Meter(tmp_path / "limits.tab", 1)
    meters[0].enter("bot", limits, NOW)
    again.close()


@pytest.mark.parametrize(
    ("name", "limit", "later"),
    [
        ("tokens_per_day", 100.0, True),
        ("usd_per_day", 0.5, True),
        ("tokens_total", 100.0, False),
        ("usd_total", 0.5, False),
    ],
)
def test_a_budget_ends_and_a_days_begins_anew_at_midnight(
    meters: tuple[Meter, Meter], name: str, limit: float, later: bool
) -> None:
    limits = {name: limit}
    meters[0].enter("bot", limits, NOW)
    meters[1].enter("bot", limits, NOW)  # begun before the budget was used up, so it may go on
    meters[0].leave("bot", 100, 0.5, NOW)
    meters[1].leave("bot", 50, 0.25, NOW)
    error = refused(meters[1], limits)
    assert error.code == "budget_exceeded"
    assert 0 < error.seconds <= 86400
    tomorrow = NOW + error.seconds
    if later:
        assert int(tomorrow) % 86400 == 0
        meters[1].enter("bot", limits, tomorrow)
    else:
        refused(meters[1], limits, tomorrow)


def test_what_was_used_survives_a_restart(tmp_path: Path) -> None:
    for _ in range(3):
        meter = Meter(tmp_path / "limits.tab")
        meter.enter("bot", {}, NOW)
        meter.leave("bot", 7, 0.5, NOW)
        meter.close()
    meter = Meter(tmp_path / "limits.tab")
    used = meter.used("bot", NOW)
    assert (used.requests, used.running, used.tokens, used.usd) == (3, 0, 21, 1.5)
    meter.close()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), max_size=30))
def test_keys_are_never_mixed_up(tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[str, int]]) -> None:
    meter = Meter(tmp_path_factory.mktemp("m") / "limits.tab")
    for ident, tokens in calls:
        meter.enter(ident, {}, NOW)
        meter.leave(ident, tokens, 0.0, NOW)
    for ident in "abc":
        assert meter.used(ident, NOW).tokens == sum(tokens for one, tokens in calls if one == ident)
    meter.close()


def limited(**limits: float) -> dict[str, object]:
    return {"keys": [{"name": "bot", "key": "k-bot", "limits": limits}, {"name": "free", "key": "k-free"}]}


def call(proxy: Worker, key: str = "k-bot", **more: object) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return proxy.client.post(proxy.url + "/chat/completions", json={**BODY, **more}, headers=headers)


def test_a_call_over_a_limit_is_a_429_a_span_and_no_upstream_call(tmp_path: Path) -> None:
    with (
        FakeUpstream() as upstream,
        worker(tmp_path, upstream.url, server=limited(requests_per_minute=2)) as proxy,
    ):
        statuses = [call(proxy).status_code for _ in range(2)]
        reply = call(proxy)
        if statuses != [200, 200] or reply.status_code == 200:  # a minute ended in between: once more, in one piece
            statuses, reply = [call(proxy).status_code for _ in range(2)][-1:] * 2, call(proxy)
        assert reply.status_code == 429
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert reply.json()["error"]["type"] == "ratchet_error"
        assert reply.json()["error"]["code"] == "rate_limit_exceeded"
        assert call(proxy, "k-free").status_code == 200
        spans = [span for span in proxy.spans if span["http_status"] == 429]
        assert spans
        assert len(proxy.spans) == len(upstream.requests) + len(spans)
        assert (spans[0]["status"], spans[0]["error_type"], spans[0]["request_model"]) == (
            "error",
            "rate_limit_exceeded",
            "m",
        )
        assert json.loads(spans[0]["attributes"])["key"] == "bot"


def test_tokens_and_dollars_of_answers_and_streams_end_a_budget(tmp_path: Path) -> None:
    prices = Prices({("openai", "gpt-x"): Price(0.01, 0.1, 0.01)})
    with FakeUpstream() as upstream:
        entry = {"model_name": "m", "litellm_params": {"model": "openai/gpt-x", "api_base": upstream.url}}
        keys = limited(usd_total=0.8)
        with worker(tmp_path, upstream.url, prices=prices, model_list=[entry], server=keys) as proxy:
            assert call(proxy).status_code == 200
            assert proxy.span(count=1)["cost_usd"] == pytest.approx(11 * 0.01 + 3 * 0.1)
            assert b"[DONE]" in call(proxy, stream=True).content
            assert proxy.span(count=2)["cost_usd"] == pytest.approx(0.41)
            reply = call(proxy)
            assert (reply.status_code, reply.json()["error"]["code"]) == (429, "budget_exceeded")
            assert reply.headers["x-should-retry"] == "false"
            assert len(upstream.requests) == 2


def test_a_call_that_fails_or_is_left_frees_its_place(tmp_path: Path) -> None:
    with FakeUpstream() as upstream, worker(tmp_path, upstream.url, server=limited(concurrent=1)) as proxy:
        upstream.reply(Reply(end="reset"), Reply(end="reset"), chat("Paris"), sse_reply(chat_events()[:2], end="hang"))
        assert call(proxy).status_code == 502
        assert call(proxy).status_code == 200
        headers = {"authorization": "Bearer k-bot"}
        with proxy.client.stream(
            "POST", proxy.url + "/chat/completions", json={**BODY, "stream": True}, headers=headers
        ) as held:
            assert held.status_code == 200
            busy = call(proxy)
            assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
        wait_for(lambda: call(proxy).status_code == 200)
