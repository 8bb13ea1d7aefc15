"""Calls through a real server to a scripted upstream: fidelity, errors, hang-ups, limits; each leaves one span."""

import gzip
import hashlib
import json
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import brotli
import httpx
import pytest
import zstandard

from tests.fake_upstream import (
    FakeUpstream,
    Received,
    Reply,
    chat,
    chat_events,
    chunk,
    error_reply,
    json_reply,
    sse_reply,
    usage_chunk,
)
from tests.patience import within
from tests.unit.proxy.harness import Worker, wait_for, worker

BODY = b'{ "model":"m" ,"messages":[{"role":"user","content":"h\\u00e9"}], "seed":12345678901234567890123,"t":1e2 }'
STREAM = b'{"model":"m","messages":[],"stream":true,"stream_options":{"include_usage":true}}'
PLAIN = b'{"model":"m","messages":[],"stream":true}'
SETTINGS: dict[str, Any] = {
    "server": {"max_body_mb": 1},
    "upstream": {"connect_timeout": 1, "read_timeout": 0.4, "retries": 1},
}


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture(scope="module")
def shared(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with worker(Path(tmp_path_factory.mktemp("data")), upstream.url, **SETTINGS) as running:
        yield running


@pytest.fixture
def proxy(shared: Worker, upstream: FakeUpstream) -> Worker:
    shared.spans.clear()
    upstream.forget()
    return shared


def post(proxy: Worker, body: bytes = BODY, path: str = "/chat/completions", **headers: str) -> httpx.Response:
    given = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return proxy.client.post(proxy.url + path, content=body, headers=given, timeout=20)


def raw(proxy: Worker, request: bytes) -> socket.socket:
    """A connection on which a request was sent."""
    connection = socket.create_connection(("127.0.0.1", int(proxy.root.rpartition(":")[2])), timeout=10)
    connection.sendall(request)
    return connection


def request(body: bytes, path: str = "/v1/chat/completions", *extra: bytes) -> bytes:
    lines = [b"POST %s HTTP/1.1" % path.encode(), b"host: localhost", b"content-length: %d" % len(body), *extra]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def test_request_and_answer_pass_byte_for_byte(proxy: Worker, upstream: FakeUpstream) -> None:
    answer = b'{\n  "id":"x", "big":123456789012345678901234567890,"choices":[] ,"token_ids":[1], "\xc3\xbc":1e2}\n'
    upstream.reply(json_reply(answer, headers=[("x-request-id", "req_1"), ("openai-version", "1")]))
    reply = post(proxy)
    assert upstream.requests[0].body == BODY
    assert sha(reply.content) == sha(answer)
    assert (reply.headers["x-request-id"], reply.headers["openai-version"]) == ("req_1", "1")
    assert reply.headers["content-length"] == str(len(answer))
    span = proxy.span(count=1)
    assert (span["status"], span["http_status"], span["operation"]) == ("ok", 200, "chat")
    assert (span["request_bytes"], span["response_bytes"]) == (len(BODY), len(answer))
    assert json.loads(span["input_messages"]) == [{"role": "user", "content": "hé"}]


def test_a_stream_passes_byte_for_byte(proxy: Worker, upstream: FakeUpstream) -> None:
    events = [b": ping\n\n", *chat_events("Grüße")]
    upstream.reply(sse_reply(events, headers=[("x-request-id", "req_2")]))
    reply = post(proxy, STREAM)
    assert upstream.requests[0].body == STREAM
    assert sha(reply.content) == sha(b"".join(events))
    assert reply.headers["content-type"] == "text/event-stream"
    span = proxy.span(count=1)
    assert (span["stream"], span["status"], span["input_tokens"], span["finish_reason"]) == (True, "ok", 11, "stop")
    assert json.loads(span["output_messages"])[0]["content"] == "Grüße"
    assert span["ttft_ms"] is not None


def test_usage_is_asked_for_and_its_chunk_taken_out_again(proxy: Worker, upstream: FakeUpstream) -> None:
    reply = post(proxy, PLAIN)
    assert upstream.requests[0].json["stream_options"] == {"include_usage": True}
    assert reply.content == b"".join(chat_events(usage=False))
    assert proxy.span(count=1)["output_tokens"] == 3


def test_headers_go_upstream_but_for_those_of_this_hop_and_ours(proxy: Worker, upstream: FakeUpstream) -> None:
    post(
        proxy, authorization="Bearer sk-mine", openai_organization="org", x_ratchet_episode="e1", x_ratchet_other="x",
        accept_encoding="gzip", cookie="a=b", user_agent="agent/1", connection="x-hop, close", x_hop="1",
    )  # fmt: skip
    sent = upstream.requests[0].headers
    assert sent["authorization"] == "Bearer sk-mine"
    assert (sent["openai-organization"], sent["user-agent"]) == ("org", "agent/1")
    assert sent["accept-encoding"] == "identity"
    assert sent["host"] == f"127.0.0.1:{upstream.port}"
    assert not {name for name in sent if name.startswith("x-ratchet") or name in ("cookie", "x-hop")}
    assert "sk-mine" not in json.dumps(proxy.span(count=1))


def test_every_recorded_call_names_its_episode_and_span(proxy: Worker) -> None:
    trace = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    reply = post(proxy, traceparent=trace)
    span = proxy.span(count=1)
    assert reply.headers["x-ratchet-episode"] == span["episode_id"] == "ab" * 16
    assert reply.headers["x-ratchet-span"] == span["span_id"]
    assert reply.headers["x-ratchet-versions"] == ""
    assert (span["trace_id"], span["parent_span_id"]) == ("ab" * 16, "cd" * 8)


SPELLINGS = [
    "/v1/chat/completions",
    "/chat/completions",
    "/v1/v1/chat/completions",
    "/e/task-1/v1/chat/completions",
    "/e/task-1/chat/completions",
]


@pytest.mark.parametrize("path", SPELLINGS)
def test_a_call_is_served_under_every_spelling_of_its_path(proxy: Worker, upstream: FakeUpstream, path: str) -> None:
    reply = proxy.client.post(proxy.root + path + "?api-version=2", content=BODY)
    assert reply.status_code == 200
    assert upstream.requests[0].target == "/v1/chat/completions?api-version=2"
    span = proxy.span(count=1)
    assert span["route"].removeprefix("/v1") == "/chat/completions"
    if "/e/" in path:
        assert (span["episode_id"], span["episode_source"]) == ("task-1", "url")


def test_other_paths_are_relayed_as_they_are_and_recorded_by_size(proxy: Worker, upstream: FakeUpstream) -> None:
    blob = bytes(range(256)) * 2000
    upstream.reply(Reply(200, (("content-type", "audio/mpeg"),), (blob,)))
    reply = post(proxy, b'{"model":"tts","input":"secret words"}', "/audio/speech?x=1")
    assert reply.content == blob
    upstream.reply(Reply(200, (("content-type", "application/json"),), (b"{}",)))
    assert proxy.client.get(proxy.url + "/files/a%20b").content == b"{}"
    assert [r.target for r in upstream.requests] == ["/v1/audio/speech?x=1", "/v1/files/a%20b"]
    assert [r.method for r in upstream.requests] == ["POST", "GET"]
    span = proxy.span(0, count=2)
    assert (span["operation"], span["request_model"], span["response_bytes"]) == ("other", "tts", len(blob))
    assert span["input_messages"] is span["output_messages"] is None
    assert proxy.span(1)["route"] == "/v1/files/a%20b"


@pytest.mark.parametrize(
    ("method", "path", "seen"),
    [
        ("GET", "/v1/models", "/v1/models"),
        ("GET", "/e/x/v1/models", "/v1/models"),
        ("GET", "/e/x/with/s@1/v1/models/a%20b", "/v1/models/a b"),
        ("GET", "/v1/v1/models", "/v1/models"),
        ("GET", "/models", "/models"),
        ("POST", "/reward", "/reward"),
        ("POST", "/v1/traces", "/v1/traces"),
        ("GET", "/healthz", "/healthz"),
    ],
)
def test_what_is_not_relayed_goes_to_the_other_routes_without_its_scope(
    proxy: Worker, method: str, path: str, seen: str
) -> None:
    assert proxy.client.request(method, proxy.root + path).text == f"cold {method} {seen}"
    assert proxy.spans == []


@pytest.mark.parametrize("path", ["/v1/../admin", "/v1/x/%2e%2e/y", "/e/../v1/models", "/v1/./x"])
def test_a_path_that_climbs_is_refused(proxy: Worker, upstream: FakeUpstream, path: str) -> None:
    connection = raw(proxy, b"GET %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n" % path.encode())
    assert b" 400 " in connection.recv(4096).split(b"\r\n")[0]
    connection.close()
    assert upstream.requests == []


@pytest.mark.parametrize("bad", [b"", b"{", b"[1]", b"\xff\xfe", b'{"a":"\\ud800"}'])
def test_a_body_that_is_no_json_object_is_relayed_as_it_is_and_recorded(
    proxy: Worker, upstream: FakeUpstream, bad: bytes
) -> None:
    upstream.reply(error_reply(400, kind="invalid_request_error"))
    assert post(proxy, bad).status_code == 400
    assert upstream.requests[0].body == bad
    span = proxy.span(count=1)
    assert (span["status"], span["error_type"], span["input_messages"]) == ("error", "invalid_request_error", None)


@pytest.mark.parametrize("levels", [65, 500, 50_000])
def test_a_body_nested_beyond_all_need_is_refused_and_recorded(
    proxy: Worker, upstream: FakeUpstream, levels: int
) -> None:
    reply = post(proxy, b'{"a":' * levels + b"1" + b"}" * levels)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "json_too_deep")
    assert upstream.requests == []
    assert proxy.span(count=1)["error_type"] == "json_too_deep"


def test_a_packed_body_is_read_and_forwarded_unpacked(proxy: Worker, upstream: FakeUpstream) -> None:
    packed = {
        "gzip": gzip.compress(BODY),
        "deflate": zlib.compress(BODY),
        "x-gzip": gzip.compress(BODY),
        "zstd": zstandard.compress(BODY),
        "br": brotli.compress(BODY),
    }
    for encoding, body in packed.items():
        post(proxy, body, content_encoding=encoding)
        assert upstream.requests[-1].body == BODY
        assert "content-encoding" not in upstream.requests[-1].headers
    assert all("hé" in span["input_messages"] for span in proxy.spans)


def test_a_body_in_an_unknown_encoding_is_relayed_as_it_is(proxy: Worker, upstream: FakeUpstream) -> None:
    post(proxy, b"\x1b\x03packed", content_encoding="compress")
    assert upstream.requests[0].body == b"\x1b\x03packed"
    assert upstream.requests[0].headers["content-encoding"] == "compress"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd", "br"])
def test_a_body_that_is_not_in_the_encoding_it_names_is_refused(proxy: Worker, encoding: str) -> None:
    reply = post(proxy, b"this is plain text", content_encoding=encoding)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "content-encoding")
    assert proxy.span(count=1)["error_type"] == "bad_request"


def test_bodies_over_the_limit_are_refused_packed_unpacked_declared_or_not(
    proxy: Worker, upstream: FakeUpstream
) -> None:
    big = b'{"x":"' + b"a" * (1 << 20) + b'"}'
    chunked = proxy.client.post(proxy.url + "/chat/completions", content=iter([big[: 1 << 19], big[1 << 19 :]]))
    replies = [post(proxy, big), chunked, post(proxy, gzip.compress(bytes(32 << 20), 1), content_encoding="gzip")]
    for reply in replies:
        assert reply.status_code == 413
        assert reply.json()["error"] == {
            "message": "the body is larger than 1 MB (server.max_body_mb)",
            "type": "ratchet_error",
            "param": "body",
            "code": "body_too_large",
        }
        assert reply.headers["x-ratchet-span"]
    assert upstream.requests == []
    assert [(s["status"], s["error_type"], s["http_status"]) for s in proxy.spans] == [
        ("error", "body_too_large", 413)
    ] * 3


def test_expect_100_continue_is_answered(proxy: Worker) -> None:
    head, body = request(BODY, "/v1/chat/completions", b"expect: 100-continue").split(b"\r\n\r\n", 1)
    connection = raw(proxy, head + b"\r\n\r\n")
    assert connection.recv(4096).startswith(b"HTTP/1.1 100 Continue")
    connection.sendall(body)
    assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    connection.close()


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500, 503])
@pytest.mark.parametrize("body", [BODY, STREAM])
def test_an_upstream_error_passes_as_it_is(proxy: Worker, upstream: FakeUpstream, status: int, body: bytes) -> None:
    upstream.reply(error_reply(status, "slow down", "rate_limit_error", headers=[("retry-after", "7")]))
    reply = post(proxy, body)
    assert (reply.status_code, reply.headers["retry-after"]) == (status, "7")
    assert reply.json()["error"]["message"] == "slow down"
    assert len(upstream.requests) == 1
    span = proxy.span(count=1)
    assert (span["status"], span["http_status"], span["error_type"]) == ("error", status, "rate_limit_error")


def test_an_error_without_a_type_is_named_by_its_status(proxy: Worker, upstream: FakeUpstream) -> None:
    upstream.reply(Reply(502, (("content-type", "text/html"),), (b"<h1>Bad gateway</h1>",)))
    assert post(proxy).text == "<h1>Bad gateway</h1>"
    assert proxy.span(count=1)["error_type"] == "http_502"


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_an_upstream_that_resets_before_its_answer_is_tried_again(
    proxy: Worker, upstream: FakeUpstream, body: bytes
) -> None:
    upstream.reply(Reply(end="reset"))
    assert post(proxy, body).status_code == 200
    assert len(upstream.requests) == 2
    assert (proxy.span(count=1)["status"], proxy.span()["attempts"]) == ("ok", 2)


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_an_upstream_that_always_resets_is_a_502(proxy: Worker, upstream: FakeUpstream, body: bytes) -> None:
    upstream.reply(Reply(end="reset"), Reply(end="close"))
    reply = post(proxy, body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (502, "upstream_unreachable")
    assert reply.json()["error"]["type"] == "ratchet_error"
    span = proxy.span(count=1)
    assert (span["status"], span["error_type"], span["attempts"]) == ("error", "upstream_unreachable", 2)


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_an_upstream_that_says_nothing_is_a_504(proxy: Worker, upstream: FakeUpstream, body: bytes) -> None:
    upstream.reply(Reply(end="hang"))
    reply = post(proxy, body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "upstream_timeout")
    assert len(upstream.requests) == 1
    assert (proxy.span(count=1)["error_type"], proxy.span()["attempts"]) == ("upstream_timeout", 1)


@pytest.mark.parametrize(("end", "code"), [("close", "upstream_broken"), ("reset", "upstream_broken")])
def test_a_json_answer_that_is_cut_is_a_502(proxy: Worker, upstream: FakeUpstream, end: str, code: str) -> None:
    upstream.reply(Reply(200, (("content-type", "application/json"),), (b'{"id":"x",',), end=end))
    reply = post(proxy)
    assert (reply.status_code, reply.json()["error"]["code"]) == (502, code)
    assert len(upstream.requests) == 1
    assert (proxy.span(count=1)["status"], proxy.span()["error_type"]) == ("error", code)


@pytest.mark.parametrize(
    ("end", "code"), [("close", "upstream_broken"), ("reset", "upstream_broken"), ("hang", "upstream_timeout")]
)
def test_a_stream_that_breaks_ends_unclean_after_the_bytes_so_far(
    proxy: Worker, upstream: FakeUpstream, end: str, code: str
) -> None:
    parts = [chunk({"content": "Pa"}), chunk({"content": "ri"}), b'data: {"cho']
    upstream.reply(sse_reply(parts, end=end))
    got = b""
    with (
        pytest.raises(httpx.RemoteProtocolError),
        proxy.client.stream("POST", proxy.url + "/chat/completions", content=STREAM) as reply,
    ):
        for part in reply.iter_raw():
            got += part
    assert got == b"".join(parts)
    span = proxy.span(count=1)
    assert (span["status"], span["error_type"], span["http_status"]) == ("error", code, 200)
    assert json.loads(span["output_messages"])[0]["content"] == "Pari"


def test_nobody_listening_upstream_is_a_502_and_two_attempts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with worker(tmp_path, f"http://127.0.0.1:{port}/v1") as proxy:
        reply = post(proxy)
        assert (reply.status_code, reply.json()["error"]["code"]) == (502, "upstream_unreachable")
        assert proxy.span(count=1)["attempts"] == 2


def test_a_client_that_leaves_a_stream_cancels_it_upstream(proxy: Worker, upstream: FakeUpstream) -> None:
    upstream.reply(sse_reply([chunk({"content": "Pa"}), chunk({"content": "ri"})], end="hang"))
    connection = raw(proxy, request(STREAM))
    got = b""
    while b'"ri"' not in got:
        got += connection.recv(4096)
    left = time.monotonic()
    connection.close()
    assert upstream.requests[0].gone.wait(within(1))
    span = proxy.span(count=1)
    assert time.monotonic() - left < within(1)
    assert (span["status"], span["http_status"], span["error_type"]) == ("cancelled", 200, None)
    assert json.loads(span["output_messages"])[0]["content"] == "Pari"


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_a_client_that_leaves_before_the_first_byte_cancels_upstream(
    proxy: Worker, upstream: FakeUpstream, body: bytes
) -> None:
    upstream.reply(Reply(end="hang"))
    connection = raw(proxy, request(body))
    wait_for(lambda: len(upstream.requests) == 1)
    connection.close()
    assert upstream.requests[0].gone.wait(within(1))
    span = proxy.span(count=1)
    assert (span["status"], span["http_status"], span["output_messages"]) == ("cancelled", None, None)


def test_a_client_that_leaves_while_a_json_answer_comes_cancels_upstream(proxy: Worker, upstream: FakeUpstream) -> None:
    upstream.reply(Reply(200, (("content-type", "application/json"),), (b'{"id":',), end="hang"))
    connection = raw(proxy, request(BODY))
    wait_for(lambda: len(upstream.requests) == 1)
    connection.close()
    assert upstream.requests[0].gone.wait(within(1))
    assert proxy.span(count=1)["status"] == "cancelled"


def test_a_client_that_leaves_while_it_sends_leaves_a_span(proxy: Worker, upstream: FakeUpstream) -> None:
    raw(proxy, request(BODY)[:-10]).close()
    assert proxy.span(count=1)["status"] == "cancelled"
    assert upstream.requests == []


def test_a_call_is_recorded_before_its_last_byte_arrives(proxy: Worker, upstream: FakeUpstream) -> None:
    for body in (BODY, STREAM, PLAIN):
        proxy.spans.clear()
        connection = raw(proxy, request(body))
        got = b""
        while not (b"[DONE]" in got or (body is BODY and b"Paris" in got)):
            got += connection.recv(1 << 16)
        assert len(proxy.spans) == 1
        connection.close()
    upstream.reply(sse_reply(chat_events()[:-1]))
    proxy.spans.clear()
    connection = raw(proxy, request(STREAM))
    got = b""
    while not got.endswith(b"0\r\n\r\n"):
        got += connection.recv(1 << 16)
    assert len(proxy.spans) == 1
    connection.close()


def test_an_upstream_that_compresses_anyway_passes_as_it_is_and_is_read(proxy: Worker, upstream: FakeUpstream) -> None:
    upstream.reply(json_reply(gzip.compress(chat("Rome").body), headers=[("content-encoding", "gzip")]))
    reply = post(proxy)
    assert reply.headers["content-encoding"] == "gzip"
    assert reply.json()["choices"][0]["message"]["content"] == "Rome"
    assert "Rome" in proxy.span(count=1)["output_messages"]


def test_token_ids_and_logprobs_are_recorded(proxy: Worker, upstream: FakeUpstream) -> None:
    logprobs = {"content": [{"token": "P", "logprob": -0.5}]}
    message = {"role": "assistant", "content": "P"}
    body = {"prompt_token_ids": [1, 2], "choices": [{"message": message, "token_ids": [3], "logprobs": logprobs}]}
    upstream.reply(json_reply(body))
    post(proxy)
    span = proxy.span(count=1)
    assert json.loads(span["token_ids"]) == {"prompt": [1, 2], "completion": [[3]]}
    assert json.loads(span["logprobs"]) == [logprobs]


def test_images_are_relayed_whole_and_recorded_by_hash(proxy: Worker, upstream: FakeUpstream) -> None:
    image = "A" * 300_000
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + image}}
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": [part]}]}).encode()
    post(proxy, body)
    assert upstream.requests[0].body == body
    recorded = proxy.span(count=1)["input_messages"]
    assert hashlib.sha256(image.encode()).hexdigest() in recorded
    assert len(recorded) < 500


def test_secrets_in_a_prompt_are_masked_in_the_record_only(proxy: Worker, upstream: FakeUpstream) -> None:
    secret = "sk-" + "a1b2c3d4" * 4
    post(proxy, json.dumps({"model": "m", "messages": [{"role": "user", "content": secret}]}).encode())
    assert secret.encode() in upstream.requests[0].body
    assert secret not in json.dumps(proxy.span(count=1))


@pytest.mark.parametrize("where", ["url", "header", "metadata"])
def test_an_episode_id_that_can_not_be_one_is_a_400_and_a_span(
    proxy: Worker, upstream: FakeUpstream, where: str
) -> None:
    body = json.dumps({"model": "m", "messages": [], "metadata": {"episode_id": "a b"}}).encode()
    if where == "url":
        reply = proxy.client.post(proxy.root + "/e/a%20b/v1/chat/completions", content=BODY)
    elif where == "header":
        reply = post(proxy, x_ratchet_episode="a b")
    else:
        reply = post(proxy, body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_episode_id")
    assert upstream.requests == []
    assert proxy.span(count=1)["error_type"] == "invalid_episode_id"
    assert proxy.span()["episode_id"] == reply.headers["x-ratchet-episode"]


def test_an_agent_with_tools_is_one_episode_without_any_header(proxy: Worker, upstream: FakeUpstream) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    upstream.reply(chat(None, tool_calls=[call]))
    messages: list[dict[str, Any]] = [{"role": "user", "content": "weather? " + str(time.time_ns())}]
    first = post(proxy, json.dumps({"model": "m", "messages": messages}).encode())
    messages += [first.json()["choices"][0]["message"], {"role": "tool", "tool_call_id": "c1", "content": "20"}]
    # The second step is streamed, the third goes by what the stream said.
    second = post(proxy, json.dumps({"model": "m", "messages": messages, "stream": True}).encode())
    messages += [{"role": "assistant", "content": "Paris"}, {"role": "user", "content": "and?"}]
    third = post(proxy, json.dumps({"model": "m", "messages": messages}).encode())
    assert (
        first.headers["x-ratchet-episode"] == second.headers["x-ratchet-episode"] == third.headers["x-ratchet-episode"]
    )
    assert [span["episode_source"] for span in proxy.spans] == ["new", "chain", "chain"]


def test_a_failed_step_is_retried_in_its_episode(proxy: Worker, upstream: FakeUpstream) -> None:
    messages = [{"role": "user", "content": "hi " + str(time.time_ns())}]
    first = post(proxy, json.dumps({"model": "m", "messages": messages}).encode())
    messages += [{"role": "assistant", "content": "Paris"}, {"role": "user", "content": "and?"}]
    body = json.dumps({"model": "m", "messages": messages}).encode()
    upstream.reply(error_reply(500))
    replies = [first, post(proxy, body), post(proxy, body)]
    assert [reply.status_code for reply in replies] == [200, 500, 200]
    assert len({reply.headers["x-ratchet-episode"] for reply in replies}) == 1


def test_a_bug_of_ours_is_a_500_and_a_span(
    proxy: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("proxy.relay.identify", broken)
    reply = post(proxy)
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "ratchet_error")
    assert proxy.span(count=1)["error_type"] == "internal_error"
    assert "a bug" in caplog.text


def test_websockets_are_refused_with_a_clear_error(proxy: Worker) -> None:
    key = b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
    head = b"GET /v1/realtime HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n" + key
    connection = raw(proxy, head + b"\r\n")
    got = connection.recv(4096)
    assert b" 400 " in got.split(b"\r\n")[0]
    assert b"websocket" in got
    connection.close()


def test_a_like_call_after_many_reuses_its_connection(proxy: Worker, upstream: FakeUpstream) -> None:
    before = upstream.connections
    for _ in range(20):
        post(proxy)
    assert upstream.connections - before <= 1
    assert len(proxy.spans) == 20


def test_an_answer_to_a_stream_request_may_be_json(proxy: Worker, upstream: FakeUpstream) -> None:
    def echo(received: Received) -> Reply:
        return chat("whole")

    upstream.reply(echo)
    assert post(proxy, PLAIN).json()["choices"][0]["message"]["content"] == "whole"
    assert "whole" in proxy.span(count=1)["output_messages"]


def test_a_client_that_asked_for_usage_gets_it(proxy: Worker) -> None:
    assert usage_chunk() in post(proxy, STREAM).content


def test_a_call_over_the_cap_is_a_503_and_a_span(tmp_path: Path, upstream: FakeUpstream) -> None:
    upstream.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proxy.limits.MAX_CALLS", 1)
        with worker(tmp_path, upstream.url) as proxy:
            upstream.reply(Reply(end="hang"))
            connection = raw(proxy, request(BODY))
            wait_for(lambda: len(upstream.requests) == 1)
            reply = post(proxy)
            connection.close()
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
            assert sorted(span["status"] for span in (proxy.span(0, count=2), proxy.span(1))) == ["cancelled", "error"]


def test_an_answer_beyond_all_measure_is_relayed_whole_and_recorded_in_part(
    tmp_path: Path, upstream: FakeUpstream
) -> None:
    upstream.forget()
    long = "x" * 50_000
    with worker(tmp_path, upstream.url, store={"max_answer_mb": 0.01}) as proxy:
        body = chat(long).body
        upstream.reply(chat(long), Reply(200, chat().headers, (body[:30_000], body[30_000:]), chunked=True))
        assert post(proxy).content == body
        assert post(proxy).content == body
        events = chat_events(long[:300])
        upstream.reply(sse_reply(events))
        assert post(proxy, STREAM).content == b"".join(events)
        spans = [proxy.span(index, count=3) for index in range(3)]
    assert all(json.loads(span["attributes"]) == {"truncated": True} for span in spans)
    assert all(span["status"] == "ok" for span in spans)
    assert spans[0]["output_messages"] is None
    assert spans[0]["response_bytes"] == len(body)
    recorded = json.loads(spans[2]["output_messages"])[0]["content"]
    assert recorded
    assert len(recorded) < 300
