"""Several targets for one model: shares, rests, and who takes over; at most two attempts, and never a second bill."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.errors import ConfigError
from collector.settings import Settings
from proxy.balance import Balance, Group, Member
from tests.fake_upstream import FakeUpstream, Reply, chat, error_reply
from tests.unit.proxy.harness import Worker, worker

DEAD = "http://127.0.0.1:9/v1"


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 4))
def test_every_entry_gets_exactly_its_share(weights: list[int], rounds: int) -> None:
    group = Group([Member(index, float(weight)) for index, weight in enumerate(weights)])
    counts = Counter(group.pick(0.0) for _ in range(rounds * sum(weights)))
    assert [counts[index] for index in range(len(weights))] == [rounds * weight for weight in weights]


def test_a_target_that_failed_rests_and_then_comes_back() -> None:
    group = Group([Member("a"), Member("b")])
    group.rest("a", 10.0)
    assert {group.pick(9.0) for _ in range(4)} == {"b"}
    assert {group.pick(10.0) for _ in range(4)} == {"a", "b"}
    assert group.pick(9.0, "b") in ("a", None)


def test_where_all_rest_one_is_tried_all_the_same() -> None:
    balance = Balance({"m": Group([Member("a"), Member("b")])}, cooldown=1000)
    assert balance.after("m", "a") == "b"
    assert balance.after("m", "b") is None
    assert balance.first("m") in ("a", "b")


def test_fallbacks_take_over_in_order_when_every_entry_rests() -> None:
    groups = {"m": Group([Member("a")], ("x", "y")), "x": Group([Member("b")]), "y": Group([Member("c")])}
    balance = Balance(groups, cooldown=1000)
    assert balance.first("m") == "a"
    assert balance.after("m", "a") == "b"
    assert balance.after("m", "b") == "c"
    assert balance.first("m") == "c"
    assert not balance.shared("x")


def test_an_unknown_fallback_is_a_mistake_in_the_configuration() -> None:
    with pytest.raises((ConfigError, ValueError), match="`big` is no model_name"):
        Settings.model_validate({"upstream": {"fallbacks": {"m": ["big"]}}, "model_list": [entry("m", DEAD)]})


def entry(name: str, base: str, model: str = "hosted_vllm/qwen", **params: Any) -> dict[str, Any]:
    return {"model_name": name, "litellm_params": {"model": model, "api_base": base, **params}}


@pytest.fixture
def two() -> Iterator[tuple[FakeUpstream, FakeUpstream]]:
    with FakeUpstream() as one, FakeUpstream() as other:
        yield one, other


def call(proxy: Worker, model: str = "m", **more: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Capital?"}], **more}
    return proxy.client.post(proxy.url + "/chat/completions", json=body)


def test_entries_of_one_name_share_its_calls_by_weight(tmp_path: Path, two: tuple[FakeUpstream, FakeUpstream]) -> None:
    entries = [
        entry("m", two[0].url, "hosted_vllm/a", weight=3),
        entry("m", two[1].url, "hosted_vllm/b", api_key="k-b"),
    ]
    with worker(tmp_path, DEAD, model_list=entries) as proxy:
        models = [call(proxy).json()["model"] for _ in range(8)]
        assert Counter(models) == {"a": 6, "b": 2}
        assert (len(two[0].requests), len(two[1].requests)) == (6, 2)
        assert two[1].requests[0].headers["authorization"] == "Bearer k-b"
        assert "authorization" not in two[0].requests[0].headers


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_target_is_left_for_the_other_and_then_left_alone(
    tmp_path: Path, two: tuple[FakeUpstream, FakeUpstream], status: int, stream: bool
) -> None:
    entries = [entry("m", two[0].url, "hosted_vllm/a"), entry("m", two[1].url, "hosted_vllm/b", api_key="k-b")]
    with worker(tmp_path, DEAD, model_list=entries) as proxy:
        two[0].reply(error_reply(status))
        reply = call(proxy, stream=stream)
        assert reply.status_code == 200
        assert two[1].requests[0].json["model"] == "b"
        assert two[1].requests[0].headers["authorization"] == "Bearer k-b"
        span = proxy.span(count=1)
        assert (span["attempts"], span["status"], span["provider"]) == (2, "ok", "hosted_vllm")
        for _ in range(4):
            assert call(proxy).status_code == 200
        assert (len(two[0].requests), len(two[1].requests)) == (1, 5)


def test_a_target_that_is_not_there_is_replaced_and_costs_one_span(
    tmp_path: Path, two: tuple[FakeUpstream, FakeUpstream]
) -> None:
    with worker(tmp_path, DEAD, model_list=[entry("m", DEAD), entry("m", two[1].url)]) as proxy:
        replies = [call(proxy) for _ in range(3)]
        assert [reply.status_code for reply in replies] == [200] * 3
        assert [span["attempts"] for span in proxy.spans] == [2, 1, 1]


def test_an_answer_that_may_be_billed_is_never_asked_for_again(
    tmp_path: Path, two: tuple[FakeUpstream, FakeUpstream]
) -> None:
    settings = {"model_list": [entry("m", two[0].url), entry("m", two[1].url)]}
    upstream = {"read_timeout": 0.3, "cooldown": 0}
    with worker(tmp_path, DEAD, upstream={"default": DEAD, **upstream}, **settings) as proxy:
        for broken, status in ((error_reply(500), 500), (Reply(end="hang"), 504), (chat("cut", ident="x"), 200)):
            two[0].forget()
            two[1].forget()
            two[0].reply(broken)
            two[1].reply(broken)
            assert call(proxy).status_code == status
            assert len(two[0].requests) + len(two[1].requests) == 1
        assert [span["attempts"] for span in proxy.spans] == [1, 1, 1]


def test_at_most_two_attempts_whatever_is_configured(tmp_path: Path) -> None:
    entries = [*(entry("m", DEAD) for _ in range(4)), entry("x", DEAD)]
    with worker(tmp_path, DEAD, model_list=entries, upstream={"default": DEAD, "fallbacks": {"m": ["x"]}}) as proxy:
        reply = call(proxy)
        assert (reply.status_code, reply.json()["error"]["code"]) == (502, "upstream_unreachable")
        assert proxy.span(count=1)["attempts"] == 2


def test_a_fallback_gets_the_call_under_its_own_name(tmp_path: Path, two: tuple[FakeUpstream, FakeUpstream]) -> None:
    entries = [entry("fast", DEAD), entry("big", two[1].url, "hosted_vllm/big-1")]
    with worker(
        tmp_path, DEAD, model_list=entries, upstream={"default": DEAD, "fallbacks": {"fast": ["big"]}}
    ) as proxy:
        reply = call(proxy, "fast")
        assert reply.json()["model"] == "big-1"
        span = proxy.span(count=1)
        assert (span["request_model"], span["response_model"], span["attempts"]) == ("fast", "big-1", 2)


def test_without_retries_the_first_answer_counts(tmp_path: Path, two: tuple[FakeUpstream, FakeUpstream]) -> None:
    entries = [entry("m", two[0].url), entry("m", two[1].url)]
    with worker(tmp_path, DEAD, model_list=entries, upstream={"default": DEAD, "retries": 0}) as proxy:
        two[0].reply(error_reply(429))
        assert call(proxy).status_code == 429
        assert two[1].requests == []


@pytest.mark.parametrize(
    ("settings", "reply", "says"),
    [
        ({"first_byte_timeout": 0.2}, Reply(end="hang"), "did not answer in time"),
        ({"total_timeout": 0.3}, Reply(end="hang"), "total_timeout"),
    ],
)
def test_time_limits_end_a_call_with_504(tmp_path: Path, settings: dict[str, Any], reply: Reply, says: str) -> None:
    with (
        FakeUpstream() as upstream,
        worker(tmp_path, upstream.url, upstream={"default": upstream.url, **settings}) as proxy,
    ):
        upstream.reply(reply)
        answer = call(proxy)
        assert answer.status_code == 504
        assert says in answer.json()["error"]["message"]
        assert proxy.span(count=1)["error_type"] == "upstream_timeout"
        assert upstream.requests[0].gone.wait(30)


def test_a_stream_that_takes_too_long_in_all_is_cut_and_recorded_as_far_as_it_came(tmp_path: Path) -> None:
    from tests.fake_upstream import chat_events, sse_reply

    slow = sse_reply([part for event in chat_events("abcdefghij") for part in (event, 0.1)])
    with (
        FakeUpstream() as upstream,
        worker(tmp_path, upstream.url, upstream={"default": upstream.url, "total_timeout": 0.5}) as proxy,
    ):
        upstream.reply(slow)
        with pytest.raises(httpx.RemoteProtocolError):
            call(proxy, stream=True)
        span = proxy.span(count=1)
        assert (span["status"], span["error_type"], span["http_status"]) == ("error", "upstream_timeout", 200)
        assert json.loads(span["output_messages"])[0]["content"].startswith("a")
