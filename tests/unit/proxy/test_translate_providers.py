"""Gemini, Bedrock and Azure as entries of `model_list`, in LiteLLM's own format: JSON and streams, tools, usage, cost,
against a scripted endpoint of each provider that speaks its wire format."""

import ast
import json
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fake_upstream import FakeUpstream, Received, Reply, chunk, completion, json_reply, sse_reply, usage_chunk
from tests.unit.proxy.harness import Worker, worker

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what a foreign library warns of while it is imported is its own affair
    pytest.mark.timeout(180),
]

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "It.", "parameters": PARAMETERS}}]
ARGUMENTS = {"city": "Paris"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}


@dataclass(frozen=True)
class Provider:
    """An entry's parameters ({} stands for the endpoint), the paths it calls, and the answers that it gives."""

    params: dict[str, str]
    path: str
    stream_path: str
    text: Reply
    tool: Reply
    streamed_text: Reply
    streamed_tool: Reply


def gemini(parts: list[Any]) -> dict[str, Any]:
    usage = {"promptTokenCount": 12, "candidatesTokenCount": 3, "totalTokenCount": 15}
    content = {"parts": parts, "role": "model"}
    candidate = {"content": content, "finishReason": "STOP", "index": 0}
    return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "gemini-2.5-flash"}


def gemini_events(*rows: list[Any]) -> Reply:
    return sse_reply([f"data: {json.dumps(gemini(parts))}\r\n\r\n".encode() for parts in rows])


def converse(content: list[Any], reason: str = "end_turn") -> Reply:
    usage = {"inputTokens": 12, "outputTokens": 3, "totalTokens": 15}
    message = {"role": "assistant", "content": content}
    return json_reply(
        {"output": {"message": message}, "stopReason": reason, "usage": usage, "metrics": {"latencyMs": 9}}
    )


def frame(kind: str, payload: dict[str, Any]) -> bytes:
    """One message of AWS's event stream: lengths, a checksum, headers, the payload, a checksum."""
    given = {":event-type": kind, ":content-type": "application/json", ":message-type": "event"}
    headers = b"".join(
        struct.pack("!B", len(name)) + name.encode() + struct.pack("!BH", 7, len(value)) + value.encode()
        for name, value in given.items()
    )
    body = json.dumps(payload).encode()
    prelude = struct.pack("!II", 16 + len(headers) + len(body), len(headers))
    message = prelude + struct.pack("!I", zlib.crc32(prelude)) + headers + body
    return message + struct.pack("!I", zlib.crc32(message))


def converse_stream(*events: tuple[str, dict[str, Any]], reason: str = "end_turn") -> Reply:
    usage = {"inputTokens": 12, "outputTokens": 3, "totalTokens": 15}
    ends = [("messageStop", {"stopReason": reason}), ("metadata", {"usage": usage, "metrics": {"latencyMs": 9}})]
    frames = [frame(kind, body) for kind, body in [("messageStart", {"role": "assistant"}), *events, *ends]]
    return Reply(200, (("content-type", "application/vnd.amazon.eventstream"),), tuple(frames), chunked=True)


def delta(index: int, **given: Any) -> tuple[str, dict[str, Any]]:
    return "contentBlockDelta", {"contentBlockIndex": index, "delta": given}


def part(**function: str) -> bytes:
    head = {"id": "call_1", "type": "function"} if "name" in function else {}
    return chunk({"tool_calls": [{"index": 0, **head, "function": function}]})


USE = {"toolUseId": "tool_1", "name": "weather"}
DONE = b"data: [DONE]\n\n"
PROVIDERS = {
    "gemini": Provider(
        {"model": "gemini/gemini-2.5-flash", "api_base": "{}", "api_key": "sk-server"},
        ":generateContent",
        ":streamGenerateContent",
        json_reply(gemini([{"text": "Paris"}])),
        json_reply(gemini([{"functionCall": {"name": "weather", "args": ARGUMENTS}}])),
        gemini_events([{"text": "Pa"}], [{"text": "ris"}]),
        gemini_events([{"functionCall": {"name": "weather", "args": ARGUMENTS}}]),
    ),
    "bedrock": Provider(
        {
            "model": "bedrock/us.anthropic.claude-haiku-4-5-20251001-v1:0",
            "aws_bedrock_runtime_endpoint": "{}",
            "aws_access_key_id": "AKIATESTTESTTEST",
            "aws_secret_access_key": "sk-server",
            "aws_region_name": "us-east-1",
        },
        "/converse",
        "/converse-stream",
        converse([{"text": "Paris"}]),
        converse([{"toolUse": {**USE, "input": ARGUMENTS}}], "tool_use"),
        converse_stream(delta(0, text="Pa"), delta(0, text="ris"), ("contentBlockStop", {"contentBlockIndex": 0})),
        converse_stream(
            ("contentBlockStart", {"contentBlockIndex": 0, "start": {"toolUse": USE}}),
            delta(0, toolUse={"input": '{"city": '}),
            delta(0, toolUse={"input": '"Paris"}'}),
            ("contentBlockStop", {"contentBlockIndex": 0}),
            reason="tool_use",
        ),
    ),
    "azure": Provider(
        {"model": "azure/gpt-4o-mini", "api_base": "{}", "api_key": "sk-server", "api_version": "2024-10-21"},
        "/chat/completions",
        "/chat/completions",
        json_reply(completion("Paris", model="gpt-4o-mini")),
        json_reply(completion(None, model="gpt-4o-mini", tool_calls=[CALL])),
        sse_reply([chunk({"content": "Pa"}), chunk({"content": "ris"}), chunk({}, "stop"), usage_chunk(), DONE]),
        sse_reply([part(name="weather", arguments='{"city": '), part(arguments='"Paris"}'), chunk({}, "tool_calls"),
                   usage_chunk(), DONE]),
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", list(PROVIDERS))


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture(scope="module")
def shared(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    base = upstream.url.removesuffix("/v1")
    entries = [
        {"model_name": name, "litellm_params": {key: value.format(base) for key, value in provider.params.items()}}
        for name, provider in PROVIDERS.items()
    ]
    vertex = {"model": "vertex_ai/gemini-2.5-flash", "vertex_project": "p", "vertex_location": "us-central1"}
    entries.append({"model_name": "vertex", "litellm_params": {**vertex, "api_base": base}})
    with worker(Path(tmp_path_factory.mktemp("data")), "http://127.0.0.1:9/v1", model_list=entries) as running:
        yield running


@pytest.fixture
def proxy(shared: Worker, upstream: FakeUpstream) -> Worker:
    shared.spans.clear()
    upstream.forget()
    return shared


def post(proxy: Worker, name: str, **body: Any) -> Any:
    raw = {"model": name, "messages": [{"role": "user", "content": "Capital?"}], "max_tokens": 9, **body}
    return proxy.client.post(
        f"{proxy.url}/chat/completions", json=raw, headers={"authorization": "Bearer sk-mine"}, timeout=120
    )


def chunks(reply: Any) -> list[Any]:
    *blocks, done, rest = reply.text.split("\n\n")
    assert (reply.status_code, done, rest) == (200, "data: [DONE]", "")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def check_request(request: Received, path: str) -> None:
    assert path in request.path + request.target
    assert "sk-mine" not in json.dumps([request.headers, request.target])


def check_span(proxy: Worker, name: str, stream: bool) -> dict[str, Any]:
    span = proxy.span(count=1)
    usage = (11 if name == "azure" else 12, 3)
    assert (span["status"], span["stream"], span["request_model"]) == ("ok", stream, name)
    assert (span["input_tokens"], span["output_tokens"]) == usage
    assert span["cost_usd"] > 0
    assert "sk-" not in json.dumps(span)
    return span


@EACH
def test_a_json_call(proxy: Worker, upstream: FakeUpstream, name: str) -> None:
    provider = PROVIDERS[name]
    upstream.reply(provider.text)
    body = post(proxy, name).json()
    check_request(upstream.requests[0], provider.path)
    choice = body["choices"][0]
    assert (body["object"], choice["message"]["content"], choice["finish_reason"]) == (
        "chat.completion",
        "Paris",
        "stop",
    )
    assert body["usage"]["total_tokens"] == (14 if name == "azure" else 15)
    assert json.loads(check_span(proxy, name, False)["output_messages"])[0]["content"] == "Paris"


@EACH
def test_a_tool_call(proxy: Worker, upstream: FakeUpstream, name: str) -> None:
    provider = PROVIDERS[name]
    upstream.reply(provider.tool)
    choice = post(proxy, name, tools=TOOLS).json()["choices"][0]
    assert "weather" in upstream.requests[0].body.decode()
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", ARGUMENTS)
    assert choice["finish_reason"] == "tool_calls"
    assert "weather" in check_span(proxy, name, False)["output_messages"]


@EACH
def test_a_streamed_text(proxy: Worker, upstream: FakeUpstream, name: str) -> None:
    provider = PROVIDERS[name]
    upstream.reply(provider.streamed_text)
    got = chunks(post(proxy, name, stream=True))
    check_request(upstream.requests[0], provider.stream_path)
    assert "".join(c["delta"].get("content") or "" for one in got for c in one["choices"]) == "Paris"
    assert all("usage" not in one for one in got)
    assert json.loads(check_span(proxy, name, True)["output_messages"])[0]["content"] == "Paris"


@EACH
def test_a_streamed_tool_call(proxy: Worker, upstream: FakeUpstream, name: str) -> None:
    upstream.reply(PROVIDERS[name].streamed_tool)
    got = chunks(post(proxy, name, tools=TOOLS, stream=True))
    calls = [call for one in got for c in one["choices"] for call in c["delta"].get("tool_calls") or ()]
    assert "".join(call["function"].get("name") or "" for call in calls) == "weather"
    assert json.loads("".join(call["function"].get("arguments") or "" for call in calls)) == ARGUMENTS
    assert [c["finish_reason"] for one in got for c in one["choices"] if c.get("finish_reason")] == ["tool_calls"]
    (message,) = json.loads(check_span(proxy, name, True)["output_messages"])
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == ARGUMENTS


@EACH
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_the_provider_keeps_its_status(
    proxy: Worker, upstream: FakeUpstream, name: str, stream: bool
) -> None:
    body = {"error": {"message": "slow down", "code": 429, "status": "RESOURCE_EXHAUSTED"}, "message": "slow down"}
    upstream.reply(*[json_reply(body, 429)] * 3)
    reply = post(proxy, name, stream=stream)
    assert (reply.status_code, reply.json()["error"]["type"]) == (429, "rate_limit_error")
    assert "slow down" in reply.json()["error"]["message"]
    assert len(upstream.requests) == 1
    assert (proxy.span(count=1)["status"], proxy.span()["error_type"]) == ("error", "rate_limit_error")


def test_one_file_imports_litellm() -> None:
    root = Path(__file__).resolve().parents[3]
    files = [
        root / "ratchet.py",
        *(f for name in ("proxy", "collector", "optimize") for f in (root / name).rglob("*.py")),
    ]
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
                names += [str(getattr(node.args[0], "value", ""))]
            if any(name.split(".")[0] == "litellm" for name in names):
                found.add(file.relative_to(root).as_posix())
    assert found <= {"proxy/translate.py"}
    assert "litellm" in (root / "proxy" / "translate.py").read_text()


@pytest.mark.parametrize("stream", [False, True])
def test_a_provider_whose_package_is_missing_says_which_and_shows_no_stack(
    proxy: Worker, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setitem(sys.modules, "google.auth", None)
    reply = post(proxy, "vertex", stream=stream)
    message = reply.json()["error"]["message"]
    assert (reply.status_code, "google.auth" in message, "Traceback" in message) == (500, True, False)
    assert str(Path(__file__).resolve().parents[3]) not in reply.text
    assert proxy.span(count=1)["status"] == "error"
