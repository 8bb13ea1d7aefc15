"""An SDK's retry that comes while its call still runs: one upstream call, one span, the same answer for both."""

import concurrent.futures
import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import httpx
import openai
import pytest

from proxy import metrics
from tests.fake_upstream import FakeUpstream, Received, Reply, chat, chat_events, completion, sse_reply
from tests.patience import within
from tests.unit.proxy.harness import Worker, wait_for, worker

RAW = b'{"model":"m","messages":[{"role":"user","content":"Capital?"}],"n" : 1}'
STREAM = RAW.replace(b'"n" : 1', b'"stream":true')
RETRY = {"x-stainless-retry-count": "1"}


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture
def proxy(upstream: FakeUpstream, tmp_path: Path) -> Iterator[Worker]:
    with worker(tmp_path, upstream.url) as running:
        yield running


def post(proxy: Worker, raw: bytes = RAW, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(proxy.root + path, content=raw, headers=given, timeout=20)


@contextlib.contextmanager
def caller(proxy: Worker, headers: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """A client that has sent its call, and leaves when the block ends."""
    lines = {"host": "localhost", "content-length": str(len(RAW)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    with socket.create_connection(("127.0.0.1", int(proxy.root.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + RAW)
        yield


class Gate:
    """An upstream that has the call and answers, not a byte earlier, when it is told to."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._open = threading.Event()
        self._joined = joined()

    def __call__(self, request: Received) -> Reply:
        assert self._open.wait(60)
        return self._reply

    def open_when_joined(self) -> None:
        wait_for(lambda: joined() > self._joined, 59)
        self.open()

    def open(self) -> None:
        self._open.set()


def running() -> float:
    return next(iter(metrics.INFLIGHT.collect())).samples[0].value


def joined() -> float:
    return metrics.JOINED._value.get()


def both(proxy: Worker, upstream: FakeUpstream, gate: Gate, raw: bytes = RAW) -> tuple[httpx.Response, httpx.Response]:
    """A call, and once it is at the upstream its retry."""
    upstream.reply(gate)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, proxy, raw)
        wait_for(lambda: len(upstream.requests) == 1)
        retry = pool.submit(post, proxy, raw, x_stainless_retry_count="1")
        gate.open_when_joined()
        return first.result(), retry.result()


def test_both_get_the_one_answer_and_there_is_one_span(proxy: Worker, upstream: FakeUpstream) -> None:
    first, retry = both(proxy, upstream, Gate(chat("Paris")))
    assert first.content == retry.content
    assert dict(first.headers) == dict(retry.headers)
    assert json.loads(first.content) == completion("Paris")
    assert len(upstream.requests) == 1
    assert json.loads(proxy.span(count=1)["attributes"])["joined"] == 1


def test_a_stream_is_joined_until_it_has_begun(proxy: Worker, upstream: FakeUpstream) -> None:
    first, retry = both(proxy, upstream, Gate(sse_reply(chat_events("Paris", usage=False))), STREAM)
    assert first.content == retry.content == b"".join(chat_events("Paris", usage=False))
    assert len(upstream.requests) == len(proxy.spans) == 1


def test_an_error_is_shared_too(proxy: Worker, upstream: FakeUpstream) -> None:
    first, retry = both(proxy, upstream, Gate(Reply(429, parts=(b'{"error":{"message":"slow"}}',))))
    assert (first.status_code, retry.status_code, retry.content) == (429, 429, first.content)
    assert len(upstream.requests) == len(proxy.spans) == 1


@pytest.mark.parametrize(
    ("second", "headers"),
    [
        (RAW + b" ", {}),
        (None, {"x_stainless_retry_count": "0"}),
        (None, {"x_ratchet_episode": "another"}),
        (None, {"x_stainless_retry_count": "one"}),
    ],
)
def test_what_is_no_retry_of_that_call_is_a_call_of_its_own(
    proxy: Worker, upstream: FakeUpstream, second: bytes | None, headers: dict[str, str]
) -> None:
    gate = Gate(chat("Paris"))
    upstream.reply(gate, chat("Rome"))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, proxy)
        wait_for(lambda: len(upstream.requests) == 1)
        other = pool.submit(post, proxy, second or RAW, **{"x_stainless_retry_count": "1", **headers})
        wait_for(lambda: running() == 2)
        gate.open()
        assert (first.result().status_code, other.result().status_code) == (200, 200)
    assert len(upstream.requests) == 2
    wait_for(lambda: len(proxy.spans) == 2)


def test_a_retry_of_a_call_that_is_over_is_sent(proxy: Worker, upstream: FakeUpstream) -> None:
    assert post(proxy).status_code == post(proxy, x_stainless_retry_count="1").status_code == 200
    assert len(upstream.requests) == len(proxy.spans) == 2


def test_the_call_goes_on_for_the_retry_when_its_own_client_leaves(proxy: Worker, upstream: FakeUpstream) -> None:
    gate = Gate(chat("Paris"))
    upstream.reply(gate)
    before = joined()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with caller(proxy):
            wait_for(lambda: len(upstream.requests) == 1)
            retry = pool.submit(post, proxy, x_stainless_retry_count="1")
            wait_for(lambda: joined() > before)
        gate.open()
    assert retry.result().json() == completion("Paris")
    span = proxy.span(count=1)
    assert (span["status"], len(upstream.requests)) == ("ok", 1)


def test_when_everybody_has_left_the_upstream_is_let_go_and_one_span_says_so(
    proxy: Worker, upstream: FakeUpstream
) -> None:
    upstream.reply(Reply(end="hang"))
    before = joined()
    with caller(proxy):
        wait_for(lambda: len(upstream.requests) == 1)
        with caller(proxy, RETRY):
            wait_for(lambda: joined() > before)
    assert upstream.requests[0].gone.wait(within(1))
    span = proxy.span(count=1)
    assert (span["status"], len(upstream.requests)) == ("cancelled", 1)


def test_a_call_whose_retry_leaves_is_answered_all_the_same(proxy: Worker, upstream: FakeUpstream) -> None:
    gate = Gate(chat("Paris"))
    upstream.reply(gate)
    before = joined()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, proxy)
        wait_for(lambda: len(upstream.requests) == 1)
        with caller(proxy, RETRY):
            wait_for(lambda: joined() > before)
        gate.open()
        assert first.result().json() == completion("Paris")
    assert proxy.span(count=1)["status"] == "ok"


def test_keys_dont_join_each_others_calls(upstream: FakeUpstream, tmp_path: Path) -> None:
    keys = [{"name": name, "key": f"k-{name}"} for name in ("a", "b")]
    with worker(tmp_path, upstream.url, server={"keys": keys}) as proxy:
        gate = Gate(chat("Paris"))
        upstream.reply(gate, chat("Rome"))
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            first = pool.submit(post, proxy, authorization="Bearer k-a")
            wait_for(lambda: len(upstream.requests) == 1)
            other = pool.submit(post, proxy, authorization="Bearer k-b", x_stainless_retry_count="1")
            wait_for(lambda: running() == 2)
            gate.open()
            assert first.result().status_code == other.result().status_code == 200
        assert len(upstream.requests) == 2


def test_an_sdk_that_gives_up_and_tries_again_pays_once(proxy: Worker, upstream: FakeUpstream) -> None:
    gate = Gate(chat("Paris"))
    upstream.reply(gate)
    with (
        openai.OpenAI(base_url=proxy.url, api_key="sk-mine", max_retries=1, timeout=2) as client,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        asked = pool.submit(
            client.chat.completions.create, model="m", messages=[{"role": "user", "content": "Capital?"}]
        )
        gate.open_when_joined()
        assert asked.result().choices[0].message.content == "Paris"
    assert len(upstream.requests) == 1
    span = proxy.span(count=1)
    assert (span["status"], json.loads(span["attributes"])["joined"]) == ("ok", 1)


def test_an_sdk_that_hangs_up_for_good_is_given_up_within_a_second(proxy: Worker, upstream: FakeUpstream) -> None:
    upstream.reply(Reply(end="hang"))
    with caller(proxy, {"x-stainless-retry-count": "0"}):
        wait_for(lambda: len(upstream.requests) == 1)
    assert upstream.requests[0].gone.wait(within(1))
    assert proxy.span(count=1)["status"] == "cancelled"
    assert post(proxy, x_stainless_retry_count="1").status_code == 200
    assert len(upstream.requests) == 2
