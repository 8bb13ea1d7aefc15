"""Everything that can go wrong at an upstream, in JSON and in a stream, in two dialects: the client gets the upstream's
own bytes or an envelope that SDKs understand, never a hang, and each call leaves exactly one span."""

import gzip
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.fake_upstream import FakeUpstream, Reply, chunk, data
from tests.unit.proxy.harness import Worker, worker

JSON, SSE = (("content-type", "application/json"),), (("content-type", "text/event-stream"),)
HALF = b'{"id":"x","choices":[{"index":0,'
LATER = (("content-type", "application/json"), ("retry-after", "7"))
LIMIT = b'{"error":{"message":"slow down","type":"rate_limit_error","param":null,"code":null}}'
BUSY = b'{"type":"error","error":{"type":"overloaded_error","message":"busy"}}'


@dataclass(frozen=True)
class Fault:
    """What the upstream does, and what comes of it: our envelope (`code`), or its own answer (`error`: the span's)."""

    name: str
    reply: Reply = field(default_factory=Reply)
    status: int = 502
    code: str | None = None
    error: str | None = None
    attempts: int = 1
    model: str = "m"

    @property
    def waits(self) -> bool:
        """Whether only a timeout ends it."""
        return self.reply.end == "hang" or self.model == "unreachable"


FAULTS = [
    Fault("connection refused", status=502, code="upstream_unreachable", attempts=2, model="refused"),
    Fault("connect timeout", status=504, code="upstream_timeout", model="unreachable"),
    Fault("reset before the head", Reply(end="reset"), code="upstream_unreachable", attempts=2),
    Fault("closed before the head", Reply(end="close"), code="upstream_unreachable", attempts=2),
    Fault("silence", Reply(end="hang"), 504, "upstream_timeout"),
    Fault("half a head", Reply(parts=(b"HTTP/1.1 200 OK\r\nx-a",), end="hang", raw=True), 504, "upstream_timeout"),
    Fault("no HTTP", Reply(parts=(b"SSH-2.0-OpenSSH_9.6\r\n",), raw=True), code="upstream_unreachable"),
    Fault("an endless head", Reply(parts=(b"HTTP/1.1 200 OK\r\nx: " + b"a" * 262_144,), raw=True),
          code="upstream_unreachable"),
    Fault("429", Reply(429, LATER, (LIMIT,)), 429, error="rate_limit_error"),
    Fault("500 with HTML", Reply(500, (("content-type", "text/html"),), (b"<h1>Oops</h1>",)), 500, error="http_500"),
    Fault("503 with Retry-After", Reply(503, LATER, (BUSY,)), 503, error="overloaded_error"),
    Fault("an empty 502", Reply(502, JSON), 502, error="http_502"),
    Fault("a redirect", Reply(307, (("location", "/v1/elsewhere"),)), 307),
]  # fmt: skip
# Of a 200 that is no sound answer the client gets every byte; what can be told of it only in JSON is told as an error.
BODIES = [
    Fault("JSON that is none", Reply(200, JSON, (b'{"id": nope',)), 200),
    Fault("another content type", Reply(200, (("content-type", "text/plain"),), (b"hello",)), 200),
    Fault("gzip that is none", Reply(200, (*JSON, ("content-encoding", "gzip")), (b"\x1f\x8bnope",)), 200),
    Fault("a list instead of an object", Reply(200, JSON, (b"[1,2]",)), 200),
    Fault("an error in a 200", Reply(200, JSON, (BUSY,)), 200, error="overloaded_error"),
    Fault("cut gzip", Reply(200, (*JSON, ("content-encoding", "gzip")), (gzip.compress(HALF)[:-9],)), 200),
]
CUTS = [
    Fault("reset in the body", Reply(200, JSON, (HALF,), end="reset"), 502, "upstream_broken"),
    Fault("a body shorter than it says", Reply(200, JSON, (HALF,), end="close"), 502, "upstream_broken"),
    Fault("silence in the body", Reply(200, JSON, (HALF,), end="hang"), 504, "upstream_timeout"),
    Fault("chunks that are none", Reply(parts=(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
          b"transfer-encoding: chunked\r\n\r\nzz\r\n{}",), raw=True), 502, "upstream_broken"),
]  # fmt: skip
BEGUN = {
    "chat/completions": chunk({"role": "assistant", "content": "Par"}),
    "messages": data({"type": "message_start", "message": {"id": "msg_1", "model": "c", "usage": {"input_tokens": 3}}})
    + data({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
    + data({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Par"}}),
}
STREAM_CUTS = {
    "reset": ("reset", "upstream_broken"),
    "closed": ("close", "upstream_broken"),
    "silence": ("hang", "upstream_timeout"),
}
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
DIALECTS = pytest.mark.parametrize("tail", list(BEGUN))


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture(scope="module")
def deaf() -> Iterator[str]:
    """A port that takes no connection: its queue is full."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    waiting = []
    for _ in range(4):
        one = socket.socket()
        one.setblocking(False)
        one.connect_ex(listener.getsockname())
        waiting.append(one)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    for one in (*waiting, listener):
        one.close()


@pytest.fixture(scope="module")
def workers(
    upstream: FakeUpstream, deaf: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[bool, Worker]]:
    """One that waits, and one that soon doesn't, for what never comes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    models = [
        {
            "model_name": f"{name}-{provider}",
            "litellm_params": {"model": f"{provider}/x", "api_base": base, "api_key": "k"},
        }
        for name, base in (("refused", closed), ("unreachable", deaf))
        for provider in ("openai", "anthropic")
    ]

    def settings(seconds: float) -> Any:
        waits = {"connect_timeout": seconds, "read_timeout": seconds, "retries": 1}
        return {"upstream": waits, "model_list": models}

    folder = tmp_path_factory.mktemp
    with (
        worker(folder("patient"), upstream.url, **settings(20)) as patient,
        worker(folder("hasty"), upstream.url, **settings(0.3)) as hasty,
    ):
        yield {False: patient, True: hasty}


@pytest.fixture
def proxies(workers: dict[bool, Worker], upstream: FakeUpstream) -> dict[bool, Worker]:
    for one in workers.values():
        one.spans.clear()
    upstream.forget()
    return workers


@pytest.fixture
def proxy(proxies: dict[bool, Worker], request: pytest.FixtureRequest) -> Worker:
    """The hasty one where the fault is that nothing comes."""
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    fault = given.get("fault")
    waits = given.get("cut") == "silence" or (fault is not None and fault.waits)
    return proxies[waits]


def body(tail: str, model: str, stream: bool) -> dict[str, Any]:
    named = model if model == "m" else f"{model}-{'anthropic' if tail == 'messages' else 'openai'}"
    return {"model": named, "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}], "stream": stream}


def post(proxy: Worker, tail: str, model: str, stream: bool) -> httpx.Response:
    return proxy.client.post(f"{proxy.url}/{tail}", json=body(tail, model, stream), follow_redirects=False)


def check_envelope(reply: httpx.Response, code: str) -> None:
    """OpenAI's envelope, which Anthropic's SDK reads as well: an `error` with a message and a type."""
    assert reply.headers["content-type"] == "application/json"
    assert int(reply.headers["content-length"]) == len(reply.content)
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("ratchet_error", code)
    assert error["message"]


@DIALECTS
@STREAMED
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_before_the_answer(
    proxy: Worker, upstream: FakeUpstream, fault: Fault, stream: bool, tail: str
) -> None:
    upstream.reply(*[fault.reply] * 2)
    reply = post(proxy, tail, fault.model, stream)
    assert reply.status_code == fault.status
    span = proxy.span(count=1)
    assert (span["http_status"], span["attempts"], span["stream"]) == (fault.status, fault.attempts, stream)
    if fault.code is not None:
        check_envelope(reply, fault.code)
        assert (span["status"], span["error_type"]) == ("error", fault.code)
    else:
        assert reply.content == fault.reply.body
        for name, value in fault.reply.headers:
            assert reply.headers[name] == value
        assert span["error_type"] == fault.error
    if fault.model == "m":
        assert len(upstream.requests) == fault.attempts


@DIALECTS
@STREAMED
@pytest.mark.parametrize("fault", BODIES, ids=lambda fault: fault.name)
def test_a_body_that_is_not_what_it_should_be_passes_byte_for_byte(
    proxy: Worker, upstream: FakeUpstream, fault: Fault, stream: bool, tail: str
) -> None:
    upstream.reply(fault.reply)
    with proxy.client.stream("POST", f"{proxy.url}/{tail}", json=body(tail, "m", stream)) as reply:
        assert b"".join(reply.iter_raw()) == fault.reply.body
    assert reply.status_code == 200
    span = proxy.span(count=1)
    assert span["error_type"] == fault.error
    assert span["response_bytes"] == len(fault.reply.body)


@DIALECTS
@STREAMED
@pytest.mark.parametrize("fault", CUTS, ids=lambda fault: fault.name)
def test_a_json_answer_that_breaks_off_is_an_envelope(
    proxy: Worker, upstream: FakeUpstream, fault: Fault, stream: bool, tail: str
) -> None:
    upstream.reply(fault.reply)
    reply = post(proxy, tail, "m", stream)
    assert reply.status_code == fault.status
    assert fault.code is not None
    check_envelope(reply, fault.code)
    span = proxy.span(count=1)
    assert (span["status"], span["error_type"], span["attempts"]) == ("error", fault.code, 1)
    assert len(upstream.requests) == 1


@DIALECTS
@pytest.mark.parametrize("cut", STREAM_CUTS)
def test_a_stream_that_breaks_off_ends_unclean_with_the_partial_text_recorded(
    proxy: Worker, upstream: FakeUpstream, cut: str, tail: str
) -> None:
    end, code = STREAM_CUTS[cut]
    upstream.reply(Reply(200, SSE, (BEGUN[tail],), chunked=True, end=end))
    got = b""
    with (
        pytest.raises(httpx.RemoteProtocolError),
        proxy.client.stream("POST", f"{proxy.url}/{tail}", json=body(tail, "m", True)) as reply,
    ):
        for part in reply.iter_raw():
            got += part
    assert got == BEGUN[tail]
    span = proxy.span(count=1)
    assert (span["status"], span["error_type"], span["http_status"]) == ("error", code, 200)
    assert "Par" in span["output_messages"]


@DIALECTS
def test_a_stream_of_something_else_than_events_passes(proxy: Worker, upstream: FakeUpstream, tail: str) -> None:
    odd = b"\xff\xfenot an event\r\rdata: {\n\ndata: [1]\n\n\x00"
    upstream.reply(Reply(200, SSE, (odd[:7], odd[7:]), chunked=True))
    reply = post(proxy, tail, "m", True)
    assert reply.content == odd
    assert proxy.span(count=1)["status"] == "ok"


def test_a_call_after_each_fault_is_served_on_a_sound_connection(proxy: Worker, upstream: FakeUpstream) -> None:
    for fault in [*FAULTS, *CUTS]:
        if fault.model == "m" and not fault.waits:
            upstream.reply(*[fault.reply] * fault.attempts)
            post(proxy, "chat/completions", "m", False)
            assert post(proxy, "chat/completions", "m", False).json()["choices"][0]["message"]["content"] == "Paris"
    assert [span["status"] for span in proxy.spans[1::2]] == ["ok"] * (len(proxy.spans) // 2)
