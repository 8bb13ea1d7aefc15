"""What an engine says reaches the client to the byte, in every dialect, however it arrives; and it is recorded."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.table import Table
from tests.fake_upstream import FakeUpstream, Reply, chunk, data, usage_chunk
from tests.unit.proxy.harness import Registry, Worker, worker
from tests.unit.proxy.test_streaming import at_every_byte

OWN, BETTER = 'You are "terse" — né\n', "Be brief."
# Numbers that a double can't hold, floats in other spellings, escapes, odd white space, fields that nobody knows.
JSON = {
    "chat/completions": b'{ "id":"c-1","object":"chat.completion","created":1.0,"model":"q","zeta":{"b":1,"a":[1e2,-0.0'
    b"]},\n"
    b'"prompt_token_ids":[151644,8948,198],"choices":[{"index":0,"message":{"content":"P\\u00e2 \xf0\x9f\x98\x80",'
    b'"role":'
    b'"assistant","reasoning":null,"\xc3\xbc":1E-7},"logprobs":{"content":[{"token":"P","logprob":-0.10000000000000001,'
    b'"bytes":[80],"top_logprobs":[]}],"refusal":null},"finish_reason":"stop","stop_reason":null,"token_ids":[47,9]}],'
    b'"usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2},"kv_transfer_params":null,\t'
    b'"big":123456789012345678901234567890 }\n',
    "completions": b'{"choices":[{"text":" up\\u006fn","index":0,"logprobs":{"tokens":[" upon"],"token_logprobs":'
    b"[-1.50]},"
    b'"token_ids":[5],"finish_reason":"length"}],"id":"t-1","model":"q","prompt_token_ids":[1],"odd" : 1.0e0,'
    b'"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}',
    "responses": b'{"output":[{"type":"message","role":"assistant","content":[{"type":"output_text","text":"P\\u00e2",'
    b'"annotations":[]}],"x":9007199254740993}],"id":"r-1","model":"q","status":"completed","usage":{"input_tokens":3,'
    b'"output_tokens":2,"total_tokens":5}}',
    "messages": b'{"content":[{"text":"P\\u00e2","type":"text"}],"id":"m-1","model":"q","role":"assistant",'
    b'"type":"message",'
    b'"stop_reason":"end_turn","usage":{"output_tokens":2,"input_tokens":3,"service_tier":"standard"},"cost":0.10}',
    "embeddings": b'{"data":[{"embedding":[0.1,1e-9,-0.0],"index":0,"object":"embedding"}],"model":"q","object":"list",'
    b'"usage":{"prompt_tokens":3,"total_tokens":3}}',
}
TOKENS = {
    "chat/completions": (3, 2),
    "completions": (1, 2),
    "responses": (3, 2),
    "messages": (3, 2),
    "embeddings": (3, None),
}


def text(words: str, **more: Any) -> bytes:
    """One event of a completions stream."""
    choice = {"index": 0, "text": words, "finish_reason": None, **more}
    return data({"id": "t-1", "object": "text_completion", "model": "q", "choices": [choice]})


VLLM = [
    chunk({"role": "assistant", "content": ""}, prompt_token_ids=[151644, 8948], odd={"b": 1, "a": 1e-7}),
    b'data: {"id":"c-1","choices":[{"index":0,"delta":{"content":"P\xc3\xa2"},"token_ids":[47],"logprobs":'
    b'{"content":[{"token":'
    b'"P","logprob":-0.10}]},"finish_reason":null}],"big":123456789012345678901}\n\n',
    b": keep-alive\n\n",
    b'data: {"id":"c-1","choices":[{"index":0,"delta":{"content":"\xf0\x9f\x98\x80"},"token_ids":[9],'
    b'"finish_reason":"stop",'
    b'"stop_reason":null}]}\n\n',
]
COMPLETIONS = [text("P"), text("\u00e2", token_ids=[7]), text("", finish_reason="stop")]
DONE = b"data: [DONE]\n\n"


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture(scope="module")
def shared(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    registry = Registry()
    registry.add("terse", OWN, BETTER)
    registry.promote("terse", {"2": 1.0})
    with worker(Path(tmp_path_factory.mktemp("data")), upstream.url, registry) as running:
        yield running


@pytest.fixture
def proxy(shared: Worker, upstream: FakeUpstream) -> Worker:
    shared.spans.clear()
    upstream.forget()
    return shared


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Table(Path(tmp_path_factory.mktemp("t")) / "t") as table:
        yield table


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def asked(tail: str, prompt: str) -> bytes:
    """A request in each dialect with the prompt in its place, spelled as no serialiser of ours would."""
    spelled = json.dumps(prompt).encode()
    other = b'{"role" : "user","content":"h\\u00e9 "}'
    tails = {
        "chat/completions": b'"messages":[{"content": %s ,"role":"system"},%s]' % (spelled, other),
        "completions": b'"prompt":%s,"echo":false' % spelled,
        "responses": b'"instructions":%s, "input":[%s]' % (spelled, other),
        "messages": b'"system":%s,"messages":[%s]' % (spelled, other),
        "embeddings": b'"input":["a"]',
    }
    return b'{ "seed":12345678901234567890123,"t":1e2,\n%s ,"model":"q","max_tokens":9}' % tails[tail]


@pytest.mark.parametrize("pieces", ["whole", "by byte", "chunked by byte"])
@pytest.mark.parametrize("tail", list(JSON))
def test_a_json_answer_arrives_as_it_was_sent(proxy: Worker, upstream: FakeUpstream, tail: str, pieces: str) -> None:
    answer = JSON[tail]
    parts = (answer,) if pieces == "whole" else tuple(answer[at : at + 1] for at in range(len(answer)))
    upstream.reply(Reply(parts=parts, chunked="chunked" in pieces))
    reply = proxy.client.post(f"{proxy.url}/{tail}", content=asked(tail, "Unknown prompt."))
    assert sha(reply.content) == sha(answer)
    assert upstream.requests[0].body == asked(tail, "Unknown prompt.")
    span = proxy.span(count=1)
    assert (span["input_tokens"], span["output_tokens"]) == TOKENS[tail]
    assert span["response_bytes"] == len(answer)


def test_what_training_needs_is_recorded_as_the_engine_told_it(proxy: Worker, upstream: FakeUpstream) -> None:
    upstream.reply(Reply(parts=(JSON["chat/completions"],)))
    proxy.client.post(f"{proxy.url}/chat/completions", content=asked("chat/completions", "Unknown."))
    span = proxy.span(count=1)
    assert json.loads(span["token_ids"]) == {"prompt": [151644, 8948, 198], "completion": [[47, 9]]}
    assert json.loads(span["logprobs"])[0]["content"][0]["logprob"] == -0.1
    assert json.loads(span["output_messages"])[0]["content"] == "Pâ 😀"


@pytest.mark.parametrize("tail", ["chat/completions", "completions", "responses", "messages"])
def test_an_injected_prompt_changes_no_other_byte_of_the_request_and_none_of_the_answer(
    proxy: Worker, upstream: FakeUpstream, tail: str
) -> None:
    upstream.reply(Reply(parts=(JSON[tail],)))
    reply = proxy.client.post(f"{proxy.url}/{tail}", content=asked(tail, OWN), headers={"x-ratchet-slot": "terse"})
    assert reply.headers["x-ratchet-versions"] == "terse@2"
    assert upstream.requests[0].body == asked(tail, BETTER)
    assert sha(reply.content) == sha(JSON[tail])


def test_a_stream_with_an_injected_prompt_is_the_upstreams_but_for_the_usage_asked_for(
    proxy: Worker, upstream: FakeUpstream
) -> None:
    upstream.reply(Reply(200, (("content-type", "text/event-stream"),), (*VLLM, usage_chunk(), DONE), chunked=True))
    raw = asked("chat/completions", OWN)[:-1] + b',"stream":true}'
    reply = proxy.client.post(f"{proxy.url}/chat/completions", content=raw)
    assert reply.content == b"".join((*VLLM, DONE))
    sent = upstream.requests[0].body
    assert sent.replace(b'"stream_options":{"include_usage":true},', b"") == raw.replace(
        json.dumps(OWN).encode(), json.dumps(BETTER).encode()
    )
    span = proxy.span(count=1)
    assert json.loads(span["token_ids"]) == {"prompt": [151644, 8948], "completion": [[47, 9]]}
    assert span["input_tokens"] == 11


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize(
    ("tail", "events", "said"),
    [("chat/completions", VLLM, "Pâ😀"), ("completions", COMPLETIONS, "Pâ")],
    ids=["chat", "completions"],
)
def test_a_stream_of_token_ids_is_cut_at_every_byte_and_loses_only_the_usage_that_was_added(
    table: Table, tail: str, events: list[bytes], said: str, newline: bytes
) -> None:
    def spelled(*parts: bytes) -> bytes:
        return b"".join(parts).replace(b"\n", newline)

    stream = spelled(*events, usage_chunk(), DONE)
    wanted = sha(spelled(*events, DONE))
    for heard in at_every_byte(table, stream, tail, stripping=True):
        assert sha(heard.body) == wanted
        (span,) = heard.lines.spans
        assert (span["status"], span["input_tokens"]) == ("ok", 11)
        assert said in span["output_messages"]


@pytest.mark.parametrize("tail", ["chat/completions", "responses", "messages"])
def test_an_error_after_some_text_keeps_the_text_and_passes_as_it_was(table: Table, tail: str) -> None:
    begun = {
        "chat/completions": chunk({"content": "Par"}),
        "responses": data({"type": "response.output_text.delta", "delta": "Par"}),
        "messages": data({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "Par"}}),
    }
    error = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"busy"}}\n\n'
    for heard in at_every_byte(table, begun[tail] + error, tail):
        assert heard.body == begun[tail] + error
        (span,) = heard.lines.spans
        assert (span["status"], span["error_type"]) == ("error", "overloaded_error")
        assert "Par" in span["output_messages"]


def test_twenty_megabytes_of_images_are_relayed_whole(proxy: Worker, upstream: FakeUpstream) -> None:
    image = base64.b64encode(bytes(range(256)) * 20_480).decode()
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}] * 3
    raw = json.dumps({"model": "q", "messages": [{"role": "user", "content": parts}]}).encode()
    assert len(raw) > 20 << 20
    assert proxy.client.post(f"{proxy.url}/chat/completions", content=raw).status_code == 200
    assert sha(upstream.requests[0].body) == sha(raw)
    span = proxy.span(count=1)
    assert span["request_bytes"] == len(raw)
    assert len(re.findall("sha256:", span["input_messages"])) == 3
