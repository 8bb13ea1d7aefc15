"""The server that agents are to run through: unlike readers of the store, they cannot do without one."""

import json
import os
from pathlib import Path

from collector.client import Remote
from collector.errors import Unavailable
from collector.settings import DEFAULT_URL


def connect(url: str | None, data_dir: Path) -> Remote:
    """The server at `url` or RATCHET_URL, else the one that serves `data_dir`, else the default one, once it answered.

    Raises Unavailable that says how to start one.
    """
    url = url or os.environ.get("RATCHET_URL") or _announced(data_dir) or DEFAULT_URL
    client = Remote(url, os.environ.get("RATCHET_API_KEY"))
    try:
        client.identity()
    except Unavailable:
        client.close()
        message = f"no server answers at {client.url}: start one with `ratchet serve`, or name another with --url"
        raise Unavailable(message) from None
    return client


def _announced(data_dir: Path) -> str | None:
    try:
        return str(json.loads((data_dir / "server.json").read_text())["url"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
