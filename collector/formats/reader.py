"""Any file that can be imported, record by record: what it holds is seen by its first records, unless said."""

import gzip
import io
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import orjson

from collector.errors import BadInput
from collector.formats import jsonl, langfuse, langsmith, openai, otlp, parquet, phoenix
from collector.formats.bundle import Bundle

# In the order in which they are tried: the surest mark first.
FORMATS: Mapping[str, ModuleType] = {
    "jsonl": jsonl,
    "otlp": otlp,
    "parquet": parquet,
    "phoenix": phoenix,
    "langsmith": langsmith,
    "langfuse": langfuse,
    "openai": openai,
}
_ENVELOPES = ("data", "runs", "observations", "spans", "items", "results")
_SHOWN = 20
_LARGEST_LINE = 256 << 20
_BATCH = 1_000
Record = tuple[str, Any]


@dataclass
class Outcome:
    """What became of a file's records: how many were read as what, and which could not be, by place and reason."""

    records: Counter[str] = field(default_factory=Counter)
    bad: int = 0
    faults: list[str] = field(default_factory=list)

    def blame(self, where: str, why: str) -> None:
        """Count a record that could not be read; the first ones are named."""
        self.bad += 1
        if len(self.faults) < _SHOWN:
            self.faults.append(f"{where}: {why}")


def read(path: Path, outcome: Outcome, kind: str | None = None) -> Iterator[Bundle]:
    """The rows of a file, or of the files in a folder, some thousand at a time; `outcome` is kept up meanwhile.

    Raises BadInput where nothing there can be read at all.
    """
    if kind is not None and kind not in FORMATS:
        raise BadInput(f"--format: must be one of {', '.join(FORMATS)}", param="format")
    seen: dict[str, int] = {}
    now_ns = time.time_ns()
    bundle = Bundle()
    for where, record in _records(path, outcome):
        try:
            found, name = _one(record, kind, seen, now_ns)
        except (BadInput, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            # A record of somebody else's: whatever shape it has, the others are still to be read.
            outcome.blame(where, error.message if isinstance(error, BadInput) else f"unexpected shape ({error})")
            continue
        outcome.records[name] += 1
        bundle.add(found)
        if len(bundle.spans) + len(bundle.rewards) >= _BATCH:
            yield bundle
            bundle = Bundle()
    if bundle:
        yield bundle


def _one(record: Any, kind: str | None, seen: dict[str, int], now_ns: int) -> tuple[Bundle, str]:
    if not isinstance(record, Mapping):
        raise BadInput("is no JSON object")
    name = kind or next((name for name, one in FORMATS.items() if one.looks(record)), None)
    if name is None:
        raise BadInput(f"is none of {', '.join(FORMATS)}; say which with --format")
    if name == "openai":
        return openai.read(record, seen, now_ns), name
    return FORMATS[name].read(record), name


def _records(path: Path, outcome: Outcome) -> Iterator[Record]:
    if not path.exists():
        raise BadInput(f"there is no {path}", param="file")
    files = (
        sorted(one for one in path.rglob("*") if one.is_file() and not one.name.startswith("."))
        if path.is_dir()
        else [path]
    )
    for file in files:
        place = f"{file.name} " if path.is_dir() else ""
        reader = _rows_of_table if _starts_with(file, b"PAR1") else _values
        for number, record in reader(file, outcome, place):
            yield f"{place}{number}", record


def _starts_with(file: Path, mark: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(mark)) == mark


def _rows_of_table(file: Path, outcome: Outcome, place: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pa.ArrowException, OSError) as error:
        outcome.blame(f"{place}row {number + 1}", f"cannot be read: {error}")


def _values(file: Path, outcome: Outcome, place: str) -> Iterator[Record]:
    """Lines of JSON; or one JSON value over the whole file: an array, an envelope around one, or one record."""
    opener: Callable[..., IO[bytes]] = gzip.open if _starts_with(file, b"\x1f\x8b") else open  # type: ignore[assignment]
    with opener(file, "rb") as opened:
        head = opened.readline(_LARGEST_LINE)
        whole = _parsed(head) if head.strip() else None
        if head.strip() and whole is None:
            rest = _parsed(head + opened.read(_LARGEST_LINE))
            if rest is not None:
                yield from _items(rest)
                return
    with opener(file, "rb") as opened:
        yield from _lines(opened, outcome, place)


def _lines(opened: IO[bytes] | io.BufferedIOBase, outcome: Outcome, place: str) -> Iterator[Record]:
    number = 0
    try:
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            value = _parsed(line)
            if value is None:
                outcome.blame(f"{place}line {number}", "is not JSON")
            elif isinstance(value, list) or (isinstance(value, Mapping) and _inside(value) is not None):
                for where, one in _items(value):
                    yield f"line {number}, {where}", one
            else:
                yield f"line {number}", value
    except (OSError, EOFError) as error:  # a torn gzip: what came before it counts
        outcome.blame(f"{place}line {number + 1}", f"cannot be read: {error}")


def _parsed(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return None


def _items(value: Any) -> Iterator[Record]:
    inside = value if isinstance(value, list) else _inside(value) if isinstance(value, Mapping) else None
    if inside is None:
        yield "the file", value
        return
    for index, one in enumerate(inside, 1):
        yield f"record {index}", one


def _inside(value: Mapping[str, Any]) -> list[Any] | None:
    """The records of an envelope; a record of a known format is none."""
    if any(one.looks(value) for one in FORMATS.values()):
        return None
    return next((value[name] for name in _ENVELOPES if isinstance(value.get(name), list)), None)
