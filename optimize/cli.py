"""`ratchet run`, `ratchet optimize apo` and `ratchet jobs`; what needs numpy is imported when it is used."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from collector import settings
from collector.cli import jobs_app
from collector.client import Remote
from collector.console import command, console, emit_json, stderr
from collector.errors import BadInput
from optimize.connect import connect
from optimize.dataset import load_tasks, split
from optimize.grade import KNOWN, check_tasks, grader
from optimize.jobs import cancel, decoded
from optimize.rollout import Plan, Rollout
from optimize.runner import Runner
from optimize.sandbox import protections
from optimize.screen import Screen, show_result

if TYPE_CHECKING:
    from optimize.apo.result import ApoResult
    from optimize.apo.spec import ApoSpec

R = TypeVar("R")

Command = Annotated[list[str], typer.Argument(help="The agent, after --: -- python agent.py", metavar="-- COMMAND")]
Tasks = Annotated[Path, typer.Option("--tasks", help="Tasks: JSONL, one object a line.")]
GraderSpec = Annotated[
    str | None, typer.Option("--grader", help=f"Judges what the agent posts no reward for: {KNOWN}.")
]
Concurrency = Annotated[int, typer.Option("--concurrency", min=1, help="Agents at once.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds that one rollout may take.")]
Sandbox = Annotated[bool, typer.Option("--sandbox", help="Own empty folder, limits, bare environment.")]
Url = Annotated[str | None, typer.Option("--url", help="The server; RATCHET_URL, else the one of the data directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; progress goes to stderr.")]

optimize_app = typer.Typer(no_args_is_help=True)


@optimize_app.callback()
def optimize() -> None:
    """Make prompts better from traffic and rewards."""


@command
def run(
    agent: Command,
    tasks: Tasks,
    slot: Annotated[str | None, typer.Option(help="Pin this slot; without --version, its live version.")] = None,
    version: Annotated[int | None, typer.Option(help="The version to pin.")] = None,
    grade: GraderSpec = None,
    concurrency: Concurrency = 4,
    timeout: Timeout = 120.0,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each task.")] = 1,
    sandbox: Sandbox = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Run an agent on every task, each in an episode of its own, and sum up what it earned.

    Exit 0 when all rollouts completed, 1 when some failed.
    """
    out = stderr if as_json else console
    found = load_tasks(tasks)
    config = settings.load()
    judge = None if grade is None else grader(grade, config.optimizer)
    if grade is not None:
        check_tasks(grade, found)
    check_command(agent)
    client = connect(url, config.store.data_dir)
    pin = _pin(client, slot, version)
    if sandbox:
        _say_protections(out)
    runner = Runner(
        agent,
        client,
        client.url,
        api_key=os.environ.get("RATCHET_API_KEY"),
        grade=judge,
        grade_source="llm" if (grade or "").startswith("judge:") else "code",
        concurrency=concurrency,
        timeout=timeout,
        sandbox=sandbox,
    )
    plans = [Plan(task, pin, replicate) for replicate in range(repeat) for task in found]
    began = time.monotonic()
    rollouts = to_end(_with_progress(runner, plans, out))
    _sum_up(rollouts, time.monotonic() - began, as_json)
    client.close()
    if not all(rollout.ok for rollout in rollouts):
        raise typer.Exit(1)


def to_end(work: Coroutine[Any, Any, R]) -> R:
    """Run to the end; SIGTERM, like Ctrl-C, ends the agents first."""

    async def main() -> R:
        task = asyncio.current_task()
        if task is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        raise typer.Exit(128 + signal.SIGTERM) from None


def check_command(agent: list[str]) -> None:
    """Raise BadInput where the agent's program is nowhere to be found."""
    if shutil.which(agent[0]) is None:
        raise BadInput(f"there is no program {agent[0]!r}", param="command")


def _pin(client: Remote, slot: str | None, version: int | None) -> str | None:
    if slot is None:
        if version is not None:
            raise BadInput("--version needs --slot", param="version")
        return None
    if version is None:
        versions = client.versions(slot)
        if not versions:
            raise BadInput(f"the slot {slot} has no version yet, only candidates", param="slot")
        live = max(versions, key=lambda found: (found["live"], found["version"]))
        return f"{slot}@{live['version']}"
    client.version(slot, version)
    return f"{slot}@{version}"


def _say_protections(out: Console) -> None:
    active, absent = protections()
    for mark, lines in (("[green]on[/] ", active), ("[yellow]off[/]", absent)):
        for line in lines:
            out.print(f"sandbox {mark} {escape(line)}", highlight=False)


async def _with_progress(runner: Runner, plans: list[Plan], out: Console) -> list[Rollout]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    done: list[Rollout] = []
    with Progress(*columns, console=out) as progress:
        bar = progress.add_task("rollouts", total=len(plans))

        async def settled(batch: list[tuple[int, Rollout]]) -> None:
            done.extend(rollout for _, rollout in batch)
            failed = sum(not rollout.ok for rollout in done)
            mean = sum(rollout.score for rollout in done) / len(done)
            progress.update(bar, completed=len(done), description=f"mean reward {mean:.2f}, {failed} failed")

        rollouts = await runner.run_all(plans, settled)
        await asyncio.to_thread(runner.client.flush)  # so that what is looked at next has the last rewards
        return rollouts


def _sum_up(rollouts: list[Rollout], seconds: float, as_json: bool) -> None:
    from optimize.summary import summarise

    summary = summarise(rollouts, seconds)
    if as_json:
        emit_json({**summary.as_dict(), "rollouts": [rollout.as_dict() for rollout in rollouts]})
        return
    low, high = summary.ci95
    table = Table(show_header=False)
    table.add_row("rollouts", f"{summary.n} in {summary.seconds:.1f} s")
    table.add_row("mean reward", f"[bold]{summary.mean:.3f}[/]  (95%: {low:.3f} to {high:.3f}; a failure counts 0)")
    table.add_row("calls", "not known" if summary.calls is None else str(summary.calls))
    both = [summary.input_tokens, summary.output_tokens]
    table.add_row("tokens in / out", " / ".join("not known" if count is None else str(count) for count in both))
    for reason, count in summary.reasons.items():
        table.add_row(f"[red]failed: {escape(reason)}[/]", str(count))
    console.print(table)
    for rollout in [rollout for rollout in rollouts if not rollout.ok][:3]:
        text = f"{rollout.task_id}: {rollout.reason}: {rollout.detail[-300:]}"
        stderr.print(escape(text), style="red", highlight=False)


@optimize_app.command("apo")
@command
def apo(
    slot: Annotated[
        list[str],
        typer.Option(help="The prompt to improve; an unknown name adopts the agent's own. Repeatable: all together."),
    ],
    agent: Annotated[
        list[str] | None, typer.Argument(help="The agent: -- python agent.py", metavar="-- COMMAND")
    ] = None,
    tasks: Annotated[Path | None, typer.Option(help="Tasks: JSONL, one object a line.")] = None,
    grade: GraderSpec = None,
    replay: Annotated[bool, typer.Option("--replay", help="Instead of an agent: send logged requests again.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replay calls of several-step episodes too.")] = False,
    budget: Annotated[int, typer.Option(help="Rollouts of the search; the test adds 2 a held-out task.")] = 400,
    budget_tokens: Annotated[
        int | None, typer.Option(help="Tokens of all calls, the optimizer's and the test's too.")
    ] = None,
    budget_usd: Annotated[float | None, typer.Option(help="The same in US dollars.")] = None,
    budget_seconds: Annotated[float | None, typer.Option(help="Seconds that the whole job may take.")] = None,
    engine: Annotated[str, typer.Option(help="factorial, beam or gepa.")] = "factorial",
    param: Annotated[
        list[str] | None, typer.Option("--param", help="An engine's parameter, for example beam_width=2; repeatable.")
    ] = None,
    promote: Annotated[str, typer.Option(help="auto, canary (a tenth of new episodes) or never.")] = "auto",
    holdout: Annotated[str, typer.Option(help="Held-out tasks: a share such as 0.4, or a count.")] = "0.4",
    replicates: Annotated[int, typer.Option(help="Rollouts a held-out task and prompt.")] = 1,
    gate: Annotated[
        str | None, typer.Option(help="fixed: all held-out tasks; anytime: stop once proven. Default: gate.method.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split and the search.")] = 0,
    concurrency: Concurrency = 4,
    timeout: Timeout = 120.0,
    sandbox: Sandbox = False,
    runner: Annotated[str, typer.Option(help="local.")] = "local",
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Search for a better prompt, test it on held-out tasks, and promote it when the gain is proven.

    Exit 0 when the gate is passed (and the version is promoted, unless --promote never), 1 when it is not.
    """
    from optimize.apo.spec import ApoSpec, check, file_sha256

    held_out = read_holdout(holdout)
    if replay and agent:
        raise BadInput("give either --replay or an agent's command, not both", param="replay")
    if tasks is None and not replay:
        raise BadInput("give the tasks with --tasks T.jsonl, or --replay to learn from logged calls", param="tasks")
    if tasks is not None and not replay:
        split(load_tasks(tasks), held_out, seed)
    spec = ApoSpec(
        slot=",".join(slot),
        tasks="" if tasks is None else str(tasks),
        command=tuple(agent or ()),
        grader=grade,
        budget=budget,
        holdout=held_out,
        seed=seed,
        engine=engine,
        promote=promote,  # type: ignore[arg-type]  # checked next
        concurrency=concurrency,
        timeout=timeout,
        sandbox=sandbox,
        model=os.environ.get("OPENAI_MODEL"),
        tasks_sha256=None if tasks is None else file_sha256(tasks),
        mode="replay" if replay else "agent",
        force=force,
        budget_tokens=budget_tokens,
        budget_usd=budget_usd,
        budget_seconds=budget_seconds,
        replicates=replicates,
        runner=runner,
        engine_params=_params(param or []),
        gate=gate or settings.load().gate.method,  # type: ignore[arg-type]  # checked next
    )
    check(spec)
    if agent:
        check_command(agent)
    _apo(spec, None, url, as_json)


def _params(given: list[str]) -> dict[str, int]:
    """Engine parameters of `name=value`. Raises BadInput where one is not."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not value.isdigit():
            raise BadInput(f"--param is name=number, for example beam_width=2, not {text!r}", param="param")
        found[name.replace("-", "_")] = int(value)
    return found


def read_holdout(text: str) -> int | float:
    """A share such as 0.4, or a count. Raises BadInput."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise BadInput(f"--holdout is a share such as 0.4 or a count, not {text!r}", param="holdout") from None


def _apo(spec: "ApoSpec", job_id: str | None, url: str | None, as_json: bool) -> None:
    """Run or resume the job, on the screen and to its exit code."""
    config = settings.load()
    client = connect(url, config.store.data_dir)
    out = stderr if as_json else console
    if spec.sandbox:
        _say_protections(out)
    result = to_end(_search(spec, client, beside_server(config, client), job_id, out))
    client.close()
    if as_json:
        emit_json(result.as_dict())
    else:
        show_result(result, console)
    if result.verdict != "promote":
        raise typer.Exit(1)


async def _search(
    spec: "ApoSpec", client: Remote, config: settings.Settings, job_id: str | None, out: Console
) -> "ApoResult":
    from optimize.apo.job import run_apo
    from optimize.jobs import new_job_id

    job_id = job_id or new_job_id()
    key = os.environ.get("RATCHET_API_KEY")
    with Screen(out, job_id) as screen:
        return await run_apo(
            spec, client, client.url, settings=config, api_key=key, job_id=job_id, on_progress=screen.update
        )


def beside_server(config: settings.Settings, client: Remote) -> settings.Settings:
    """The settings with the server's own data directory, where it is one of this machine: reports go there."""
    data_dir = Path(str(client.identity()["data_dir"]))
    if not os.access(data_dir, os.W_OK):
        return config
    return config.model_copy(update={"store": config.store.model_copy(update={"data_dir": data_dir})})


@jobs_app.command("resume")
@command
def jobs_resume(job_id: str, url: Url = None, as_json: AsJson = False) -> None:
    """Go on with a job that died or was cancelled; what it paid for is not paid again."""
    from optimize.apo.spec import ApoSpec

    job = _job(job_id, url)
    if job["kind"] not in ("apo", "rl"):
        raise BadInput(f"{job_id} is a job of kind {job['kind']}; apo and rl jobs can be resumed", param="job_id")
    if job["status"] == "done":
        raise BadInput(f"{job_id} is done", param="job_id")
    if job["kind"] == "rl":
        from optimize.rl.commands import resume

        resume(job_id, decoded(job, "spec"), url, as_json)
        return
    spec = ApoSpec.from_dict(decoded(job, "spec"))
    if spec.mode == "function":
        raise BadInput(f"{job_id} calls a function of a script: run the script again to resume it", param="job_id")
    if not Path(spec.cwd).is_dir():
        raise BadInput(f"the job's folder {spec.cwd} is gone", param="job_id")
    os.chdir(spec.cwd)
    _apo(spec, job_id, url, as_json)


@jobs_app.command("cancel")
@command
def jobs_cancel(job_id: str, url: Url = None, as_json: AsJson = False) -> None:
    """Stop a running job after the rollouts under way; it can be resumed."""
    client = connect(url, settings.load().store.data_dir)
    cancel(client, job_id)
    client.close()
    if as_json:
        emit_json({"job_id": job_id, "status": "cancelled"})
    else:
        console.print(f"{job_id} is cancelled; go on with it by: ratchet jobs resume {job_id}", highlight=False)


def _job(job_id: str, url: str | None) -> dict[str, Any]:
    client = connect(url, settings.load().store.data_dir)
    try:
        return client.job(job_id)
    finally:
        client.close()
