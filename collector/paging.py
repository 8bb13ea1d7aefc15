"""Results that are read a page at a time: an open query keeps its snapshot, and no answer is larger than its bound."""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from collector.errors import NotFound
from collector.results import Table

if TYPE_CHECKING:
    import pyarrow as pa

MAX_PAGE_BYTES = 32 << 20
_BATCH_ROWS = 2048
_OPEN = 8
_IDLE_SECONDS = 60.0


@dataclass
class Open:
    """A query under way. `release` ends its transaction; `guard` bounds the time of what is done within."""

    reader: "pa.RecordBatchReader"
    rows: int  # how many are wanted still
    release: Callable[[], object]
    guard: Callable[[], contextlib.AbstractContextManager[object]]
    rest: list["pa.RecordBatch"] = field(default_factory=list)
    ended: bool = False
    used: float = 0.0

    def page(self, rows: int, size: int = MAX_PAGE_BYTES) -> Table:
        """The next rows, at most `rows` of them and about `size` bytes, at least one where there is one."""
        import pyarrow as pa

        wanted = min(rows, self.rows)
        taken: list[pa.RecordBatch] = []
        count = total = 0
        with self.guard():
            for batch in self._batches():
                fitting = min(batch.num_rows, wanted - count, _fitting(batch, size - total, bool(taken)))
                if fitting:
                    taken.append(batch.slice(0, fitting))
                    count += fitting
                    total += taken[-1].nbytes
                if fitting < batch.num_rows:
                    self.rest.insert(0, batch.slice(fitting))
                    break
        self.rows -= count
        self.ended = not self.rest
        return Table(pa.Table.from_batches(taken, self.reader.schema), truncated=not self.ended)

    def _batches(self) -> Iterator["pa.RecordBatch"]:
        while self.rest:
            yield self.rest.pop(0)
        for batch in self.reader:
            if batch.num_rows:
                yield batch


def _fitting(batch: "pa.RecordBatch", room: int, some: bool) -> int:
    """How many rows of a batch fit into `room` bytes; one at least where there is nothing else on the page."""
    if batch.nbytes <= room:
        return int(batch.num_rows)
    low, high = 0, batch.num_rows
    while low < high:
        middle = (low + high + 1) // 2
        if batch.slice(0, middle).nbytes <= room:
            low = middle
        else:
            high = middle - 1
    return low if low or some else 1


def begin(relation: Any, limit: int, release: Callable[[], object], guard: Callable[[], Any]) -> Open:
    """Start a query of at most `limit` rows; one more is asked for, to know whether there are more."""
    with guard():
        reader = relation.limit(limit + 1).to_arrow_reader(_BATCH_ROWS)
    return Open(reader, limit, release, guard)


class Cursors:
    """Open queries by token: a few at a time, each for a minute after its last page."""

    def __init__(self) -> None:
        self._open: dict[str, Open] = {}
        self._lock = threading.Lock()

    def keep(self, one: Open) -> str | None:
        """The token under which the rest can be had; None when nothing is left to be had."""
        if one.ended or one.rows <= 0:
            one.release()
            return None
        one.used = time.monotonic()
        token = secrets.token_urlsafe(12)
        with self._lock:
            self._open[token] = one
            surplus = sorted(self._open, key=lambda key: self._open[key].used)[:-_OPEN]
            closed = [self._open.pop(key) for key in surplus]
        for old in closed:
            old.release()
        return token

    def take(self, token: str) -> Open:
        """The query of a token, which is used up. Raises NotFound."""
        self.sweep()
        with self._lock:
            found = self._open.pop(token, None)
        if found is None:
            raise NotFound("this cursor is unknown or was idle for too long; ask again", param="cursor")
        return found

    def sweep(self, idle: float = _IDLE_SECONDS) -> None:
        """Close what nobody has read from for a while."""
        now = time.monotonic()
        with self._lock:
            old = [token for token, one in self._open.items() if now - one.used >= idle]
            closed = [self._open.pop(token) for token in old]
        for one in closed:
            one.release()
