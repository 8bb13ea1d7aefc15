"""Ingest of the same OTLP batches by Arize Phoenix, in an environment of its own: absent where that is not there."""

import tempfile
from pathlib import Path

from bench.result import Result


def measure(result: Result, count: int) -> None:
    """Fill in spans/s until all can be read by each one's API. `make test-phoenix` installs Phoenix."""
    from scripts import phoenix

    if not (phoenix.HOME / "bin" / "phoenix").exists():
        result.notes["phoenix"] = "absent: not installed (make test-phoenix)"
        return
    try:
        with tempfile.TemporaryDirectory(prefix="bench-phoenix") as folder:
            found = phoenix.compare(Path(folder), count)
    except (RuntimeError, AssertionError, OSError) as error:
        result.notes["phoenix"] = f"absent: {error}"
        return
    result.notes["phoenix"] = f"{count} spans in batches of 100, one sender"
    result.measures["phoenix_ingest_x"] = found["ratio"]
    result.measures["phoenix_spans_per_s"] = found["phoenix_spans_per_second"]
    result.measures["otlp_spans_per_s"] = found["ratchet_spans_per_second"]
