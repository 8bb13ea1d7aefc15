"""`ratchet serve`: the flags, the block that says how to use it, and what went wrong where it can't start."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from collector.console import command
from collector.lifeline import follow

if TYPE_CHECKING:
    from collector.settings import Settings


@command
def serve(
    config: Annotated[Path | None, typer.Option(help="YAML configuration; default: RATCHET_CONFIG, else none.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (4000); 0 picks a free one.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that serve calls (1).")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Journal, store and reports (./data).")] = None,
    upstream: Annotated[
        str | None, typer.Option(help="Where calls go that no model_list entry names (https://api.openai.com/v1).")
    ] = None,
    parent_fd: Annotated[int | None, typer.Option(hidden=True, help="End when this pipe is closed.")] = None,
) -> None:
    """Serve the proxy and its collector. Point an agent's OPENAI_BASE_URL here; nothing else changes."""
    from collector.settings import load
    from proxy.supervisor import supervise

    flags = {
        "server.host": host,
        "server.port": port,
        "server.workers": workers,
        "store.data_dir": str(data_dir) if data_dir else None,
        "upstream.default": upstream,
    }
    settings = load(config, flags)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if parent_fd is not None:
        follow(parent_fd)
    raise typer.Exit(supervise(settings, lambda url: announce(settings, url)))


def announce(settings: "Settings", url: str) -> None:
    """Print the one block that a user needs: where to point the agent, and what this server is set to."""
    from collector.console import console
    from collector.settings import without_credentials

    keys = len(settings.server.keys)
    made = keys_were_made(settings.store.data_dir)
    rows = {
        "OPENAI_BASE_URL": f"{url}/v1",
        "upstream": without_credentials(settings.upstream.default),
        "data": str(settings.store.data_dir.resolve()),
        **({"collector": without_credentials(settings.store.collector)} if settings.store.collector else {}),
        "keys": f"on ({keys} configured)" if keys else "on" if made else "off (this machine only)",
        "workers": str(settings.server.workers),
    }
    console.print("[bold]Ratchet serves.[/bold] Point your agent at it; Ctrl-C ends it.")
    for name, value in rows.items():
        console.print(f"  {name:<16} {value}", markup=False, highlight=False, soft_wrap=True)


def keys_were_made(data_dir: Path) -> bool:
    """Whether `ratchet keys create` was used here: then calls need a key."""
    import orjson

    try:
        return bool(orjson.loads((data_dir / "deployments.json").read_bytes())["keyed"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
