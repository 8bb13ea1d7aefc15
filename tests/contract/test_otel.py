"""Agents that instrument themselves, by the real instrumentors and the official exporter, through a real server."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_upstream import FakeUpstream, Received, Reply, chat
from tests.served import Served, served

ROOT = Path(__file__).resolve().parents[2]
AGENT = ROOT / "tests" / "clients" / "otel_agent.py"
# OpenTelemetry's own instrumentor doesn't import beside this lock's util-genai: it has an environment of its own.
OWN = ROOT / ".venvs" / "otel-openai-v2" / "bin" / "python"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    numbers = itertools.count()

    def answer(_request: Received) -> Reply:
        body = json.loads(chat("42").body)
        body["id"] = f"chatcmpl-otel-{next(numbers)}"
        return Reply(parts=(json.dumps(body).encode(),))

    with FakeUpstream(answer) as upstream, served(tmp_path_factory.mktemp("otel") / "data", upstream.url) as running:
        yield running


def run(server: Served, which: str) -> str:
    """The trace id of one run of the agent."""
    python = sys.executable
    if which == "openai-v2":
        if not OWN.exists():
            pytest.skip("opentelemetry-instrumentation-openai-v2: `make otel-clients` installs it")
        python = str(OWN)
    environment = server.environment(OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT="true")
    done = subprocess.run(
        [python, str(AGENT), which], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def shape(node: dict[str, Any]) -> tuple[int, str, str | None]:
    return node["depth"], node["operation"], node["role"]


@pytest.mark.parametrize("which", ["openai-v2", "openinference", "openllmetry"])
def test_an_instrumented_agents_run_is_one_episode_with_each_call_once(server: Served, which: str) -> None:
    before = {name: server.client.stats()[name] for name in ("spans", "rewards")}
    trace = run(server, which)
    server.client.flush()
    (episode_id,) = server.client.query(f"SELECT DISTINCT episode_id FROM spans_v WHERE trace_id = '{trace}'")["rows"][
        0
    ]
    episode = server.client.episode(episode_id)
    assert [shape(node) for node in episode["tree"]] == [
        (0, "invoke_agent", "solver"),
        (1, "chat", "solver"),
        (1, "execute_tool", "solver"),
        (1, "chat", "solver"),
    ]
    assert [(step["step"], step["role"], step["branch"]) for step in episode["steps"]] == [
        (0, "solver", 0),
        (1, "solver", 0),
    ]
    assert [step["input_messages"][0]["content"] for step in episode["steps"]] == ["What is 6 times 7?"] * 2
    tool = episode["tree"][2]
    assert tool["output_messages"] == [{"role": "tool", "tool_call_id": "call_1", "content": "42"}]
    assert [(one["value"], one["explanation"]) for one in episode["rewards"]] == [(0.75, "close")]
    assert (episode["reward"], episode["ended"]) == (0.75, "closed")
    # Two calls, an agent and a tool; the two echoes are kept, and counted nowhere.
    after = server.client.stats()
    assert after["spans"] - before["spans"] == 4
    assert after["rewards"] - before["rewards"] == 1
    echoes = server.client.query(f"SELECT count(*), count(DISTINCT echo_of) FROM echoes WHERE trace_id = '{trace}'")[
        "rows"
    ]
    assert echoes == [[2, 2]]
    page = server.client.query(f"SELECT steps, input_tokens FROM episodes_v WHERE episode_id = '{episode_id}'")["rows"]
    assert page == [[2, 22]]
