"""`ratchet slots discover` and `ratchet slots adopt`: from the prompts that agents send to a slot."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from collector.cli import AsJson, DataDir, Limit, Note, Url, connect, slots_app
from collector.console import command, console, emit_json
from collector.errors import BadInput

__all__ = ["slots_app"]

_SHOWN = 600  # characters of a template


@slots_app.command("discover")
@command
def discover(
    limit: Limit = 20,
    sample: Annotated[int, typer.Option(min=1, max=20_000, help="Calls to look at, the newest first.")] = 4_000,
    least_calls: Annotated[int, typer.Option(min=1, help="Calls that must have sent a prompt.")] = 1,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Prompts that no slot knows: templates mined from the calls that sent them."""
    with connect(url, data_dir) as client:
        found = client.discover(sample, least_calls)
    found["proposals"] = found["proposals"][:limit]
    if as_json:
        emit_json(found)
        return
    for proposal in found["proposals"]:
        _print_proposal(proposal)
    console.print(
        f"{len(found['proposals'])} proposals from {found['sampled']} of {found['calls']} calls without a known prompt",
        highlight=False,
    )
    if found["proposals"]:
        console.print("`ratchet slots adopt PROPOSAL --slot NAME` makes one a slot; nothing changes until you promote.")


def _print_proposal(proposal: dict[str, Any]) -> None:
    head = f"{proposal['role']}, {proposal['calls']} calls, {proposal['texts']} texts, {', '.join(proposal['models'])}"
    console.print(f"[bold cyan]{proposal['proposal']}[/]  {escape(head)}", highlight=False, soft_wrap=True)
    text = proposal["template"]
    console.print(text if len(text) <= _SHOWN else text[:_SHOWN] + " ...", markup=False, highlight=False)
    if proposal["variables"]:
        table = Table("variable", "values", box=None, header_style="dim")
        for name, values in proposal["variables"].items():
            table.add_row(escape(f"{{{name}}}"), escape(" | ".join(value[:40] for value in values)))
        console.print(table)
    console.print()


@slots_app.command("adopt")
@command
def adopt(
    slot: Annotated[str, typer.Option("--slot", help="Name of the new slot.")],
    proposal: Annotated[str | None, typer.Argument(help="Id that `ratchet slots discover` shows.")] = None,
    template: Annotated[
        Path | None, typer.Option("--template", help="File with the template, instead of a proposal.")
    ] = None,
    note: Note = None,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a slot of a mined template: its version 1, live at once, is what the agent sends already."""
    if (proposal is None) == (template is None):
        raise BadInput("give either PROPOSAL or --template FILE", param="proposal")
    text = None if template is None else _read(template)
    with connect(url, data_dir) as client:
        made = client.adopt(slot, proposal=proposal, template=text, note=note)
    if as_json:
        emit_json(made)
    else:
        console.print(f"{made['slot']}@{made['version']} is live and changes nothing yet ({made['hash']})")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--template: {file} can't be read: {error}", param="template") from None
