import json
import socket
import time
from typing import Any

import httpx
import openai
import pytest

from optimize.rl.engine import Engine

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stop": [], "max_tokens": 12}
GREEDY = ASK | {"temperature": 0}


def post(url: str, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/{path}", json=body, timeout=30)


def chunks_of(url: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = post(url, path, body | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def test_the_openai_client_gets_the_same_answer_whole_and_streamed(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    whole = client.chat.completions.create(**GREEDY)
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].message.content
    parts = list(client.chat.completions.create(**GREEDY, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    text = client.completions.create(model="tiny", prompt="hi", temperature=0)
    assert text.usage and text.usage.completion_tokens == 16
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_stream_is_role_text_finish_usage_done(url: str) -> None:
    chunks = chunks_of(url, "chat/completions", GREEDY | {"stream_options": {"include_usage": True}})
    whole = post(url, "chat/completions", GREEDY).json()
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(chunk["choices"][0]["delta"].keys() == {"content"} for chunk in chunks[1:-2])
    assert (chunks[-2]["choices"][0]["delta"], chunks[-2]["choices"][0]["finish_reason"]) == ({}, "length")
    assert chunks[-1]["choices"] == []
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert chunks[-1]["usage"][key] == whole["usage"][key]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_usage_and_token_ids_are_exact_in_both_forms(url: str, engine: Engine) -> None:
    body = GREEDY | {"return_token_ids": True}
    whole = post(url, "chat/completions", body).json()
    expected = engine.model.tokenizer.encode("Question: hi\nAnswer:")
    ids = whole["choices"][0]["token_ids"]
    assert whole["prompt_token_ids"] == expected
    assert whole["usage"]["prompt_tokens"] == len(expected)
    assert whole["usage"]["completion_tokens"] == len(ids) == 12
    assert engine.model.tokenizer.decode(ids).lstrip(" ") == whole["choices"][0]["message"]["content"]
    chunks = chunks_of(url, "chat/completions", body)
    assert chunks[0]["prompt_token_ids"] == expected
    assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])] == ids


def test_completions_give_ids_and_logprobs_by_choice(url: str, engine: Engine) -> None:
    body = {"model": "tiny", "prompt": ["ab", "cde"], "n": 2, "max_tokens": 5, "logprobs": 2, "return_token_ids": True}
    whole = post(url, "completions", body | {"seed": 4}).json()
    encode = engine.model.tokenizer.encode
    assert [choice["prompt_token_ids"] for choice in whole["choices"]] == [encode("ab")] * 2 + [encode("cde")] * 2
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert whole["usage"]["prompt_tokens"] == len(encode("ab")) + len(encode("cde"))
    assert whole["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in whole["choices"])
    for choice in whole["choices"]:
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(choice["token_ids"])
        assert all(len(top) <= 2 and max(top.values()) <= 0 for top in logprobs["top_logprobs"])
        assert logprobs["text_offset"][0] == 0
    chunks = chunks_of(url, "completions", body | {"seed": 4})
    for index, choice in enumerate(whole["choices"]):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [token for part in own for token in part.get("token_ids", [])] == choice["token_ids"]
        offsets = [offset for part in own if part["logprobs"] for offset in part["logprobs"]["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"]
        assert own[0]["prompt_token_ids"] == choice["prompt_token_ids"]


def test_chat_logprobs_have_openais_form(url: str) -> None:
    body = GREEDY | {"logprobs": True, "top_logprobs": 3}
    answer = openai.OpenAI(base_url=f"{url}/v1", api_key="none").chat.completions.create(**body)
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.content and len(logprobs.content) == 12
    for entry in logprobs.content:
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert len(entry.top_logprobs) == 3
    plain = post(url, "chat/completions", GREEDY | {"logprobs": True}).json()
    assert plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_a_seed_repeats_an_answer_and_choices_differ(url: str) -> None:
    body = ASK | {"seed": 3, "n": 3}
    one, two = (post(url, "chat/completions", body).json()["choices"] for _ in range(2))
    assert one == two
    assert len({choice["message"]["content"] for choice in one}) == 3


def test_the_text_never_holds_the_stop(url: str) -> None:
    text = post(url, "chat/completions", GREEDY).json()["choices"][0]["message"]["content"]
    stop = text[3:5]
    assert stop not in text[:3]
    for body in (GREEDY | {"stop": stop}, GREEDY | {"stop": ["never this", stop]}):
        choice = post(url, "chat/completions", body).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text[:3], "stop")
        parts = chunks_of(url, "chat/completions", body)
        assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == text[:3]


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("chat/completions", ASK | {"model": "gpt-9"}, 404, "model", "model_not_found"),
        ("chat/completions", ASK | {"temperature": 9}, 400, "temperature", "invalid_value"),
        ("chat/completions", ASK | {"tools": [{}]}, 400, "tools", "unsupported_parameter"),
        (
            "chat/completions",
            ASK | {"messages": [{"role": "system", "content": "x"}]},
            400,
            "messages",
            "invalid_input",
        ),
        ("completions", {"model": "tiny", "prompt": "x" * 300}, 400, "prompt", "context_length_exceeded"),
        ("completions", {"model": "tiny", "prompt": [999]}, 400, "prompt", "invalid_value"),
        ("completions", {"model": "tiny", "prompt": ""}, 400, "prompt", "invalid_value"),
        ("embeddings", {}, 404, None, "not_found"),
    ],
)
def test_what_is_wrong_is_named_in_openais_envelope(
    url: str, path: str, body: dict[str, Any], status: int, param: str | None, code: str
) -> None:
    answer = post(url, path, body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert error["message"]


def test_a_body_that_is_no_json_or_too_large_is_refused(url: str) -> None:
    assert httpx.post(f"{url}/v1/completions", content=b"{").status_code == 400
    assert "not JSON" in httpx.post(f"{url}/v1/completions", content=b"{").text
    assert "larger than" in httpx.post(f"{url}/v1/completions", content=b"x" * (17 << 20)).text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_row(url: str, stream: bool) -> None:
    body = json.dumps(ASK | {"max_tokens": 230, "n": 2, "stream": stream, "seed": 1}).encode()
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        end = time.monotonic() + 10
        while httpx.get(f"{url}/healthz").json()["running"] == 0:
            assert time.monotonic() < end
    started = time.monotonic()
    while httpx.get(f"{url}/healthz").json()["running"]:
        assert time.monotonic() < started + 10
    assert post(url, "chat/completions", GREEDY).status_code == 200


def test_health_names_the_model(url: str, engine: Engine) -> None:
    assert httpx.get(f"{url}/healthz").json() == {
        "status": "ok",
        "model": "tiny",
        "running": 0,
        "waiting": 0,
        "requests": engine.requests,
    }
