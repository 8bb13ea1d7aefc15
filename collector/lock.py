"""One owner per data directory: the collector, or what stands in for it; and which of the two it is for."""

import fcntl
import os
from pathlib import Path

from collector.errors import Conflict

LOCK_FILE = "collector.lock"
HOST_FILE = "host"  # the id under which a directory without a store sends its journal


class DirectoryLock:
    """One collector per data directory; held until `release` or the end of the process."""

    def __init__(self, data_dir: Path) -> None:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = os.open(data_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise Conflict(
                f"a server is using {data_dir}; stop it, or ask it with --url", code="store_in_use"
            ) from None

    def release(self) -> None:
        """Let the next one in."""
        os.close(self._fd)


def has_store(data_dir: Path) -> bool:
    """Whether there is a store of its own."""
    return next(data_dir.glob("*.duckdb"), None) is not None


def refuse_a_store(data_dir: Path) -> None:
    """Raises Conflict where a command would make a store in the directory of a host whose collector is elsewhere."""
    if (data_dir / HOST_FILE).exists() and not has_store(data_dir):
        raise Conflict(
            f"{data_dir} has no store: it is of a host whose collector is elsewhere (store.collector); ask that one "
            "with --url or RATCHET_URL",
            code="store_elsewhere",
        )
