"""`ratchet demo`: an ordinary agent learns, with real parts only, and every number measured.

The demo types the same commands that a user would (`ratchet engine`, `serve`, `run`, `optimize apo`), each its own
process, and keeps one agent process running all along, whose next answers change when the winner goes live.
"""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.columns import Columns
from rich.panel import Panel
from rich.table import Table

from collector.client import Remote
from collector.console import command, console
from collector.errors import BadInput, RatchetError
from collector.settings import DEFAULT_URL

SLOT = "capital"
LOCAL_MODEL = "gemma-3-270m"
HELD_OUT = 64  # held-out countries: enough to prove a gain of 0.25 in exact answers
TRAFFIC = 48  # countries that the agent is asked for before anything is learned
START_SECONDS = 120.0
OPENAI = "https://api.openai.com/v1"


@dataclass
class Stage:
    """Where the demo runs: the folders, the upstream and the processes it started."""

    home: Path  # the folder with examples/
    data: Path
    upstream: str | None
    model: str
    engine: str
    url: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def example(self) -> Path:
        """The unmodified agent's folder."""
        return self.home / "examples" / "capital_city"

    @property
    def environment(self) -> dict[str, str]:
        """What our own commands and the agent see: nothing but the model's name beside the user's environment."""
        return {**os.environ, "OPENAI_MODEL": self.model, "RATCHET_URL": self.url}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the block under `name`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - began, 3)


def ratchet(*arguments: str) -> list[str]:
    """The command line of our own program, in this interpreter, safe from a `ratchet.py` in the current folder."""
    return [sys.executable, "-P", "-c", "import ratchet; ratchet.main()", *arguments]


@contextlib.contextmanager
def process(command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """A child whose output goes to `log`; it is asked to end when the block does, and ends when this process dies."""
    alive_read, alive_write = os.pipe()
    with log.open("w") as sink:
        child = subprocess.Popen(
            [*command, "--parent-fd", str(alive_read)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=[alive_read],
            start_new_session=True,  # Ctrl-C reaches the demo, which then ends its children in order
        )
    os.close(alive_read)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(timeout=35)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        os.close(alive_write)


def wait_for(ready: Callable[[], str | None], child: subprocess.Popen[str], log: Path, what: str) -> str:
    """The URL that `ready` finds once a server answers. Raises RatchetError with the server's last words."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise RatchetError(f"{what} ended at start:\n{log.read_text()[-2000:]}")
        if (url := ready()) is not None:
            return url
        time.sleep(0.05)
    raise RatchetError(f"{what} did not become ready within {START_SECONDS:.0f} s; see {log}")


@contextlib.contextmanager
def upstream(stage: Stage) -> Iterator[None]:
    """The model to learn with: the given endpoint, or the local model served by our own engine."""
    if stage.upstream is not None:
        console.print(f"[bold]Model[/] {stage.model} at {stage.upstream}")
        yield
        return
    from optimize.rl.convert import ensure_demo_model

    console.print(f"[bold]Model[/] {LOCAL_MODEL} on this machine's CPU, served by `ratchet engine`")
    with stage.timed("model"):
        ensure_demo_model(stage.home / "data")
    log = stage.data / "engine.log"
    engine = ratchet("engine", "--model", LOCAL_MODEL, "--port", "0", "--data-dir", str(stage.home / "data"))

    def ready() -> str | None:
        found = re.search(r"ready at (\S+)", log.read_text())
        return found.group(1) if found else None

    began = time.monotonic()
    with process(engine, {**stage.environment, "COLUMNS": "200"}, log) as child:
        stage.upstream = wait_for(ready, child, log, "the engine")
        stage.seconds["engine"] = round(time.monotonic() - began, 3)
        yield


@contextlib.contextmanager
def served(stage: Stage) -> Iterator[None]:
    """`ratchet serve` between the agent and the model."""
    log = stage.data / "serve.log"
    serve = ratchet("serve", "--port", "0", "--data-dir", str(stage.data), "--upstream", str(stage.upstream))

    def ready() -> str | None:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return str(json.loads((stage.data / "server.json").read_text())["url"])
        return None

    with process(serve, stage.environment, log) as child:
        stage.url = wait_for(ready, child, log, "the proxy")
        console.print(f"[bold]Proxy[/] {stage.url}   (the agent's only setting: OPENAI_BASE_URL={stage.url}/v1)")
        yield


def ours(stage: Stage, *arguments: str) -> dict[str, Any]:
    """Run one of our commands with `--json`; its progress stays visible, its answer comes back."""
    shown = _shown(stage, arguments)
    console.print(f"\n[dim]$ {shown}[/]", highlight=False)
    done = subprocess.run(ratchet(*arguments), env=stage.environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        raise RatchetError(f"`{shown}` failed (exit {done.returncode}); see {stage.data}/serve.log")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _shown(stage: Stage, arguments: Sequence[str]) -> str:
    """The command as a user would type it in the repository's root."""
    words = ("python" if word == sys.executable else word for word in arguments if word != "--json")
    return shlex.join(["ratchet", *words]).replace(f"{stage.home}/", "")


class Agent:
    """The long-running agent: one process, one question at a time, no restart."""

    def __init__(self, stage: Stage) -> None:
        environment = {**stage.environment, "OPENAI_BASE_URL": f"{stage.url}/v1"}
        environment.setdefault("OPENAI_API_KEY", "not-needed-on-loopback")
        self._child = subprocess.Popen(
            [sys.executable, str(stage.example / "agent.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def ask(self, task: dict[str, Any]) -> str:
        """The agent's answer to one task."""
        assert self._child.stdin is not None and self._child.stdout is not None  # noqa: S101 - both are pipes
        self._child.stdin.write(json.dumps(task) + "\n")
        return self._child.stdout.readline().rstrip("\n")

    def close(self) -> None:
        """End the process."""
        self._child.terminate()
        self._child.wait(timeout=10)


def learn(stage: Stage, budget: int, seed: int) -> dict[str, Any]:
    """Collect traffic on the training countries, then search and gate; the optimizer's own answer."""
    from optimize.dataset import load_tasks, split

    tasks = stage.example / "tasks.jsonl"
    search, _ = split(load_tasks(tasks), HELD_OUT, seed)
    traffic = stage.data / "traffic.jsonl"
    traffic.write_text("".join(json.dumps(task.data) + "\n" for task in search[:TRAFFIC]))
    agent = ["--", sys.executable, str(stage.example / "agent.py")]
    graded = [
        "--grader",
        "python:examples.capital_city.grader.grade",
        "--url",
        stage.url,
        "--concurrency",
        "8",
        "--json",
    ]
    with stage.timed("collect"):
        ours(stage, "run", "--tasks", str(traffic), *graded, *agent)
    how = ["--slot", SLOT, "--holdout", str(HELD_OUT), "--budget", str(budget), "--seed", str(seed)]
    with stage.timed("optimize"):
        return ours(stage, "optimize", "apo", "--tasks", str(tasks), *how, "--promote", "never", *graded, *agent)


def go_live(stage: Stage, client: Remote, agent: Agent, result: dict[str, Any]) -> float:
    """Promote on the gate's evidence while the agent keeps asking; seconds from the promotion to the first call that
    got the new version, as the spans tell."""
    tasks = [json.loads(line) for line in (stage.data / "traffic.jsonl").read_text().splitlines()[:12]]
    before = [agent.ask(task) for task in tasks[:4]]
    revision = client.promote(SLOT, result["version"], evidence="gate", job_id=result["job_id"])
    after = [agent.ask(task) for task in tasks]
    client.flush()
    table = Table("country", "before", "after", title="The same agent process, not restarted")
    for task, old, new in zip(tasks, before, after, strict=False):
        table.add_row(task["country"], old, new)
    console.print(table)
    return swap_seconds(client, revision, result["version"])


def swap_seconds(client: Remote, revision: int, version: int) -> float:
    """From the promotion's entry in the audit log to the start of the first call that the new version served."""
    promoted = next(entry["ts_ns"] for entry in client.snapshot()["log"] if entry["revision"] == revision)
    rows = client.query("select prompt_version, start_ns from spans_v where prompt_version is not null")["rows"]
    first = min(start for served, start in rows if served == version and start > promoted)
    return float(first - promoted) / 1e9


def holdout(result: dict[str, Any]) -> dict[str, Any]:
    """Exact-match rates on the held-out countries, paired, with the interval and p-value of their difference."""
    from optimize.gate import decide

    pairs = result["pairs"]
    if not pairs:  # nothing was better enough in the search to be held against the held-out countries
        return {"n": 0, **dict.fromkeys(("before", "after", "diff", "p_value")), "ci95": [None, None]}
    before = [float(pair["before"] >= 1.0) for pair in pairs]
    after = [float(pair["after"] >= 1.0) for pair in pairs]
    verdict = decide(before, after, alpha=result["holdout"]["alpha"], candidates_tried=1)
    return {
        "n": verdict.n,
        "before": verdict.before,
        "after": verdict.after,
        "diff": verdict.diff,
        "ci95": list(verdict.ci95),
        "p_value": verdict.p_value,
    }


def counts(stage: Stage, client: Remote) -> dict[str, int]:
    """Calls as our engine counted them (another upstream's: as the proxy's metrics did), and what is stored."""
    import httpx

    stored = client.query("select (select count(*) from spans_v), (select count(*) from rewards_v)")["rows"][0]
    if stage.engine == "local":
        calls = httpx.get(str(stage.upstream).removesuffix("/v1") + "/healthz").json()["requests"]
    else:
        samples = re.findall(r"^ratchet_calls_total\{.*\} (\S+)$", httpx.get(f"{stage.url}/metrics").text, re.MULTILINE)
        calls = sum(map(float, samples))
    return {"calls": int(calls), "spans": int(stored[0]), "rewards": int(stored[1])}


def show(report: dict[str, Any], result: dict[str, Any], stage: Stage) -> None:
    """The closing table, the prompts side by side, and where to look next."""
    found = report["holdout"]
    table = Table("", "before", "after", "difference", "95% interval", title=f"Held-out countries: {found['n']}")
    if found["n"]:
        low, high = found["ci95"]
        row = [f"{found[key]:.2f}" for key in ("before", "after")]
        table.add_row("exact answers", *row, f"{found['diff']:+.2f}", f"{low:+.2f} to {high:+.2f}")
    console.print(table)
    console.print(result["reason"])
    console.print(
        f"{report['calls']} calls, {report['spans']} spans, {report['rewards']} rewards, "
        f"{report['seconds']['total']:.0f} s in all; new version live after {report['swap_seconds'] or 0:.2f} s"
    )
    panels = [Panel(result[key], title=title) for key, title in (("seed_template", "old"), ("best_template", "new"))]
    console.print(Columns(panels, equal=True, expand=True))
    console.print(f"Report: {result['report']}")
    console.print(f"Look around: ratchet serve --data-dir {stage.data}   then {DEFAULT_URL}/api/episodes, or")
    console.print(f"             ratchet episodes list --data-dir {stage.data}")


def run_demo(stage: Stage, budget: int, seed: int) -> dict[str, Any]:
    """The whole loop; the report as `demo-report.json` holds it."""
    began = time.monotonic()
    with upstream(stage), served(stage):
        client = Remote(stage.url)
        agent = Agent(stage)
        try:
            result = learn(stage, budget, seed)
            promoted = result["verdict"] == "promote"
            swap = go_live(stage, client, agent, result) if promoted else None
        finally:
            agent.close()
        client.flush()
        report = {
            "holdout": holdout(result),
            **counts(stage, client),
            "versions": client.versions(SLOT),
            "promoted": promoted,
            "swap_seconds": swap,
            "engine": f"{stage.engine}: {stage.model}",
            "seconds": {**stage.seconds, "total": round(time.monotonic() - began, 3)},
        }
        show(report, result, stage)
        return report


@command
def demo(
    name: Annotated[str, typer.Argument(help="Which demo: capital.")] = "capital",
    upstream_url: Annotated[str | None, typer.Option("--upstream", help="An OpenAI-compatible URL to use.")] = None,
    model: Annotated[str | None, typer.Option(help="The model to ask for at --upstream.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where to keep this run.")] = None,
    budget: Annotated[int, typer.Option(min=20, help="Rollouts that the search may spend.")] = 80,
    seed: Annotated[int, typer.Option(help="Of the split and the search.")] = 0,
    report_path: Annotated[
        Path | None, typer.Option("--report", help="JSON; default: ./demo-report.json of the repository.")
    ] = None,
) -> None:
    """Watch an unmodified agent get better at naming capitals; exit 1 when the gate finds no proven gain."""
    report_path = report_path.resolve() if report_path else None
    stage = _stage(name, upstream_url, model, data_dir)
    report = run_demo(stage, budget, seed)
    (report_path or stage.home / "demo-report.json").write_text(json.dumps(report, indent=2) + "\n")
    if not report["promoted"]:
        console.print("[yellow]The gate found no proven gain, so nothing was promoted.[/]")
        raise typer.Exit(1)


def _stage(name: str, url: str | None, model: str | None, data_dir: Path | None) -> Stage:
    if name != "capital":
        raise BadInput(f"there is no demo `{name}`; there is: capital", param="name")
    home = Path(__file__).resolve().parent.parent
    if not (home / "examples" / "capital_city" / "agent.py").is_file():
        raise RatchetError("the examples are not beside the program: run the demo from a clone of the repository")
    if url is None and os.environ.get("OPENAI_API_KEY"):
        url, model = os.environ.get("OPENAI_BASE_URL", OPENAI), model or "gpt-4.1-nano"
    if url is not None and model is None:
        raise BadInput("--upstream needs --model: the name to ask for", param="model")
    data = (data_dir or home / "data" / f"demo-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    data.mkdir(parents=True, exist_ok=True)
    os.chdir(home)  # the grader is a module of the examples
    return Stage(home, data, url, model or LOCAL_MODEL, "local" if url is None else "upstream")
