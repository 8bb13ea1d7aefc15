"""The short way of the usual call: it reads as the long one, and whatever goes wrong on it ends as on the long one."""

import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.quick import Quick
from tests.fake_upstream import FakeUpstream, chunk, json_reply, sse_reply
from tests.unit.proxy import test_relay as long_way
from tests.unit.proxy.harness import Registry, Worker, wait_for, worker

BODY, STREAM, PLAIN = long_way.BODY, long_way.STREAM, long_way.PLAIN
PROMPT = b'{"model":"m","messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"Hi"}]}'
SETTINGS = {**long_way.SETTINGS, "upstream": {"connect_timeout": 2, "read_timeout": 1.0, "retries": 1}}
_OURS = re.compile(rb"(ep-[0-9a-f]{28}|x-ratchet-span: [0-9a-f]{16}|date: [^\r]+)")


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture(scope="module")
def shared(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = Path(tmp_path_factory.mktemp("data"))
    registry = Registry()
    registry.add("greeting", "Be brief.", "Be very brief.")
    registry.promote("greeting", {"2": 1.0})
    with worker(folder, upstream.url, registry, **SETTINGS) as running:
        yield running


class Taken:
    """Counts the calls that were taken."""

    def __init__(self) -> None:
        self.count = 0


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    found, original = Taken(), Quick.take

    def take(self: Quick, *given: Any) -> bool:
        took = original(self, *given)
        found.count += took
        return took

    monkeypatch.setattr(Quick, "take", take)
    return found


@pytest.fixture
def proxy(shared: Worker, upstream: FakeUpstream, taken: Taken) -> Worker:
    """A worker that knows the heads of the calls to come, and has a connection ready for them."""
    for body in (BODY, STREAM, PLAIN):
        upstream.reply()
        assert long_way.post(shared, body).status_code == 200
        assert b" 200 " in talk(shared, long_way.request(body))
    assert shared.client.post(shared.url + "/chat/completions", content=STREAM).status_code == 200
    wait_for(lambda: len(shared.spans) >= 7)
    shared.spans.clear()
    upstream.forget()
    taken.count = 0
    return shared


def talk(proxy: Worker, *requests: bytes) -> bytes:
    """All that is answered to some requests on one connection, sent one after the other."""
    got = b""
    with socket.create_connection(("127.0.0.1", int(proxy.root.rpartition(":")[2])), timeout=10) as connection:
        for one in requests:
            connection.sendall(one)
            answer = b""
            while not whole(answer):
                more = connection.recv(1 << 16)
                assert more, answer
                answer += more
            got += answer
    return got


def whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return bool(end) and (len(body) == int(length[1]) if length else body.endswith(b"0\r\n\r\n"))


def joined(answer: bytes) -> bytes:
    """An answer without the marks of its chunks, which the network cuts as it likes."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head:
        return answer
    content = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        content, body = content + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return head + end + content


def alike(span: dict[str, Any]) -> dict[str, Any]:
    """A span without what no two calls share."""
    own = {"span_id", "trace_id", "episode_id", "start_ns", "end_ns", "ttft_ms"}
    return {name: value for name, value in span.items() if name not in own}


@pytest.mark.parametrize("body", [BODY, STREAM, PLAIN, PROMPT])
def test_both_ways_send_answer_and_record_the_same(
    proxy: Worker, upstream: FakeUpstream, taken: Taken, body: bytes
) -> None:
    known = long_way.request(body)
    fresh = known.replace(b"\r\n", b"\r\nx-request-id: 1\r\n", 1)  # a head that won't come again is not kept
    long = talk(proxy, fresh)
    assert taken.count == 0
    short = talk(proxy, known)
    assert taken.count == 1
    assert _OURS.sub(b"", joined(short)) == _OURS.sub(b"", joined(long))
    one, other = upstream.requests
    assert one.body == other.body
    assert {name: value for name, value in one.headers.items() if name != "x-request-id"} == other.headers
    assert alike(proxy.span(0, count=2)) == alike(proxy.span(1))


def test_an_injected_prompt_goes_up_on_the_short_way(proxy: Worker, upstream: FakeUpstream, taken: Taken) -> None:
    answer = talk(proxy, long_way.request(PROMPT))
    assert taken.count == 1
    assert b"x-ratchet-versions: greeting@2" in answer
    assert json.loads(upstream.requests[0].body)["messages"][0]["content"] == "Be very brief."
    assert proxy.span(count=1)["prompt_version"] == 2


def test_requests_of_one_connection_are_told_apart_by_their_heads(
    proxy: Worker, upstream: FakeUpstream, taken: Taken
) -> None:
    short, long = long_way.request(BODY), long_way.request(PROMPT)
    other = short.replace(b"\r\n", b"\r\nx-request-id: 1\r\n", 1)
    named = short.replace(b"\r\ncontent-length", b"\r\nx-ratchet-episode: mine\r\ncontent-length", 1)
    talk(proxy, short, long, other, short, named, long)
    assert taken.count >= 4
    assert [len(one.body) for one in upstream.requests][:2] == [len(BODY), len(PROMPT) + len("very ")]
    assert [one.headers.get("x-request-id") for one in upstream.requests] == [None, None, "1", None, None, None]
    assert [span["episode_id"] == "mine" for span in proxy.spans] == [False] * 4 + [True, False]


def test_a_head_may_come_before_its_body(proxy: Worker, taken: Taken) -> None:
    head, end, body = long_way.request(BODY).partition(b"\r\n\r\n")
    with socket.create_connection(("127.0.0.1", int(proxy.root.rpartition(":")[2])), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in (head + end, body, head + end, body[:10], body[10:]):
            connection.sendall(part)
            connection.setblocking(True)
            if part in (body, body[10:]):
                answer = b""
                while not whole(answer):
                    answer += connection.recv(1 << 16)
                assert b" 200 " in answer
    assert len(proxy.spans) == 2


def test_what_a_client_sends_behind_a_running_call_is_answered_next(
    proxy: Worker, upstream: FakeUpstream, taken: Taken
) -> None:
    one = long_way.request(BODY)
    upstream.reply(sse_reply([0.2, chunk({"content": "late"})]))
    with socket.create_connection(("127.0.0.1", int(proxy.root.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(long_way.request(STREAM))
        wait_for(lambda: len(upstream.requests) == 1)
        connection.sendall(one)
        got = b""
        while got.count(b"HTTP/1.1 200 OK") < 2 or b"Paris" not in got.rpartition(b"HTTP/1.1")[2]:
            got += connection.recv(1 << 16)
    assert taken.count >= 1
    assert got.index(b"late") < got.index(b"Paris")
    assert [span["status"] for span in proxy.spans] == ["ok", "ok"]


Situation = Callable[..., None]
WITH_BODY: list[Situation] = [
    long_way.test_an_upstream_that_resets_before_its_answer_is_tried_again,
    long_way.test_an_upstream_that_always_resets_is_a_502,
    long_way.test_an_upstream_that_says_nothing_is_a_504,
    long_way.test_a_client_that_leaves_before_the_first_byte_cancels_upstream,
]


@pytest.mark.parametrize("body", [BODY, STREAM])
@pytest.mark.parametrize("situation", WITH_BODY)
def test_whatever_fails_ends_as_on_the_long_way(
    proxy: Worker, upstream: FakeUpstream, taken: Taken, situation: Situation, body: bytes
) -> None:
    situation(proxy, upstream, body)
    assert taken.count >= 1


@pytest.mark.parametrize("end", ["close", "reset"])
def test_an_answer_that_breaks_off_ends_as_on_the_long_way(
    proxy: Worker, upstream: FakeUpstream, taken: Taken, end: str
) -> None:
    long_way.test_a_json_answer_that_is_cut_is_a_502(proxy, upstream, end, "upstream_broken")
    assert taken.count == 1


@pytest.mark.parametrize("end", ["close", "reset", "hang"])
def test_a_stream_that_breaks_off_ends_as_on_the_long_way(
    proxy: Worker, upstream: FakeUpstream, taken: Taken, end: str
) -> None:
    code = "upstream_timeout" if end == "hang" else "upstream_broken"
    long_way.test_a_stream_that_breaks_ends_unclean_after_the_bytes_so_far(proxy, upstream, end, code)
    assert taken.count == 1


@pytest.mark.parametrize(
    "situation",
    [
        long_way.test_a_client_that_leaves_a_stream_cancels_it_upstream,
        long_way.test_a_client_that_leaves_while_a_json_answer_comes_cancels_upstream,
        long_way.test_a_call_is_recorded_before_its_last_byte_arrives,
        long_way.test_an_upstream_that_compresses_anyway_passes_as_it_is_and_is_read,
        long_way.test_a_failed_step_is_retried_in_its_episode,
        long_way.test_request_and_answer_pass_byte_for_byte,
        long_way.test_a_stream_passes_byte_for_byte,
        long_way.test_usage_is_asked_for_and_its_chunk_taken_out_again,
    ],
)
def test_the_rest_holds_on_the_short_way_too(
    proxy: Worker, upstream: FakeUpstream, taken: Taken, situation: Situation
) -> None:
    situation(proxy, upstream)
    assert taken.count >= 1


def test_an_answer_longer_than_what_is_kept_is_handed_over(proxy: Worker, upstream: FakeUpstream, taken: Taken) -> None:
    long = {"id": "x", "choices": [], "text": "y" * (1 << 20)}
    upstream.reply(json_reply(long))
    assert long_way.post(proxy).json() == long
    assert taken.count == 1
    assert proxy.span(count=1)["status"] == "ok"


def test_a_body_over_the_limit_is_refused_behind_a_known_head(
    upstream: FakeUpstream, tmp_path: Path, taken: Taken
) -> None:
    with worker(tmp_path, upstream.url, server={"max_body_mb": 0.05}) as small:
        assert long_way.post(small).status_code == 200
        upstream.forget()
        long = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 100_000}]}).encode()
        assert b" 413 " in talk(small, long_way.request(long))
        assert (taken.count, upstream.requests) == (0, [])
        assert small.span(count=2)["http_status"] == 413


@pytest.mark.parametrize(("body", "place"), [(BODY, "proxy.prepare.read_answer"), (STREAM, "proxy.quick.Streaming")])
def test_a_bug_on_the_short_way_is_an_answer_and_a_span(
    proxy: Worker,
    taken: Taken,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    body: bytes,
    place: str,
) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(place, broken)
    reply = long_way.post(proxy, body)
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "ratchet_error")
    assert taken.count == 1
    assert proxy.span(count=1)["error_type"] == "internal_error"
    assert "a bug" in caplog.text
