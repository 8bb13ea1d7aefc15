"""The decode loop: rows join and leave between steps; a step computes every row's next token or piece of its prompt.

One thread owns the model. Others call `submit` and `cancel`; what a row produces goes to its `emit`, called in that
thread.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from collector.errors import NotFound, RatchetError, Unavailable
from optimize.rl.adapters import Pairs
from optimize.rl.attention import Segment
from optimize.rl.memory import Memory, Prefixes, shared
from optimize.rl.model import LanguageModel
from optimize.rl.sample import Picked, Picker, Sampling
from optimize.rl.text import Detokenizer, Stops

log = logging.getLogger(__name__)

# Prompt positions per step over all rows: bounds how long a long prompt makes running rows wait (0.5 s on 2 cores).
CHUNK = 256
# Positions that make it worth to wait for another row's prompt, or to remember one.
WORTH = 16
ROOM = 32


@dataclass(frozen=True)
class Delta:
    """One step of a row: the token, the text that it completes, and at the end why the row ended."""

    picked: Picked
    text: str
    finish: str | None = None
    cached: int = 0


@dataclass(eq=False)
class Row:
    """One answer in the making: prompt ids and what was asked; then what the loop knows about it."""

    prompt: Sequence[int]
    sampling: Sampling
    emit: Callable[[Delta | RatchetError], None]
    index: int = 0
    adapter: str | None = None
    lead: bool = False
    cancelled: bool = False
    ids: list[int] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    memory: Memory | None = None
    detokenizer: Detokenizer | None = None
    picker: Picker = field(init=False)
    stops: Stops = field(init=False)

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)
        self.picker = Picker(self.sampling, self.index)
        self.stops = Stops(self.sampling.stop, lead=self.lead)

    @property
    def prefilling(self) -> bool:
        """Whether prompt positions are still to be computed."""
        return self.computed < len(self.prompt)


@dataclass(frozen=True, eq=False)
class _Chore:
    """Work on the model between two steps, once no row uses the adapter `unused`."""

    work: Callable[[], None]
    done: Future[None]
    unused: str | None


class Batcher:
    """Runs rows on a model, up to `max_batch` at once; at most `max_waiting` more wait.

    `chunk`: prompt positions a step; more of them cost less each, and keep rows that are answering waiting.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_batch: int = 16,
        max_waiting: int = 1024,
        prefix_bytes: int = 256 << 20,
        chunk: int = CHUNK,
    ) -> None:
        self._model = model
        self._max_batch, self._max_waiting, self._chunk = max_batch, max_waiting, chunk
        self._prefixes = Prefixes(prefix_bytes)
        self._waiting: deque[Row] = deque()
        self._active: list[Row] = []
        self._chores: list[_Chore] = []
        self._leaving: set[str | None] = set()  # adapters that take no new rows, also after they are gone
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the running step; unfinished rows fail."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()
        for row in [*self._active, *self._waiting]:
            row.emit(Unavailable("the engine is shutting down"))
        for chore in self._chores:
            chore.done.set_exception(Unavailable("the engine is shutting down"))

    @property
    def load(self) -> tuple[int, int]:
        """(rows running, rows waiting)."""
        return len(self._active), len(self._waiting)

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue rows, all or none. Raises Unavailable when too many wait, NotFound when their adapter is leaving."""
        with self._wake:
            if gone := {row.adapter for row in rows} & self._leaving:
                raise NotFound(f"the model `{gone.pop()}` was unloaded", param="model", code="model_not_found")
            if self._closed or len(self._waiting) + len(rows) > self._max_waiting:
                raise Unavailable(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting.extend(rows)
            self._wake.notify()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Drop rows that nobody waits for any more; they emit nothing more."""
        with self._wake:
            for row in rows:
                row.cancelled = True

    def attach(self, name: str, pairs: Pairs) -> Future[None]:
        """Serve an adapter from the next step on."""
        return self._between(lambda: self._join(name, pairs))

    def detach(self, name: str) -> Future[None]:
        """Forget an adapter once the last row that uses it has ended; new rows must not name it any more."""
        with self._wake:
            self._leaving.add(name)
        return self._between(lambda: self._forget(name), unused=name)

    def _between(self, work: Callable[[], None], unused: str | None = None) -> Future[None]:
        done: Future[None] = Future()
        with self._wake:
            if self._closed:
                done.set_exception(Unavailable("the engine is shutting down"))
            else:
                self._chores.append(_Chore(work, done, unused))
                self._wake.notify()
        return done

    def _join(self, name: str, pairs: Pairs) -> None:
        self._model.adapters.attach(name, pairs)
        self._leaving.discard(name)

    def _forget(self, name: str) -> None:
        self._prefixes.forget(name)
        self._model.adapters.detach(name)

    def _tidy(self) -> None:
        """Between two steps: do the chores that are due."""
        due = [chore for chore in self._chores if not self._used(chore.unused)]
        for chore in due:
            self._chores.remove(chore)
            try:
                chore.work()
            except RatchetError as error:
                chore.done.set_exception(error)
            else:
                chore.done.set_result(None)

    def _used(self, adapter: str | None) -> bool:
        return adapter is not None and any(row.adapter == adapter for row in (*self._active, *self._waiting))

    def _run(self) -> None:
        while self._admit():
            segments = self._plan()
            try:
                logits = self._model.forward([segment for _, segment in segments])
                self._advance(segments, logits)
            # The boundary of the compute thread: whatever a step raises fails its rows, never the engine.
            except Exception:
                log.exception("a step failed")
                self._fail([row for row, _ in segments])

    def _admit(self) -> bool:
        """Wait for work, drop cancelled rows, fill free places; False when closed."""
        with self._wake:
            while True:
                self._active = [row for row in self._active if not row.cancelled]
                while self._waiting and len(self._active) < self._max_batch:
                    row = self._waiting.popleft()
                    if not row.cancelled:
                        row.detokenizer = Detokenizer(self._decode, row.prompt)
                        self._active.append(row)
                self._tidy()
                if self._closed:
                    return False
                if self._active:
                    return True
                self._wake.wait()

    def _plan(self) -> list[tuple[Row, Segment]]:
        """Every running row's next token, and prompt pieces in the order of arrival while the step has room."""
        planned: list[tuple[Row, Segment]] = []
        leaders: list[Row] = []
        room = self._chunk
        for row in self._active:
            if not row.prefilling:
                planned.append((row, _segment(row, len(row.ids))))
            elif room > 0 and not self._follows(row, leaders):
                if row.memory is None:
                    row.memory, row.computed = self._prefixes.start(row.adapter, row.prompt, len(row.prompt) + ROOM)
                    row.cached = row.computed
                end = min(len(row.prompt), row.computed + room)
                room -= end - row.computed
                planned.append((row, _segment(row, end)))
                leaders.append(row)
        return planned

    def _follows(self, row: Row, leaders: list[Row]) -> bool:
        """Whether a row in this step is computing a beginning that this new one can take over when it is done."""
        if row.memory is not None or self._prefixes.max_bytes == 0:
            return False
        ahead = [shared(leader.prompt, row.prompt[:-1]) for leader in leaders if leader.adapter == row.adapter]
        return max(ahead, default=0) - self._prefixes.longest(row.adapter, row.prompt)[1] >= WORTH

    def _advance(self, segments: list[tuple[Row, Segment]], logits: torch.Tensor) -> None:
        wanted = iter(logits)
        for row, segment in segments:
            prefilled = row.prefilling
            row.computed = segment.start + len(segment.ids)
            if not segment.wanted:
                continue
            if prefilled and row.memory is not None and len(row.prompt) - row.cached >= WORTH:
                self._prefixes.keep(row.adapter, row.prompt, row.memory)
            self._deliver(row, row.picker.pick(next(wanted)))

    def _deliver(self, row: Row, picked: Picked) -> None:
        row.ids.append(picked.token)
        text, finish = self._text(row, picked.token)
        if finish is not None:
            self._active.remove(row)
        if not row.cancelled:
            row.emit(Delta(picked, text, finish, row.cached))

    def _text(self, row: Row, token: int) -> tuple[str, str | None]:
        """The text to pass on after a token, and why the row ends here, if it does."""
        if row.detokenizer is None:
            raise RuntimeError("a row was never admitted")
        if token in self._model.eos_ids:
            return _rest(row, row.detokenizer), "stop"
        text, stopped = row.stops.push(row.detokenizer.push(token))
        if stopped:
            return text, "stop"
        made = len(row.ids) - len(row.prompt)
        if made >= row.sampling.max_tokens or len(row.ids) >= self._model.context:
            return text + _rest(row, row.detokenizer), "length"
        return text, None

    def _decode(self, ids: list[int]) -> str:
        return str(self._model.tokenizer.decode(ids, skip_special_tokens=True))

    def _fail(self, rows: list[Row]) -> None:
        self._active = [row for row in self._active if row not in rows]
        for row in rows:
            row.emit(RatchetError("the engine failed at this request; its log says why", code="engine_error"))


def _rest(row: Row, detokenizer: Detokenizer) -> str:
    text, stopped = row.stops.push(detokenizer.flush())
    return text if stopped else text + row.stops.flush()


def _segment(row: Row, end: int) -> Segment:
    if row.memory is None:
        raise RuntimeError("a row is planned before its memory is there")
    ids = row.ids[row.computed : end]
    return Segment(row.memory, ids, row.computed, row.adapter, wanted=end == len(row.ids))
