"""`ratchet store compact` and `ratchet store retain`: old days to the archive, too old days away."""

from typing import Annotated, Any

import typer

from collector.cli import AsJson, DataDir, Url, connect, store_app
from collector.console import command, console, emit_json
from collector.errors import BadInput

__all__ = ["store_app"]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


@store_app.command("compact")
@command
def compact(
    days: Annotated[int, typer.Option(min=1, help="Days that ended this many days ago or earlier.")] = 1,
    dry_run: DryRun = False,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Move whole days of the journal to Parquet files in archive/. Nothing is lost, a running server goes on.

    With `store.url`, ClickHouse has the rows: what it holds of those days leaves the journal.
    """
    with connect(url, data_dir) as client, console.status("compacting"):
        report = client.compact(days, dry_run)
    _show(report, "would be archived" if dry_run else "archived", as_json)


@store_app.command("retain")
@command
def retain(
    days: Annotated[int, typer.Option(min=1, help="Days to keep beside the one under way.")],
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Delete the spans, payloads and rewards of older days. Versions, deployments, jobs and evaluations stay."""
    with connect(url, data_dir) as client:
        report = client.retain(days, dry_run=True)
        if not dry_run and report["days"]:
            if not yes:
                _ask(report, as_json)
            with console.status("deleting"):
                report = client.retain(days)
    _show(report, "would be deleted" if report["dry_run"] else "deleted", as_json)


def _ask(report: dict[str, Any], as_json: bool) -> None:
    if as_json or not console.is_terminal:
        raise BadInput("deleting cannot be undone: give --yes, or --dry-run to see what would go", param="yes")
    days = report["days"]
    typer.confirm(f"Delete {report['spans']} spans of {len(days)} days, {days[0]} to {days[-1]}?", abort=True)


def _show(report: dict[str, Any], done: str, as_json: bool) -> None:
    if as_json:
        emit_json(report)
        return
    days = report["days"]
    if not days:
        console.print(f"no day {done}")
        return
    size = f", {report['bytes'] / 1e6:.1f} MB" if report["bytes"] else ""
    rows = f"{report['spans']} spans, {report['rewards']} rewards"
    console.print(f"{done}: {len(days)} days ({days[0]} to {days[-1]}), {rows}{size}", highlight=False)
