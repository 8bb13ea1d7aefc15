"""Token ids and logprobs for training: asked for where a mark says so, recorded, and hidden from who didn't ask."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from proxy.capture import ask, hide, hide_run
from proxy.record import Hidden
from tests.fake_upstream import FakeUpstream, Received, Reply, completion, data, json_reply, sse_reply
from tests.unit.proxy.harness import Registry, Worker, worker

OWN = "You are a geography helper."
LOGPROBS = {"content": [{"token": "Par", "logprob": -0.1}, {"token": "is", "logprob": -0.2}]}


def like_vllm(request: Received) -> Reply:
    """Answers as vLLM does: with token ids and logprobs if they are asked for, else with nulls."""
    body = request.json
    ids, probs = body.get("return_token_ids") is True, body.get("logprobs") not in (None, False)
    if body.get("stream"):
        return sse_reply(_stream(ids, probs))
    answer = completion("Paris")
    answer["choices"][0]["logprobs"] = LOGPROBS if probs else None
    if ids:
        answer["choices"][0]["token_ids"] = [7, 8]
        answer["prompt_token_ids"] = [1, 2, 3]
    return json_reply(answer)


def _stream(ids: bool, probs: bool) -> Iterator[bytes]:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m"}
    for index, (text, token) in enumerate((("Par", 7), ("is", 8))):
        choice: dict[str, Any] = {"index": 0, "delta": {"content": text}, "finish_reason": None}
        choice["logprobs"] = {"content": [LOGPROBS["content"][index]]} if probs else None
        if ids:
            choice["token_ids"] = [token]
        yield data({**head, **({"prompt_token_ids": [1, 2, 3]} if ids and not index else {}), "choices": [choice]})
    yield data({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": None}]})
    yield data({**head, "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
    yield b"data: [DONE]\n\n"


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream(like_vllm) as fake:
        yield fake


@pytest.fixture(scope="module")
def proxy(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    params = {"model": "hosted_vllm/qwen", "api_base": upstream.url}
    entries = [
        {"model_name": "trained", "litellm_params": params, "model_info": {"train": True}},
        {"model_name": "plain", "litellm_params": params},
        {"model_name": "closed", "litellm_params": {"model": "openai/gpt-x", "api_base": upstream.url}},
    ]
    registry = Registry()
    registry.add("geo", OWN)
    slots = {"geo": {"template": OWN, "train": True}}
    more = {"slots": slots, "engines": [{"api_base": upstream.url, "base_model": "gemma"}]}
    with worker(tmp_path_factory.mktemp("c"), upstream.url, registry, model_list=entries, **more) as running:
        yield running


def call(proxy: Worker, upstream: FakeUpstream, model: str, prompt: str = "none", **more: Any) -> httpx.Response:
    upstream.forget()
    proxy.spans.clear()
    messages = [{"role": "system", "content": prompt}, {"role": "user", "content": "Capital?"}]
    return proxy.client.post(proxy.url + "/chat/completions", json={"model": model, "messages": messages, **more})


def recorded(proxy: Worker) -> tuple[Any, Any]:
    span = proxy.span(count=1)
    ids, probs = span["token_ids"], span["logprobs"]
    return json.loads(ids) if ids else None, json.loads(probs) if probs else None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "prompt"), [("trained", "none"), ("plain", OWN), ("elsewhere", OWN), ("gemma", "none")]
)
def test_a_marked_model_or_slot_is_recorded_and_the_client_sees_nothing_of_it(
    proxy: Worker, upstream: FakeUpstream, model: str, prompt: str, stream: bool
) -> None:
    more = {"stream": True} if stream else {}
    marked = call(proxy, upstream, model, prompt, **more)
    assert recorded(proxy) == ({"prompt": [1, 2, 3], "completion": [[7, 8]]}, [LOGPROBS])
    sent = upstream.requests[0].json
    assert (sent["return_token_ids"], sent["logprobs"]) == (True, True)
    unmarked = call(proxy, upstream, "plain", "none", **more)
    assert recorded(proxy) == (None, None)
    assert "return_token_ids" not in upstream.requests[0].json
    if not stream:
        assert marked.json() == unmarked.json()
        return
    assert b"token_ids" not in marked.content
    assert events(marked.content) == events(unmarked.content)
    assert b'"usage"' not in marked.content


def events(stream: bytes) -> list[Any]:
    lines = [line.removeprefix(b"data: ") for line in stream.split(b"\n\n") if line]
    return [line if line == b"[DONE]" else json.loads(line) for line in lines]


def test_what_the_client_asked_for_itself_it_gets_as_it_came(proxy: Worker, upstream: FakeUpstream) -> None:
    raw = call(proxy, upstream, "trained", return_token_ids=True, logprobs=True)
    assert raw.content == like_vllm(upstream.requests[0]).body
    half = call(proxy, upstream, "trained", logprobs=True).json()
    assert half["choices"][0]["logprobs"] == LOGPROBS
    assert "token_ids" not in half["choices"][0]
    assert recorded(proxy)[0] == {"prompt": [1, 2, 3], "completion": [[7, 8]]}


def test_a_provider_that_refuses_unknown_fields_is_asked_only_where_its_entry_says_so(
    proxy: Worker, upstream: FakeUpstream
) -> None:
    call(proxy, upstream, "closed", OWN)
    assert "return_token_ids" not in upstream.requests[0].json


def test_embeddings_and_other_paths_are_left_alone(proxy: Worker, upstream: FakeUpstream) -> None:
    upstream.forget()
    proxy.client.post(proxy.url + "/embeddings", json={"model": "trained", "input": "x"})
    assert upstream.requests[0].json == {"model": "qwen", "input": "x"}


def test_text_completions_ask_for_one_logprob_and_zero_counts_as_asked() -> None:
    raw, hidden = ask(b'{"prompt":"x"}', {"prompt": "x"}, "text_completion")
    assert json.loads(raw) == {"prompt": "x", "return_token_ids": True, "logprobs": 1}
    assert hidden == Hidden(True, True)
    raw, hidden = ask(b'{"logprobs":0}', {"logprobs": 0}, "text_completion")
    assert json.loads(raw) == {"logprobs": 0, "return_token_ids": True}
    assert hidden == Hidden(True, False)


@pytest.mark.parametrize("body", [b"", b"not json", b"[1]", b'{"choices":null}', b'{"choices":[{"logprobs":null}]}'])
def test_an_answer_without_such_fields_keeps_its_bytes(body: bytes) -> None:
    assert hide(body, Hidden(True, True)) is body


def test_events_without_such_fields_keep_their_bytes_beside_those_with() -> None:
    plain = b'event: x\r\ndata: {"a" : 1.0}\r\n\r\n: ping\n\n'
    loaded = b'data: {"choices":[{"token_ids":[1],"delta":{}}]}\n\n'
    assert hide_run(plain + loaded, Hidden(True, True)) == plain + b'data: {"choices":[{"delta":{}}]}\n\n'
    assert hide_run(plain, Hidden(True, True)) is plain


def test_the_body_on_its_way_is_changed_by_two_members_and_nothing_else() -> None:
    raw = b'{"n" : 12345678901234567890123, "messages":[]}'
    asked, _ = ask(raw, orjson.loads(raw), "chat")
    assert asked == b'{"logprobs":true,"return_token_ids":true,' + raw[1:]


def test_an_error_of_a_marked_model_reaches_the_client_as_it_came(
    proxy: Worker, upstream: FakeUpstream, tmp_path: Path
) -> None:
    upstream.forget()
    upstream.reply(json_reply({"error": {"message": "no"}}, 400))
    reply = proxy.client.post(proxy.url + "/chat/completions", json={"model": "trained", "messages": []})
    assert (reply.status_code, reply.content) == (400, b'{"error": {"message": "no"}}')
