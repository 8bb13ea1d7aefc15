"""Small files that others read while they are written."""

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write so that a reader sees the old file or the new one, never a part. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
