"""Results of queries: Arrow inside, JSON-safe values or an Arrow IPC stream outside.

Arrow is imported by whoever asks first: a server is ready without it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    import pyarrow as pa

ARROW = "application/vnd.apache.arrow.stream"


@dataclass(frozen=True)
class Table:
    """At most the asked number of rows; `truncated` says that there were more, `next` is the cursor of those that were
    asked for and did not fit."""

    data: "pa.Table"
    truncated: bool
    next: str | None = None

    def json(self) -> dict[str, Any]:
        """{"columns": [...], "rows": [[...]], "truncated", "next"?}: no NaN, dates and decimals as text."""
        columns = [_column(column) for column in self.data.columns]
        rows = [list(row) for row in zip(*columns, strict=True)]
        body = {"columns": self.data.column_names, "rows": rows, "truncated": self.truncated}
        return body if self.next is None else {**body, "next": self.next}

    def arrow(self) -> bytes:
        """An Arrow IPC stream."""
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.data.schema) as writer:
            writer.write_table(self.data)
        return bytes(sink.getvalue())


def parsed(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The row with the JSON text of the named columns parsed."""
    found = dict(row)
    for name in names:
        if isinstance(found.get(name), str):
            found[name] = orjson.loads(found[name])
    return found


def _column(column: "pa.ChunkedArray") -> list[Any]:
    import pyarrow as pa

    convert = _converter(column.type)
    if convert is None:
        return list(column.to_pylist())
    if convert is str:  # by Arrow itself: Python knows no nanoseconds and not every time zone
        return list(column.cast(pa.string()).to_pylist())
    return [convert(value) for value in column.to_pylist()]


def _converter(kind: "pa.DataType") -> Callable[[Any], Any] | None:
    import pyarrow as pa

    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_string(kind):
        return None
    if pa.types.is_temporal(kind) and not pa.types.is_interval(kind):
        return str
    return safe


def safe(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinities are null, bytes hex, whatever else JSON lacks is text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (bytes, bytearray)):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(key): safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [safe(item) for item in value]
    return str(value)
