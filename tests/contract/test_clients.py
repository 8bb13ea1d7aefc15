"""Agents in several frameworks, each with nothing changed but the base URL, become episodes with rewards.

The upstream is scripted: it answers the first call of a conversation by a tool call, the next by text. Each agent makes
two calls, and both belong to one episode though no client sends any header of ours.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_upstream import FakeUpstream, Received, Reply, chat, chat_events, data, json_reply, sse_reply
from tests.served import Served, served

CLIENTS = Path(__file__).resolve().parent.parent / "clients"
ANSWER = "It is 18 degrees."
TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}


def scripted(request: Received) -> Reply:
    """A model that asks for the weather once and then answers, in either wire format."""
    body = request.json
    if request.path.endswith("/responses"):
        return _responses(body)
    told = any(message["role"] == "tool" for message in body["messages"])
    if body.get("stream"):
        return sse_reply(chat_events(ANSWER, usage=bool(body.get("stream_options"))))
    return chat(ANSWER) if told else chat(None, tool_calls=[TOOL_CALL])


def _responses(body: dict[str, Any]) -> Reply:
    told = any(item.get("type") == "function_call_output" for item in body["input"] if isinstance(item, dict))
    text = {"type": "output_text", "text": ANSWER, "annotations": []}
    call = {"name": "weather", "arguments": '{"city": "Paris"}', "call_id": "call_1"}
    item: dict[str, Any] = (
        {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [text]}
        if told
        else {"id": "fc_1", "type": "function_call", "status": "completed", **call}
    )
    details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    return json_reply(
        {
            "id": "resp_2" if told else "resp_1",
            "object": "response",
            "created_at": 1,
            "status": "completed",
            "model": body["model"],
            "output": [item],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": {"input_tokens": 11, "output_tokens": 3, "total_tokens": 14, **details},
        }
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, FakeUpstream]]:
    with (
        FakeUpstream(default=scripted) as upstream,
        served(tmp_path_factory.mktemp("clients") / "data", upstream.url) as running,
    ):
        yield running, upstream


AGENTS = {
    "openai for Python": [sys.executable, str(CLIENTS / "openai_agent.py")],
    "openai for JavaScript": ["node", str(CLIENTS / "js" / "agent.mjs")],
    "LangGraph": [sys.executable, str(CLIENTS / "langgraph_agent.py")],
    "openai-agents": [sys.executable, str(CLIENTS / "openai_agents_agent.py")],
}


@pytest.mark.parametrize("name", AGENTS)
def test_an_unmodified_agent_becomes_one_rewarded_episode(name: str, server: tuple[Served, FakeUpstream]) -> None:
    if "JavaScript" in name:
        if shutil.which("node") is None:
            pytest.skip("Node.js is not installed, so the JavaScript agent cannot run")
        if not (CLIENTS / "js" / "node_modules" / "openai").is_dir():
            pytest.skip("npm's openai package is not installed: run `make install` where npm is")
    running, upstream = server
    client = running.client
    before = {episode["episode_id"] for episode in client.episodes()["episodes"]}
    calls = len(upstream.requests)

    done = subprocess.run(
        AGENTS[name], env=running.environment(), capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ANSWER

    assert len(upstream.requests) == calls + 2
    client.flush()
    (episode_id,) = {episode["episode_id"] for episode in client.episodes()["episodes"]} - before
    client.reward({"episode_id": episode_id, "value": 0.75})
    client.flush()
    episode = client.episode(episode_id)
    first, second = episode["steps"]
    assert (first["step"], second["step"]) == (0, 1)
    assert "You are a weather helper." in json.dumps(first["input_messages"])
    assert "weather" in json.dumps(first["output_messages"])
    assert ANSWER in json.dumps(second["output_messages"])
    assert (second["input_tokens"], second["output_tokens"]) == (11, 3)
    assert [reward["value"] for reward in episode["rewards"]] == [0.75]


def test_the_clients_own_key_reached_the_upstream_and_no_file_of_ours(server: tuple[Served, FakeUpstream]) -> None:
    running, upstream = server
    assert {request.headers["authorization"] for request in upstream.requests} == {"Bearer client-key"}
    running.client.flush()
    for file in running.data_dir.rglob("*"):
        if file.is_file():
            assert b"client-key" not in file.read_bytes(), file


def test_a_streamed_event_format_that_nobody_knows_is_still_relayed(server: tuple[Served, FakeUpstream]) -> None:
    """An unknown event must reach the client as it came: the proxy reads along, it does not filter."""
    import httpx

    running, upstream = server
    events = [data({"odd": 1}), b": a comment\n\n", b"event: strange\ndata: {}\n\n", b"data: [DONE]\n\n"]
    upstream.reply(sse_reply(events))
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}
    answer = httpx.post(f"{running.url}/v1/chat/completions", json=body)
    assert answer.content == b"".join(events)
