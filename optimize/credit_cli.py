"""`ratchet optimize credit --compare`, and `ratchet episodes show --credit METHOD`: as training does it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from collector import settings
from collector.cli import connect, episodes_app, episodes_show, print_episode
from collector.console import command, console, emit_json
from collector.errors import BadInput
from optimize.cli import optimize_app

if TYPE_CHECKING:
    from collector.client import Client
    from collector.model import Episode

Url = Annotated[str | None, typer.Option("--url", help="The server; default: the one of the data directory.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="The store, where no server has it open.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Limit = Annotated[int, typer.Option("--limit", min=1, help="Newest calls to look at.")]


@optimize_app.command("credit")
@command
def credit(
    compare: Annotated[bool, typer.Option("--compare", help="Compare all methods on the stored episodes.")] = False,
    limit: Limit = 20_000,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """How much noise each way of sharing out rewards removes from your own episodes, and which to use."""
    from optimize.compare import compare as compared

    if not compare:
        raise BadInput("say what to do: --compare", param="compare")
    with connect(url, data_dir) as client:
        found = compared(_episodes(client, limit), settings.load().rewards.weights)
    if as_json:
        emit_json(found.as_dict())
        return
    table = Table("method", "noise removed", title=f"{found.rewarded} of {found.episodes} episodes have a reward")
    for name, share in sorted(found.removed.items(), key=lambda one: -one[1]):
        table.add_row(f"[bold]{name}[/]" if name == found.recommended else name, f"{share:.0%}")
    console.print(table)
    known = "returns do not vary" if found.value_r2 is None else f"explains {found.value_r2:.0%} of held-out returns"
    console.print(f"value function: {known}, foresight {found.foresight:+.1f} standard errors", highlight=False)
    console.print(f"[bold]{found.recommended}[/]: {found.reason}", highlight=False)


# The same command with one more option; what it shows else stays the collector's.
episodes_app.registered_commands = [one for one in episodes_app.registered_commands if one.name != "show"]


@episodes_app.command("show")
@command
def show(
    episode_id: str,
    credit: Annotated[str | None, typer.Option("--credit", help="Share out the reward by this method.")] = None,
    limit: Limit = 20_000,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
    otlp: Annotated[bool, typer.Option("--otlp", help="OTLP/JSON, for any OpenTelemetry backend.")] = False,
) -> None:
    """One episode: its steps in order, what was said, what it earned, and what each step was worth."""
    if credit is None:
        episodes_show(episode_id, url, data_dir, as_json, otlp)
        return
    with connect(url, data_dir) as client:
        episode = client.episode(episode_id)
        worth = _credit(client, episode_id, credit, limit)
    for step in episode["steps"]:
        step["credit"] = worth.get(step["span_id"])
    if as_json:
        emit_json(episode)
    else:
        print_episode(episode)


def _credit(client: "Client", episode_id: str, method: str, limit: int) -> dict[str, Any]:
    """Span id -> advantage of an episode's steps, judged among the newest episodes."""
    from optimize.credit import assign

    episodes = _episodes(client, limit)
    if not any(one.episode_id == episode_id for one in episodes):
        raise BadInput(f"{episode_id} is not among the newest {limit} calls: ask for more by --limit", param="limit")
    given = assign(episodes, method, weights=settings.load().rewards.weights)
    return {one.span_id: one.advantage for one in given if one.episode_id == episode_id}


def _episodes(client: "Client", limit: int) -> "list[Episode]":
    from optimize.rl.gather import gather

    return gather(client, settings.load().rewards.weights, limit=limit).episodes


__all__ = ["episodes_app", "optimize_app"]
