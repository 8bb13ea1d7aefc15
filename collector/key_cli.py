"""`ratchet keys`: make, list and revoke the keys that callers need. A secret is shown once, by `create`."""

from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from collector.cli import AsJson, DataDir, Url, connect
from collector.console import command, console, emit_json
from collector.errors import BadInput
from collector.keys import SCOPES

keys_app = typer.Typer(help="Keys: who may call, and how much.", no_args_is_help=True)
_FIRST = """[bold yellow]This is the first key: from now on every call to this server needs one.[/]
  Agents send it as their OPENAI_API_KEY; the server's own OPENAI_API_KEY, or model_list, pays the model's provider.
  On 127.0.0.1 the commands of this machine stay open until a key with the scope `admin` exists."""


@keys_app.command("create")
@command
def keys_create(
    name: Annotated[str, typer.Argument(help="Whose it is, for example `support-bot`.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="agent, reward or admin; repeat it for several. Default: agent, reward.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Calls in any clock minute.")] = None,
    concurrent: Annotated[int | None, typer.Option(help="Calls at once.")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(help="Tokens in a day (UTC).")] = None,
    tokens_total: Annotated[int | None, typer.Option(help="Tokens in the key's life.")] = None,
    usd_per_day: Annotated[float | None, typer.Option(help="US dollars in a day (UTC).")] = None,
    usd_total: Annotated[float | None, typer.Option(help="US dollars in the key's life.")] = None,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. Its secret is shown now and never again."""
    scopes = [part.strip() for one in scope or ["agent,reward"] for part in one.split(",")]
    unknown = [one for one in scopes if one not in SCOPES]
    if unknown:
        raise BadInput(f"--scope: {unknown[0]!r} is none of {', '.join(SCOPES)}", param="scope")
    limits = {
        "requests_per_minute": requests_per_minute,
        "concurrent": concurrent,
        "tokens_per_day": tokens_per_day,
        "tokens_total": tokens_total,
        "usd_per_day": usd_per_day,
        "usd_total": usd_total,
    }
    given = {limit: value for limit, value in limits.items() if value is not None}
    with connect(url, data_dir) as client:
        made = client.create_key(name, scopes=scopes, limits=given)
    if as_json:
        emit_json(made)
        return
    console.print(f"{made['key_id']}  {', '.join(made['scopes'])}  {_limits(made['limits'])}", highlight=False)
    console.print(f"[bold]{made['key']}[/]", highlight=False, soft_wrap=True)
    console.print("Keep it: it is stored nowhere, and is not shown again.", highlight=False)
    if made["first"]:
        console.print(_FIRST, highlight=False, soft_wrap=True)


@keys_app.command("list")
@command
def keys_list(url: Url = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Every key that was made, without its secret. Keys of the configuration file are not listed."""
    with connect(url, data_dir) as client:
        found = client.keys()
    if as_json:
        emit_json(found)
        return
    table = Table("key", "name", "scopes", "limits", "created", "revoked", box=None, pad_edge=False)
    for key in found["keys"]:
        table.add_row(key["key_id"], escape(key["name"]), ", ".join(key["scopes"]), *_rest(key))
    console.print(table)
    if not found["keys"]:
        console.print("No key yet: on 127.0.0.1 everybody on this machine may call. Make one: ratchet keys create NAME")


@keys_app.command("revoke")
@command
def keys_revoke(
    key: Annotated[str, typer.Argument(help="Id or name.")],
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Revoke a key; a running server refuses it within a second. Keys stay required after the last one is revoked."""
    with connect(url, data_dir) as client:
        revoked = client.revoke_key(key)
    if as_json:
        emit_json(revoked)
    else:
        console.print(f"revoked {revoked['key_id']} ({escape(revoked['name'])})", highlight=False)


def _rest(key: dict[str, Any]) -> tuple[str, str, str]:
    return _limits(key["limits"]), _when(key["created_ns"]), _when(key["revoked_ns"])


def _limits(limits: dict[str, float]) -> str:
    return ", ".join(f"{value:g} {name.replace('_', ' ')}" for name, value in limits.items())


def _when(ns: int | None) -> str:
    return "" if ns is None else datetime.fromtimestamp(ns / 1e9, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
