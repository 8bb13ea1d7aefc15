"""`make test-clients`: real clients and frameworks, each in an environment of its own, unmodified, against a server.

    python -m tests.clients.matrix [--only NAME ...] [--json FILE]

Each client's script (tests/clients/agents) runs with nothing changed but the base URL, in front of a scripted model.
Every model call must have become one span, each agent's run one episode without any header, and a reward for the last
response must reach its episode. What can't be installed is reported absent. Exit 1 where a client that runs fails.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.result import RESULTS, Result
from tests.clients.model import model
from tests.fake_upstream import FakeUpstream
from tests.served import Served, served

ROOT = Path(__file__).resolve().parents[2]
AGENTS = Path(__file__).parent / "agents"
ENVIRONMENTS = ROOT / ".venvs"
INSTALL_SECONDS = 900
RUN_SECONDS = 240
QUIET = {
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "OTEL_SDK_DISABLED": "true",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "AI_SDK_LOG_WARNINGS": "false",
}
RETELLS = "tells the earlier steps in words of its own, so a scoped base URL names the episode"


@dataclass(frozen=True)
class Client:
    """One client: its pinned packages, the first of them the one it is known by, and its script."""

    script: str
    packages: tuple[str, ...]
    retells: str | None = None  # why prefix chaining can't join its calls

    @property
    def npm(self) -> bool:
        """Whether it is a JavaScript client."""
        return self.script.endswith(".mjs")


CLIENTS = {
    "openai": Client("openai_client.py", ("openai==3.54.0",)),
    "anthropic": Client("anthropic_client.py", ("anthropic==2.12.0",)),
    "langgraph": Client("langgraph_client.py", ("langgraph==1.2.22", "langchain==1.4.7", "langchain-openai==1.7.3")),
    "openai-agents": Client("openai_agents_client.py", ("openai-agents==0.24.0",)),
    "pydantic-ai": Client("pydantic_ai_client.py", ("pydantic-ai-slim[openai]==2.68.0",)),
    "autogen": Client("autogen_client.py", ("autogen-agentchat==0.7.5", "autogen-ext[openai]==0.7.5")),
    "crewai": Client("crewai_client.py", ("crewai==1.15.30",)),
    "smolagents": Client("smolagents_client.py", ("smolagents[openai]==1.26.0",), RETELLS),
    "dspy": Client("dspy_client.py", ("dspy==3.4.1",), RETELLS),
    "openai-js": Client("openai_client.mjs", ("openai@7.57.0",)),
    "ai-sdk": Client("ai_sdk_client.mjs", ("ai@7.0.173", "@ai-sdk/openai@4.0.118", "zod@4.6.7")),
}


@dataclass
class Outcome:
    """What became of a client. `problem` None: everything held."""

    client: str
    packages: tuple[str, ...]
    beneath: dict[str, str] = field(default_factory=dict)  # versions of the SDKs that it calls models with
    absent: str | None = None
    problem: str | None = None
    cases: list[dict[str, Any]] = field(default_factory=list)
    calls: int = 0
    spans: int = 0
    episodes: int = 0
    rewarded: bool = False
    note: str | None = None
    seconds: float = 0.0


def install(name: str, client: Client) -> str | None:
    """Makes the client's environment, once for its pinned packages; why it can't be made, else None."""
    folder = ENVIRONMENTS / f"clients-{name}"
    stamp, wanted = folder / ".ratchet-packages", "\n".join(client.packages)
    if stamp.is_file() and stamp.read_text() == wanted:
        return None
    if client.npm and shutil.which("npm") is None:
        return "npm is not installed"
    folder.mkdir(parents=True, exist_ok=True)
    if client.npm:
        (folder / "package.json").write_text(json.dumps({"name": f"clients-{name}", "private": True, "type": "module"}))
        steps = [["npm", "install", "--silent", "--no-audit", "--no-fund", "--save-exact", *client.packages]]
    else:
        python = str(folder / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *client.packages]
        steps = [[sys.executable, "-m", "venv", str(folder)], pip]
    for step in steps:
        try:
            done = subprocess.run(
                step, cwd=folder, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return f"not installed within {INSTALL_SECONDS} s"
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line and "WARN" not in line.upper()]
            return (lines or ["the installer failed"])[-1][:200]
    stamp.write_text(wanted)
    return None


def beneath(name: str, client: Client) -> dict[str, str]:
    """The versions of the SDKs that were installed along with a Python client."""
    if client.npm:
        return {}
    code = (
        "import importlib.metadata as m, json; names = ('openai', 'anthropic', 'litellm', 'httpx'); found = "
        "{d.name: d.version for d in m.distributions() if d.name in names}; print(json.dumps(found))"
    )
    python = str(ENVIRONMENTS / f"clients-{name}" / "bin" / "python")
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return dict(json.loads(done.stdout))


def command(name: str, client: Client) -> list[str]:
    """What runs the script in its environment. Node looks for packages beside a script, so those are copied there."""
    folder = ENVIRONMENTS / f"clients-{name}"
    if not client.npm:
        return [str(folder / "bin" / "python"), str(AGENTS / client.script)]
    for file in (client.script, "_common.mjs"):
        shutil.copyfile(AGENTS / file, folder / file)
    return ["node", str(folder / client.script)]


def run(name: str, client: Client, server: Served, upstream: FakeUpstream) -> Outcome:
    """One client against the server: what it did, what was recorded, and whether that fits."""
    outcome = Outcome(name, client.packages, beneath(name, client), note=client.retells)
    scope = f"/e/{name}-{uuid.uuid4().hex[:8]}" if client.retells else ""
    began, mark, before = time.monotonic(), time.time_ns(), len(upstream.requests)
    with tempfile.TemporaryDirectory(prefix="client") as home:
        urls = {"OPENAI_BASE_URL": f"{server.url}{scope}/v1", "ANTHROPIC_BASE_URL": server.url + scope}
        keys = {"ANTHROPIC_API_KEY": "client-key", "OPENAI_API_BASE": urls["OPENAI_BASE_URL"]}
        environment = server.environment(**urls, **keys, **QUIET, HOME=home, DSPY_CACHEDIR=home)
        environment.pop("PYTHONPATH", None)
        try:
            done = subprocess.run(
                command(name, client), env=environment, cwd=home, capture_output=True, text=True,
                timeout=RUN_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            outcome.problem = f"did not end within {RUN_SECONDS} s"
            return outcome
    outcome.seconds = round(time.monotonic() - began, 1)
    outcome.cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    outcome.calls = sum(request.method == "POST" for request in upstream.requests[before:])
    if done.returncode:
        outcome.problem = " / ".join(done.stderr.strip().splitlines()[-3:])[-400:]
    _judge(outcome, server, mark, bool(client.retells))
    return outcome


def _judge(outcome: Outcome, server: Served, mark: int, scoped: bool) -> None:
    api = server.client
    api.flush()
    sql = "SELECT episode_id, response_id, status FROM spans_v WHERE start_ns >= {} ORDER BY start_ns"
    rows = api.query(sql.format(int(mark)))["rows"]
    outcome.spans, outcome.episodes = len(rows), len({row[0] for row in rows})
    told = sum(case["calls"] for case in outcome.cases)
    expected = 1 if scoped else sum(case["episodes"] for case in outcome.cases)
    checks = {
        f"{outcome.spans} spans for {outcome.calls} calls": outcome.spans == outcome.calls,
        f"{outcome.calls} calls where {told} were expected": outcome.calls == told,
        f"{outcome.episodes} episodes where {expected} were expected": outcome.episodes == expected,
        "a call failed": all(row[2] == "ok" for row in rows),
        "nothing was recorded": bool(rows),
    }
    named = [row for row in rows if row[1]]
    if named:
        episode, response, _ = named[-1]
        api.reward({"response_id": response, "value": 0.75})
        api.flush()
        outcome.rewarded = [reward["value"] for reward in api.episode(episode)["rewards"]] == [0.75]
        checks["the reward did not reach its episode"] = outcome.rewarded
    failed = [text for text, holds in checks.items() if not holds]
    outcome.problem = outcome.problem or ("; ".join(failed) or None)


def show(outcomes: list[Outcome], console: Console) -> None:
    """The table."""
    table = Table("client", "packages", "cases", "calls", "spans", "episodes", "reward", "result")
    for one in outcomes:
        verdict = f"absent: {one.absent}" if one.absent else one.problem or "works unmodified"
        note = f" ({one.note})" if one.note and not one.absent else ""
        counts = (len(one.cases), one.calls, one.spans, one.episodes, "yes" if one.rewarded else "no")
        table.add_row(one.client, escape("\n".join(one.packages)), *map(str, counts), escape(verdict + note))
    console.print(table)


def result(outcomes: list[Outcome]) -> Result:
    """The outcomes in the form of a benchmark's result."""
    ran = [one for one in outcomes if one.absent is None]
    made = Result(
        "clients", {"clients_failed": ("<=", 0), "clients_run": (">=", len(CLIENTS)), "calls_lost": ("<=", 0)}
    )
    made.measures = {
        "clients_run": len(ran),
        "clients_failed": sum(one.problem is not None for one in ran),
        "cases": sum(len(one.cases) for one in ran),
        "calls": sum(one.calls for one in ran),
        "calls_lost": sum(abs(one.calls - one.spans) for one in ran),
    }
    made.notes = {one.client: {k: v for k, v in vars(one).items() if k != "client"} for one in outcomes}
    return made


def main() -> int:
    """Runs the matrix, one client after the other."""
    parser = argparse.ArgumentParser(description="Real clients against a server, each in its own environment.")
    parser.add_argument("--only", nargs="*", choices=CLIENTS, default=list(CLIENTS), help="some of the clients")
    parser.add_argument("--json", type=Path, default=RESULTS, help="folder of clients.json")
    options = parser.parse_args()
    console = Console(width=int(os.environ.get("COLUMNS", "150")))
    began = time.monotonic()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="matrix") as folder, FakeUpstream(default=model) as upstream:
        config = Path(folder) / "config.yaml"
        config.write_text(json.dumps({"upstream": {"default": upstream.url, "anthropic": upstream.url}}))
        with served(Path(folder) / "data", upstream.url, config=config) as server:
            for name in options.only:
                console.print(f"{name} ...", highlight=False)
                why = install(name, CLIENTS[name])
                absent = Outcome(name, CLIENTS[name].packages, absent=why)
                outcomes.append(absent if why else run(name, CLIENTS[name], server, upstream))
    show(outcomes, console)
    if len(options.only) == len(CLIENTS):
        result(outcomes).write(time.monotonic() - began, options.json)
    return int(any(one.problem for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
