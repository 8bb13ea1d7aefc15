"""Commands that read the store and change the registry; `ratchet.py` mounts them."""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from collector import settings
from collector.client import Client, open_client
from collector.console import command, console, emit_json
from collector.errors import BadInput, ConfigError
from collector.journal import FOLDER

Url = Annotated[
    str | None, typer.Option("--url", help="Server to ask; RATCHET_URL, else the one of the data directory.")
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Data directory; RATCHET_DATA_DIR, else ./data.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Plain JSON on standard output.")]
Limit = Annotated[int, typer.Option("--limit", min=1, help="Rows to show.")]
Note = Annotated[str | None, typer.Option("--note", help="Why; goes into the audit log.")]

episodes_app = typer.Typer(help="Episodes: the calls that belong together, and what they earned.", no_args_is_help=True)
slots_app = typer.Typer(help="Slots: the prompts and adapters that can be swapped.", no_args_is_help=True)
versions_app = typer.Typer(help="Versions of a slot.", no_args_is_help=True)
store_app = typer.Typer(help="Care of the journal and the store.", no_args_is_help=True)
jobs_app = typer.Typer(help="Jobs of the optimizer.", no_args_is_help=True)


@contextmanager
def connect(url: str | None, data_dir: Path | None) -> Iterator[Client]:
    """The client that the options mean, closed afterwards."""
    client = open_client(url, data_dir)
    try:
        yield client
    finally:
        client.close()


@episodes_app.command("list")
@command
def episodes_list(
    limit: Limit = 20,
    cursor: Annotated[str | None, typer.Option(help="`next` of the page before.")] = None,
    slot: Annotated[str | None, typer.Option(help="Only episodes that this slot served.")] = None,
    version: Annotated[int | None, typer.Option(help="Only episodes that this version served.")] = None,
    min_reward: Annotated[float | None, typer.Option(help="Lowest reward.")] = None,
    max_reward: Annotated[float | None, typer.Option(help="Highest reward.")] = None,
    status: Annotated[str | None, typer.Option(help="ok or error.")] = None,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Episodes, newest first."""
    if status not in (None, "ok", "error"):
        raise BadInput("--status must be ok or error", param="status")
    where = {"slot": slot, "version": version, "min_reward": min_reward, "max_reward": max_reward, "status": status}
    with connect(url, data_dir) as client:
        page = client.episodes(limit, cursor, **where)
    if as_json:
        emit_json(page)
        return
    table = _table("episode", "began", "calls", "tokens in/out", "reward", "version", "status")
    for row in page["episodes"]:
        tokens = f"{_or_dash(row['input_tokens'])}/{_or_dash(row['output_tokens'])}"
        served = _served(row["prompt_slot"], row["prompt_version"] or row["prompt_candidate"])
        cells = (row["episode_id"], _when(row["start_ns"]), row["steps"], tokens, _reward(row["reward"]), served)
        table.add_row(*map(str, cells), _status(row["status"]))
    console.print(table)
    if not page["episodes"]:
        console.print("No episode yet. Point an agent's OPENAI_BASE_URL at `ratchet serve`.")
    elif page["next"]:
        console.print(f"more: --cursor {page['next']}", style="dim", highlight=False)


@episodes_app.command("show")
@command
def episodes_show(
    episode_id: str,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
    otlp: Annotated[bool, typer.Option("--otlp", help="OTLP/JSON, for any OpenTelemetry backend.")] = False,
) -> None:
    """One episode: its steps in order, what was said, what it earned."""
    with connect(url, data_dir) as client:
        episode = client.episode_otlp(episode_id) if otlp else client.episode(episode_id)
    if as_json or otlp:
        emit_json(episode)
        return
    print_episode(episode)


def print_episode(episode: dict[str, Any]) -> None:
    """For people: its steps, with what each was worth where that is known, and its rewards."""
    console.print(f"[bold]{escape(episode['episode_id'])}[/]  reward {_reward(episode['reward'])}", highlight=False)
    for step in episode["steps"]:
        _print_step(step)
    for reward in episode["rewards"]:
        target = f"{reward['target_kind']} {reward['target_id']}"
        text = f"{reward['name']} = {reward['value']:g}  ({reward['source']}, {target})  {reward['explanation'] or ''}"
        console.print(f"[green]reward[/] {escape(text)}", highlight=False, soft_wrap=True)


def _print_step(step: dict[str, Any]) -> None:
    versions = ", ".join(f"{slot}@{version}" for slot, version in step["versions"].items())
    seconds = (step["end_ns"] - step["start_ns"]) / 1e9
    worth = "" if step.get("credit") is None else f"credit {step['credit']:+.3f}"
    head = (
        f"step {step['step']}  {step['model'] or ''}  {versions}  {seconds:.2f} s  {step['error_type'] or ''}  {worth}"
    )
    console.print(f"[bold cyan]{escape(head)}[/]", highlight=False)
    for message in [*step["input_messages"], *step["output_messages"]]:
        content = message.get("content")
        text = content if isinstance(content, str) else "" if content is None else str(content)
        calls = f" {message['tool_calls']}" if message.get("tool_calls") else ""
        console.print(f"  [dim]{escape(str(message.get('role')))}:[/] {escape(text + calls)}", highlight=False)


@command
def reward(
    value: Annotated[float, typer.Argument(help="The reward, a finite number.")],
    episode: Annotated[str | None, typer.Option(help="Id of the episode that earned it.")] = None,
    response: Annotated[str | None, typer.Option(help="Id of the response (chatcmpl-...).")] = None,
    span: Annotated[str | None, typer.Option(help="Id of the span.")] = None,
    trace: Annotated[str | None, typer.Option(help="Id of the trace.")] = None,
    name: Annotated[str, typer.Option(help="What was judged.")] = "reward",
    label: Annotated[str | None, typer.Option(help="A word for it.")] = None,
    explanation: Annotated[str | None, typer.Option(help="Why.")] = None,
    source: Annotated[str, typer.Option(help="code, human or llm.")] = "human",
    key: Annotated[str | None, typer.Option(help="Idempotency key: the same again is stored once.")] = None,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Reward one episode, response, span or trace: `ratchet reward 1.0 --episode ep-...`."""
    body = {
        "episode_id": episode,
        "response_id": response,
        "span_id": span,
        "trace_id": trace,
        "value": value,
        "name": name,
        "label": label,
        "explanation": explanation,
        "source": source,
        "idempotency_key": key,
    }
    with connect(url, data_dir) as client:
        stored = client.reward({field: given for field, given in body.items() if given is not None})
    if as_json:
        emit_json(stored)
    else:
        console.print(f"stored {stored['reward_id']}", highlight=False)


@slots_app.command("list")
@command
def slots_list(url: Url = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Every slot with what is live."""
    with connect(url, data_dir) as client:
        slots = client.slots()
    if as_json:
        emit_json({"slots": slots})
        return
    table = _table("slot", "kind", "versions", "live")
    for row in slots:
        table.add_row(row["slot"], row["kind"], str(row["versions"]), _arms(row["live"]))
    console.print(table)
    if not slots:
        console.print("No slot yet. `ratchet slots discover` proposes some from your calls, or name one in `slots:`.")


@slots_app.command("show")
@command
def slots_show(slot: str, url: Url = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Versions and audit log of a slot."""
    with connect(url, data_dir) as client:
        versions, log = client.versions(slot), client.deployments(slot)
    if as_json:
        emit_json({"slot": slot, "versions": versions, "deployments": log})
        return
    _print_versions(versions)
    table = _table("revision", "when", "action", "arms", "evidence", "note")
    for row in log:
        cells = (row["revision"], _when(row["ts_ns"]), row["action"], _arms(row["arms"]), row["evidence"])
        table.add_row(*map(str, cells), escape(row["note"] or ""))
    console.print(table)


@versions_app.command("list")
@command
def versions_list(slot: str, url: Url = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """The versions of a slot."""
    with connect(url, data_dir) as client:
        versions = client.versions(slot)
    if as_json:
        emit_json({"slot": slot, "versions": versions})
    else:
        _print_versions(versions)


def _print_versions(versions: Iterable[dict[str, Any]]) -> None:
    table = _table("version", "hash", "created", "parent", "live", "job", "text or path", "note")
    for row in versions:
        text = " ".join((row["template"] or row["path"] or "").split())
        live = f"{row['live']:.0%}" if row["live"] else ""
        cells = (row["version"], row["hash"], _when(row["created_ns"]), _or_dash(row["parent"]), live)
        table.add_row(*map(str, cells), row["job_id"] or "", escape(text[:60]), escape(row["note"] or ""))
    console.print(table)


@versions_app.command("show")
@command
def versions_show(
    slot: str,
    version: int,
    raw: Annotated[bool, typer.Option("--raw", help="The text alone, byte for byte.")] = False,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """One version, with its whole text; `--raw` to write it into a file."""
    with connect(url, data_dir) as client:
        found = client.version(slot, version)
    if raw:
        sys.stdout.write(found["template"] or found["path"])
        return
    if as_json:
        emit_json(found)
        return
    live = f", live {found['live']:.0%}" if found["live"] else ""
    console.print(f"[bold]{slot}@{version}[/] {found['hash']}{live}  {escape(found['note'] or '')}", highlight=False)
    console.print(found["template"] or found["path"], markup=False, highlight=False, soft_wrap=True)


@versions_app.command("diff")
@command
def versions_diff(
    slot: str, a: int, b: int, url: Url = None, data_dir: DataDir = None, as_json: AsJson = False
) -> None:
    """What changed from version A to version B."""
    with connect(url, data_dir) as client:
        old, new = client.version(slot, a), client.version(slot, b)
    before, after = ((version["template"] or version["path"] or "").splitlines() for version in (old, new))
    lines = list(difflib.unified_diff(before, after, f"{slot}@{a}", f"{slot}@{b}", lineterm=""))
    if as_json:
        emit_json({"slot": slot, "a": a, "b": b, "same": old["hash"] == new["hash"], "diff": lines})
        return
    for line in lines:
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
    if not lines:
        console.print("no difference")


@command
def promote(
    slot: str,
    version: int,
    traffic: Annotated[float, typer.Option(help="Share of new episodes, above 0 to 1.")] = 1.0,
    note: Note = None,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Deal new episodes to a version. A person may do so without evidence; the log says `manual`."""
    with connect(url, data_dir) as client:
        revision = client.promote(slot, version, traffic, note=note)
        live = next(row["live"] for row in client.slots() if row["slot"] == slot)
    _deployed(slot, revision, live, as_json)


@command
def rollback(slot: str, note: Note = None, url: Url = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Back to what was live before the last promote."""
    with connect(url, data_dir) as client:
        revision = client.rollback(slot, note=note)
        live = next(row["live"] for row in client.slots() if row["slot"] == slot)
    _deployed(slot, revision, live, as_json)


def _deployed(slot: str, revision: int, live: dict[str, float], as_json: bool) -> None:
    if as_json:
        emit_json({"slot": slot, "revision": revision, "live": live})
    else:
        console.print(f"{slot}: {_arms(live)} live for new episodes (revision {revision})", highlight=False)


@command
def query(
    sql: Annotated[str, typer.Argument(help="One SELECT, over spans_v, rewards_v, episodes_v, versions_v ...")],
    limit: Limit = 100,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Ask the store in SQL."""
    with connect(url, data_dir) as client:
        found = client.query(sql, limit)
    if as_json:
        emit_json(found)
        return
    table = _table(*found["columns"])
    for row in found["rows"]:
        table.add_row(*(escape("" if value is None else str(value)) for value in row))
    console.print(table)
    if found["truncated"]:
        console.print(f"only the first {limit} rows; --limit shows more", style="dim")


@store_app.command("verify")
@command
def store_verify(url: Url = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Check every line of the journal, and that the store holds exactly what they say. Exit 1 when it does not."""
    from collector import maintenance  # DuckDB: only the commands that need it wait for it

    with connect(url, data_dir) as client:
        where = Path(client.stats()["data_dir"])  # the server's own, whatever this command's default is
        if not (where / FOLDER).is_dir():
            raise BadInput(f"the journal {where / FOLDER} is not on this machine; verify it there", param="url")
        report = maintenance.verify(where / FOLDER, client)
    if as_json:
        emit_json({**asdict(report), "ok": report.ok})
    else:
        table = _table("event", "journal", "store")
        for name, count in report.journal.items():
            style = "" if count == report.store[name] else "red"
            table.add_row(name, str(count), str(report.store[name]), style=style)
        console.print(table)
        console.print(f"{report.archived} archived days", highlight=False)
        console.print(f"{report.segments} segments, {report.broken} broken lines, {report.quarantined} in quarantine")
        for name in report.not_loaded:
            console.print(f"[red]not loaded:[/] {name}", highlight=False)
        for name in report.damaged:
            console.print(f"[red]damaged in the archive:[/] {name}", highlight=False)
        for name in report.missing:
            console.print(f"[red]not in the journal any more:[/] {name}", highlight=False)
        console.print("[green]the store holds what the journal says[/]" if report.ok else "[red]they differ[/]")
    if not report.ok:
        raise typer.Exit(1)


@store_app.command("rebuild")
@command
def store_rebuild(
    data_dir: DataDir = None,
    config: Annotated[Path | None, typer.Option("--config", help="Configuration file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make the store anew from the journal. Refused while a server runs."""
    from collector import maintenance

    content = maintenance.rebuild(_settings(config, data_dir))
    if as_json:
        emit_json({name: {"rows": count, "hash": f"{digest:x}"} for name, (count, digest) in content.items()})
        return
    table = _table("event", "rows", "hash")
    for name, (count, digest) in content.items():
        table.add_row(name, str(count), f"{digest:x}")
    console.print(table)


@jobs_app.command("list")
@command
def jobs_list(url: Url = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Jobs, newest first."""
    with connect(url, data_dir) as client:
        jobs = client.jobs()
    if as_json:
        emit_json({"jobs": jobs})
        return
    table = _table("job", "kind", "slot", "status", "changed")
    for row in jobs:
        table.add_row(row["job_id"], row["kind"], row["slot"] or "", _status(row["status"]), _when(row["ts_ns"]))
    console.print(table)


@jobs_app.command("show")
@command
def jobs_show(job_id: str, url: Url = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """The latest state of a job."""
    with connect(url, data_dir) as client:
        job = client.job(job_id)
    if as_json:
        emit_json(job)
        return
    for key, value in job.items():
        console.print(f"[bold]{key}[/]: {escape(str(value))}", highlight=False, soft_wrap=True)


def _settings(config: Path | None, data_dir: Path | None) -> settings.Settings:
    if config is not None and not config.exists():
        raise ConfigError(f"no configuration at {config}", param="config")
    return settings.load(config, {"store.data_dir": None if data_dir is None else str(data_dir)})


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _when(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)


def _reward(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _served(slot: str | None, version: Any) -> str:
    return f"{slot}@{version}" if slot else ""


def _status(status: str) -> str:
    colour = {"ok": "green", "done": "green", "running": "cyan", "cancelled": "yellow"}.get(status, "red")
    return f"[{colour}]{status}[/]"


def _arms(arms: dict[str, float]) -> str:
    return ", ".join(f"@{version} {share:.0%}" for version, share in arms.items()) or "nothing"
