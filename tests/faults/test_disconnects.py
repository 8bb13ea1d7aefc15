"""A client that leaves, at each moment of a call: the upstream is let go within a second, one span tells what came."""

import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy import metrics
from tests.fake_upstream import FakeUpstream, Received, Reply, chunk, json_reply, sse_reply
from tests.patience import within
from tests.unit.proxy.harness import Worker, wait_for, worker

SECOND = 1.0
RETRY = b"x-stainless-retry-count: 1"
END = b"data: [DONE]\n\n"
LEAVING = pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture(scope="module")
def shared(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with worker(Path(tmp_path_factory.mktemp("data")), upstream.url) as running:
        yield running


@pytest.fixture
def proxy(shared: Worker, upstream: FakeUpstream) -> Worker:
    shared.spans.clear()
    upstream.forget()
    return shared


_callers: list["Caller"] = []


@pytest.fixture(autouse=True)
def nobody_stays() -> Iterator[None]:
    yield
    while _callers:
        _callers.pop().socket.close()


class Caller:
    """A client on a bare socket."""

    def __init__(self, proxy: Worker, body: dict[str, Any], *headers: bytes, send: float = 1.0) -> None:
        raw = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}], **body}).encode()
        head = [b"POST /v1/chat/completions HTTP/1.1", b"host: localhost", b"content-length: %d" % len(raw), *headers]
        self.socket = socket.create_connection(("127.0.0.1", int(proxy.root.rpartition(":")[2])), timeout=30)
        self.socket.sendall(b"\r\n".join(head) + b"\r\n\r\n" + raw[: int(len(raw) * send)])
        self.got = b""
        _callers.append(self)

    def until(self, text: bytes) -> None:
        while text not in self.got:
            more = self.socket.recv(65536)
            assert more, self.got
            self.got += more

    def leave(self, reset: bool) -> None:
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def arrived(upstream: FakeUpstream) -> Received:
    wait_for(lambda: bool(upstream.requests))
    return upstream.requests[0]


@LEAVING
def test_before_its_request_was_whole(proxy: Worker, upstream: FakeUpstream, reset: bool) -> None:
    Caller(proxy, {}, send=0.5).leave(reset)
    span = proxy.span(count=1)
    assert (span["status"], span["http_status"], span["output_messages"]) == ("cancelled", None, None)
    assert upstream.requests == []


@LEAVING
@pytest.mark.parametrize("stream", [False, True])
def test_while_it_waits_for_the_head(proxy: Worker, upstream: FakeUpstream, stream: bool, reset: bool) -> None:
    upstream.reply(Reply(end="hang"))
    caller = Caller(proxy, {"stream": stream})
    request = arrived(upstream)
    caller.leave(reset)
    assert request.gone.wait(within(SECOND))
    span = proxy.span(count=1)
    assert (span["status"], span["http_status"], span["stream"]) == ("cancelled", None, stream)


@LEAVING
def test_in_the_middle_of_a_json_answer(proxy: Worker, upstream: FakeUpstream, reset: bool) -> None:
    upstream.reply(json_reply(b'{"id":"x","choices":[', end="hang"))
    caller = Caller(proxy, {})
    request = arrived(upstream)
    caller.leave(reset)
    assert request.gone.wait(within(SECOND))
    assert proxy.span(count=1)["status"] == "cancelled"


@LEAVING
def test_in_the_middle_of_a_stream_with_the_text_so_far_recorded(
    proxy: Worker, upstream: FakeUpstream, reset: bool
) -> None:
    upstream.reply(sse_reply([chunk({"role": "assistant", "content": "Par"}), chunk({"content": "is"})], end="hang"))
    caller = Caller(proxy, {"stream": True})
    caller.until(b'"is"')
    caller.leave(reset)
    assert arrived(upstream).gone.wait(within(SECOND))
    span = proxy.span(count=1)
    assert (span["status"], span["http_status"], span["stream"]) == ("cancelled", 200, True)
    assert json.loads(span["output_messages"])[0]["content"] == "Paris"


@LEAVING
def test_after_the_last_event_while_the_upstream_still_holds_on(
    proxy: Worker, upstream: FakeUpstream, reset: bool
) -> None:
    upstream.reply(sse_reply([chunk({"content": "Paris"}), chunk({}, "stop"), END], end="hang"))
    caller = Caller(proxy, {"stream": True})
    caller.until(END)
    assert proxy.span(count=1)["status"] == "ok"
    caller.leave(reset)
    assert arrived(upstream).gone.wait(within(SECOND))
    assert proxy.span(count=1)["finish_reason"] == "stop"


@LEAVING
@pytest.mark.parametrize("order", ["first leaves first", "joiner leaves first"])
def test_with_a_retry_that_has_joined_the_call_goes_on_until_both_are_gone(
    proxy: Worker, upstream: FakeUpstream, order: str, reset: bool
) -> None:
    upstream.reply(Reply(end="hang"))
    before = joined()
    first = Caller(proxy, {"seed": 1})
    request = arrived(upstream)
    joiner = Caller(proxy, {"seed": 1}, RETRY)
    wait_for(lambda: joined() == before + 1)
    one, other = (first, joiner) if order == "first leaves first" else (joiner, first)
    one.leave(reset)
    assert not request.gone.wait(0.15)
    assert proxy.spans == []
    other.leave(reset)
    assert request.gone.wait(within(SECOND))
    assert proxy.span(count=1)["status"] == "cancelled"
    assert len(upstream.requests) == 1


def joined() -> float:
    """How many calls have followed another one since the start."""
    return metrics.REGISTRY.get_sample_value("ratchet_retries_joined_total") or 0.0
