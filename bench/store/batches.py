"""CPU of the loader a row, in batches as live traffic makes them: short and long lines, hundreds or a thousand rows."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.result import Result
from bench.store.data import calls
from bench.store.ingest import folder, settings
from collector.journal import FOLDER, Journal
from collector.loader import Loader
from collector.model import Exchange
from collector.store import Store

_ROWS = (300, 1_000)
_SHORT = 250  # characters of text


def measure(result: Result, batches: int) -> None:
    """Fill in CPU us a row, tables of episodes included, the checkpoint apart."""
    for rows in _ROWS:
        long = list(calls(rows * batches))
        short = [_cut(one) for one in long]
        for name, spans in (("1kb", short), ("6kb", long)):
            with folder() as data_dir:
                size = _write(data_dir, spans, rows)
                load, checkpoint = _load(data_dir, len(spans))
            result.notes[f"load_{name}_line_bytes"] = size // len(spans)
            result.measures[f"load_{name}_us_per_row_{rows}"] = load
            result.measures[f"checkpoint_{name}_us_per_row_{rows}"] = checkpoint


def _cut(span: Exchange) -> Exchange:
    said = (span.input_messages or "")[-_SHORT:].replace('"', "").replace("\\", "")
    return replace(span, input_messages=f'[{{"role":"user","content":"{said}"}}]', output_messages=None, tools=None)


def _write(data_dir: Path, spans: Sequence[Exchange], rows: int) -> int:
    """Segments of `rows` lines each; returns bytes."""
    journal = Journal(data_dir / FOLDER, "w0", seal_seconds=3600.0, seal_bytes=1 << 40)
    for number, span in enumerate(spans, 1):
        journal.append("span", span)
        if number % rows == 0:
            journal.seal()
    journal.close()
    return journal.bytes


def _load(data_dir: Path, count: int) -> tuple[float, float]:
    """CPU us a row of loading a segment a batch, and of the checkpoint."""
    chosen = settings(data_dir)
    store = Store(data_dir / "ratchet.duckdb", data_dir / FOLDER, chosen.store, {"reward": 1.0})
    loader = Loader(store, data_dir / FOLDER)
    began = time.process_time()
    for name in loader._pending():
        loader._load([name])
    store.fold()
    loaded = time.process_time()
    store.checkpoint()
    ended = time.process_time()
    store.close()
    return (loaded - began) / count * 1e6, (ended - loaded) / count * 1e6
