"""What waits in a journal to be sent to a collector elsewhere.

Read from the directory alone, so that whoever may read it knows, whether or not anybody sends.
"""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from collector import journal

REFUSED = "refused"  # the folder of what the collector will never take


@dataclass(frozen=True)
class Backlog:
    """Sealed segments, their bytes, the age of the oldest one; and the segments that were set aside for good."""

    segments: int = 0
    bytes: int = 0
    lag_s: float = 0.0
    refused: int = 0


def measure(folder: Path) -> Backlog:
    """Of the journal in `folder`; nothing where there is no such folder."""
    sizes: list[int] = []
    oldest = now = time.time()
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(journal.SEALED):
                with contextlib.suppress(FileNotFoundError):  # sent just now
                    status = entry.stat()
                    sizes.append(status.st_size)
                    oldest = min(oldest, status.st_mtime)
    refused = folder / REFUSED
    aside = len(os.listdir(refused)) if refused.is_dir() else 0
    return Backlog(len(sizes), sum(sizes), round(max(0.0, now - oldest), 3), aside)
