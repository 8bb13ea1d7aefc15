"""Journals of earlier days."""

import os
import secrets
from pathlib import Path
from typing import Any

from collector import archive
from collector.journal import encode

DAY_NS = 86_400 * 1_000_000_000


def write_day(data_dir: Path, ago: int, *bodies: Any, role: str = "w0") -> Path:
    """A sealed segment of the day `ago` days before today: calls, or (event, body)."""
    folder = data_dir / "journal"
    folder.mkdir(parents=True, exist_ok=True)
    began = (archive.today() - ago) * DAY_NS + 3_600_000_000_000
    path = folder / f"{began:019d}-{role}-{os.getpid()}-{secrets.token_hex(4)}.ndjson"
    lines = [encode(*body) if isinstance(body, tuple) else encode("span", body) for body in bodies]
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(b"".join(lines))
    unfinished.rename(path)  # as a writer seals: a server that looks on sees all of it or nothing
    return path
