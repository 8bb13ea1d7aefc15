"""`ratchet optimize rl`: trains an adapter from rewards. Adds itself to the commands of `ratchet optimize`."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from collector import settings
from collector.client import Remote
from collector.console import command, console, emit_json, stderr
from collector.errors import BadInput, RatchetError
from optimize.cli import (
    AsJson,
    Concurrency,
    GraderSpec,
    Sandbox,
    Timeout,
    Url,
    beside_server,
    check_command,
    optimize_app,
    read_holdout,
    to_end,
)
from optimize.connect import connect
from optimize.screen import Bars

if TYPE_CHECKING:
    from optimize.rl.job import RlResult, Stage
    from optimize.rl.spec import RlSpec

PHASES = {"collect": "collect", "train": "train", "validation": "validation", "gate": "held-out test"}


@optimize_app.command("rl")
@command
def rl(
    model: Annotated[str, typer.Option(help="The base model: the demo model's name, or a folder of safetensors.")],
    agent: Annotated[
        list[str] | None, typer.Argument(help="The agent, after --: -- python agent.py", metavar="-- COMMAND")
    ] = None,
    tasks: Annotated[Path | None, typer.Option("--tasks", help="Tasks: JSONL, one object a line.")] = None,
    from_traces: Annotated[bool, typer.Option("--from-traces", help="Learn from stored episodes.")] = False,
    slot: Annotated[str | None, typer.Option(help="The adapter's slot; default: the model's name.")] = None,
    method: Annotated[str, typer.Option(help="rft, grpo, dr_grpo, dapo, cispo, sapo, gspo, kto, dpo or sft.")] = "rft",
    credit: Annotated[str | None, typer.Option(help="How steps share the reward; default: by the episodes.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Collect and train so many times.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Rollouts of each training task a round.")] = 4,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="OPENAI_TEMPERATURE of the agents that collect.")
    ] = 1.0,
    epochs: Annotated[float, typer.Option(min=0.1, help="Passes over a round's rows.")] = 2.0,
    batch_size: Annotated[int, typer.Option(min=2, help="Rows a step.")] = 16,
    learning_rate: Annotated[float | None, typer.Option(help="Default: the method's.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter.")] = 8,
    beta: Annotated[float, typer.Option(min=0, help="Weight of the divergence from the base model.")] = 0.0,
    max_stale: Annotated[int, typer.Option(min=0, help="How many versions old a learned call may be.")] = 0,
    role: Annotated[list[str] | None, typer.Option(help="Only calls of these prompt slots learn.")] = None,
    grade: GraderSpec = None,
    promote: Annotated[str, typer.Option(help="auto, canary (a tenth of new episodes) or never.")] = "auto",
    holdout: Annotated[str, typer.Option(help="Held-out tasks: a share such as 0.4, or a count.")] = "0.4",
    validation: Annotated[str, typer.Option(help="Validation tasks: a share of the rest, or a count.")] = "0.25",
    seed: Annotated[int, typer.Option(help="Of the split, the sampling and the training.")] = 0,
    concurrency: Concurrency = 4,
    timeout: Timeout = 120.0,
    sandbox: Sandbox = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Train an adapter from rewards, test it on held-out tasks, and promote it when the gain is proven.

    Exit 0 when the gate is passed (and the version is promoted, unless --promote never), 1 when it is not.
    """
    from optimize.apo.spec import file_sha256
    from optimize.rl.spec import RlSpec, check

    spec = RlSpec(
        model=model,
        slot=slot or re.sub(r"[^A-Za-z0-9_-]", "-", Path(model).name)[:64],
        method=method,
        credit=credit,
        tasks=None if tasks is None else str(tasks),
        command=tuple(agent or ()),
        grader=grade,
        from_traces=from_traces,
        rounds=rounds,
        samples=samples,
        temperature=temperature,
        holdout=read_holdout(holdout),
        validation=read_holdout(validation),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        rank=rank,
        beta=beta,
        max_stale=max_stale,
        seed=seed,
        promote=promote,  # type: ignore[arg-type]  # checked next
        concurrency=concurrency,
        timeout=timeout,
        sandbox=sandbox,
        roles=tuple(role or ()),
        tasks_sha256=None if tasks is None or not tasks.is_file() else file_sha256(tasks),
    )
    check(spec)
    spec.load()
    if agent:
        check_command(list(agent))
    run_job(spec, None, url, as_json)


def resume(job_id: str, found: Mapping[str, Any], url: str | None, as_json: bool) -> None:
    """Go on with a job from its stored spec."""
    from optimize.rl.spec import RlSpec

    spec = RlSpec.from_dict(found)
    if not Path(spec.cwd).is_dir():
        raise BadInput(f"the job's folder {spec.cwd} is gone", param="job_id")
    os.chdir(spec.cwd)
    run_job(spec, job_id, url, as_json)


def run_job(spec: "RlSpec", job_id: str | None, url: str | None, as_json: bool) -> None:
    """Run or resume the job, on the screen and to its exit code."""
    from optimize.rl.cli import threads_sleep

    threads_sleep()
    try:
        import trl  # noqa: F401
    except ModuleNotFoundError as error:
        message = f"training needs its extra ({error.name} is missing); run: pip install 'agent-ratchet[rl]'"
        raise RatchetError(message, code="extra_missing") from None
    config = settings.load()
    client = connect(url, config.store.data_dir)
    config = beside_server(config, client)
    base = model_folder(spec.model, Path(config.store.data_dir))
    out = stderr if as_json else console
    result = to_end(_work(spec, client, base, config, job_id, out))
    client.close()
    if as_json:
        emit_json(result.as_dict())
    else:
        show(result, console)
    if result.verdict != "promote":
        raise typer.Exit(1)


def model_folder(model: str, data_dir: Path) -> Path:
    """The base model's folder: as given, or the demo model where it lies already. Raises BadInput."""
    from optimize.rl.cli import model_directory

    for folder in (Path(model), data_dir / "models" / model, Path("data") / "models" / model):
        if (folder / "config.json").is_file():
            return folder
    return model_directory(model, data_dir)


async def _work(
    spec: "RlSpec", client: Remote, base: Path, config: settings.Settings, job_id: str | None, out: Console
) -> "RlResult":
    from optimize.jobs import new_job_id
    from optimize.rl.job import run_rl

    job_id = job_id or new_job_id()
    key = os.environ.get("RATCHET_API_KEY")
    with Bars(out, job_id, PHASES) as bars:

        def update(stage: "Stage") -> None:
            bars.show(stage.phase, stage.done, stage.total, stage.message)

        return await run_rl(
            spec, client, client.url, base, settings=config, api_key=key, job_id=job_id, on_progress=update
        )


def show(result: "RlResult", out: Console) -> None:
    """The rounds, what became of the calls, the verdict."""
    table = Table("round", "reward", "rows", "left out", "steps", "KL", "version", "validation", title=result.job_id)
    for one in result.rounds:
        left = {name: count for name, count in one.rows.items() if name not in ("calls", "rows", "merged")}
        table.add_row(
            str(one.number),
            "-" if one.reward is None else f"{one.reward:.3f}",
            f"{one.rows.get('rows', 0)} of {one.rows.get('calls', 0)} calls",
            ", ".join(f"{count} {name}" for name, count in left.items()) or "none",
            str(one.steps) + (f", stopped: {one.stopped}" if one.stopped else ""),
            f"{one.curve['kl_base']:.3f}" if "kl_base" in one.curve else "-",
            "-" if one.version is None else f"{result.slot}@{one.version}",
            "-" if one.validation is None else f"{one.validation:.3f}",
        )
    out.print(table)
    if result.gate is not None:
        low, high = result.gate.ci95
        figures = f"{result.gate.before:.3f} -> {result.gate.after:.3f}  ({low:+.3f} to {high:+.3f})"
        out.print(f"held-out tasks: {result.gate.n}, mean reward {figures}", highlight=False)
    colour = {"promote": "green", "shadow": "yellow"}.get(result.verdict, "red")
    out.print(f"[bold {colour}]{result.verdict}[/]: {escape(result.reason)}", highlight=False)


__all__ = ["optimize_app", "resume", "rl"]
