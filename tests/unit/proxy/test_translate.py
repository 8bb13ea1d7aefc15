"""A provider that needs translation, through the LiteLLM SDK, against a scripted Anthropic upstream."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_upstream import FakeUpstream, json_reply, sse_reply
from tests.patience import within
from tests.unit.proxy.harness import Worker, worker

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what a foreign library warns of while it is imported is its own affair
    pytest.mark.timeout(180),
]

USER = {"role": "user", "content": "Capital of France?"}


def message(**more: Any) -> dict[str, Any]:
    usage = {"input_tokens": 12, "output_tokens": 3}
    content = [{"type": "text", "text": "Paris"}]
    base = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-x", "stop_reason": "end_turn"}
    return {**base, "content": content, "usage": usage, **more}


def events() -> list[bytes | float]:
    begun = message(content=[], stop_reason=None, usage={"input_tokens": 12, "output_tokens": 1})
    parts = [
        {"type": "message_start", "message": begun},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Pa"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "ris"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}},
        {"type": "message_stop"},
    ]
    return [f"event: {part['type']}\ndata: {json.dumps(part)}\n\n".encode() for part in parts]


@pytest.fixture(scope="module")
def anthropic() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture(scope="module")
def shared(anthropic: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    base = anthropic.url.removesuffix("/v1")
    params = {"model": "anthropic/claude-haiku-4-5", "api_key": "sk-ant-server", "api_base": base}
    entry = {"model_name": "claude", "litellm_params": params}
    folder = Path(tmp_path_factory.mktemp("data"))
    with worker(folder, "http://127.0.0.1:9/v1", model_list=[entry]) as running:
        yield running


@pytest.fixture
def proxy(shared: Worker, anthropic: FakeUpstream) -> Worker:
    shared.spans.clear()
    anthropic.forget()
    return shared


def post(running: Worker, path: str = "/chat/completions", /, **body: Any) -> Any:
    raw = {"model": "claude", "messages": [USER], "max_tokens": 9, **body}
    return running.client.post(running.url + path, json=raw, headers={"authorization": "Bearer sk-mine"}, timeout=120)


def test_litellm_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, proxy.app; sys.exit('litellm' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_a_json_call_is_translated_both_ways(proxy: Worker, anthropic: FakeUpstream) -> None:
    anthropic.reply(json_reply(message()))
    reply = post(proxy, temperature=0.5)
    sent = anthropic.requests[0]
    assert sent.path == "/v1/messages"
    assert sent.headers["x-api-key"] == "sk-ant-server"
    assert sent.json["model"] == "claude-haiku-4-5"
    assert (sent.json["max_tokens"], sent.json["temperature"]) == (9, 0.5)
    body = reply.json()
    assert (body["object"], body["choices"][0]["message"]["content"]) == ("chat.completion", "Paris")
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["total_tokens"] == 15
    span = proxy.span(count=1)
    assert (span["status"], span["provider"], span["request_model"]) == ("ok", "anthropic", "claude")
    assert (span["input_tokens"], span["output_tokens"], span["attempts"]) == (12, 3, 1)
    assert json.loads(span["output_messages"])[0]["content"] == "Paris"
    assert span["cost_usd"] > 0
    assert "sk-" not in json.dumps([span, sent.json])


def test_tools_are_translated(proxy: Worker, anthropic: FakeUpstream) -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}}
    anthropic.reply(json_reply(message(content=[use], stop_reason="tool_use")))
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    choice = post(proxy, tools=[tool]).json()["choices"][0]
    assert anthropic.requests[0].json["tools"][0]["name"] == "weather"
    assert choice["finish_reason"] == "tool_calls"
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "Paris"}
    assert "weather" in proxy.span(count=1)["output_messages"]


@pytest.mark.parametrize("asked", [True, False])
def test_a_stream_is_translated_chunk_by_chunk(proxy: Worker, anthropic: FakeUpstream, asked: bool) -> None:
    anthropic.reply(sse_reply(events()))
    reply = post(proxy, stream=True, **({"stream_options": {"include_usage": True}} if asked else {}))
    assert reply.headers["content-type"].startswith("text/event-stream")
    *blocks, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"]) == "Paris"
    assert [chunk["usage"]["total_tokens"] for chunk in chunks if "usage" in chunk] == ([15] if asked else [])
    span = proxy.span(count=1)
    assert (span["status"], span["stream"], span["finish_reason"]) == ("ok", True, "stop")
    assert (span["input_tokens"], span["output_tokens"]) == (12, 3)
    assert json.loads(span["output_messages"])[0]["content"] == "Paris"
    assert span["cost_usd"] > 0


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (429, "rate_limit_error"), (529, "api_error")],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_provider_is_an_openai_error_with_its_status(
    proxy: Worker, anthropic: FakeUpstream, status: int, kind: str, stream: bool
) -> None:
    refusal = {"type": "error", "error": {"type": "some_error", "message": "slow down"}}
    anthropic.reply(json_reply(refusal, status, headers=[("retry-after", "3")]))
    reply = post(proxy, stream=stream)
    assert reply.status_code == (500 if status == 529 else status)
    assert reply.json()["error"]["type"] == kind
    assert "slow down" in reply.json()["error"]["message"]
    assert len(anthropic.requests) == 1
    span = proxy.span(count=1)
    assert (span["status"], span["error_type"], span["http_status"]) == ("error", kind, reply.status_code)


ORDERS = [
    "api_base", "base_url", "custom_api_base", "api_key", "api_version", "api_type", "organization", "project",
    "extra_headers", "headers", "extra_body", "extra_query", "custom_llm_provider", "deployment_id", "client",
    "model_list", "fallbacks", "context_window_fallbacks", "region_name", "proxy", "ssl_verify", "timeout",
    "mock_response", "mock_tool_calls", "callbacks", "success_callback", "failure_callback", "guardrails",
    "hf_model_name", "shared_session", "use_in_pass_through", "configurable_clientside_auth_params",
    "input_cost_per_token", "output_cost_per_token", "num_retries", "max_retries", "no-log", "hooks",
    "aws_region_name", "aws_access_key_id", "aws_secret_access_key", "aws_session_token", "aws_role_name",
    "aws_web_identity_token", "aws_bedrock_runtime_endpoint", "aws_sts_endpoint", "aws_profile_name",
    "aws_external_id", "azure_ad_token", "azure_ad_token_provider", "azure_endpoint", "azure_scope",
    "vertex_project", "vertex_location", "vertex_credentials", "gcs_bucket_name", "s3_bucket_name",
    "s3_endpoint_url", "litellm_params", "litellm_credential_name", "litellm_metadata", "watsonx_url",
    "watsonx_token", "oci_region", "oci_key", "sagemaker_base_url", "bedrock_endpoint",
]  # fmt: skip


def test_a_field_that_would_redirect_the_call_is_refused_by_its_name(proxy: Worker, anthropic: FakeUpstream) -> None:
    assert len(ORDERS) >= 60
    for field in ORDERS:
        reply = post(proxy, **{field: "http://evil.example"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)
        assert reply.json()["error"]["code"] == "parameter_not_allowed"
    assert anthropic.requests == []
    assert len(proxy.spans) == len(ORDERS)


def test_no_other_field_changes_where_a_call_goes(proxy: Worker, anthropic: FakeUpstream) -> None:
    anthropic.reply(json_reply(message()))
    assert post(proxy, metadata={"episode_id": "e", "x": "evil"}, user_api_base="evil", _x="evil").status_code == 200
    assert anthropic.requests[0].headers["x-api-key"] == "sk-ant-server"
    assert "evil" not in json.dumps([anthropic.requests[0].json, anthropic.requests[0].headers])


def test_what_can_not_be_translated_is_refused_clearly(proxy: Worker, anthropic: FakeUpstream) -> None:
    reply = post(proxy, "/responses", input="hi")
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "ratchet_error")
    assert "chat/completions" in reply.json()["error"]["message"]
    assert anthropic.requests == []
    assert proxy.span(count=1)["status"] == "error"


def test_the_providers_own_dialect_is_relayed_raw(proxy: Worker, anthropic: FakeUpstream) -> None:
    anthropic.reply(sse_reply(events()))
    reply = post(proxy, "/messages", stream=True)
    assert reply.content == b"".join(part for part in events() if isinstance(part, bytes))
    assert anthropic.requests[0].json["model"] == "claude-haiku-4-5"
    assert anthropic.requests[0].headers["x-api-key"] == "sk-ant-server"
    span = proxy.span(count=1)
    assert (span["operation"], span["input_tokens"], span["output_tokens"]) == ("messages", 12, 3)


def test_a_client_that_leaves_a_translated_stream_cancels_it(proxy: Worker, anthropic: FakeUpstream) -> None:
    anthropic.reply(sse_reply(events()[:4], end="hang"))
    raw = {"model": "claude", "messages": [USER], "stream": True}
    with proxy.client.stream("POST", proxy.url + "/chat/completions", json=raw, timeout=60) as reply:
        for block in reply.iter_text():
            if "ris" in block:
                break
    assert anthropic.requests[0].gone.wait(within(2))
    span = proxy.span(count=1)
    assert span["status"] == "cancelled"
    assert json.loads(span["output_messages"])[0]["content"] == "Paris"
