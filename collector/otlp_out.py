"""Spans and rewards on to an OpenTelemetry backend: from the journal, on a thread of the collector, at least once.

A segment is sent once it is loaded, and its name is noted on disk once the backend has taken all of it. So an outage,
a crash or a restart costs a repetition at most, and a call never waits for a backend.
"""

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collector import journal
from collector.errors import RatchetError
from collector.loader import kind, sift
from collector.settings import OtlpOut

if TYPE_CHECKING:
    from collector.otlp_sender import Sender
    from collector.store import Store

FOLDER = "export"
_TICK_SECONDS = 0.5
_LONGEST_WAIT = 15.0
_BATCH_ROWS = 256
_BATCH_BYTES = 4 << 20

log = logging.getLogger(__name__)


class Unsent(RatchetError):
    """The backend could not take it now: to be sent again."""

    status = 503
    code = "unsent"


class Refused(RatchetError):
    """The backend will never take this."""

    code = "refused"


def begin(settings: OtlpOut, data_dir: Path, store: "Store", is_loaded: Callable[[str], bool]) -> "Exporter | None":
    """The exporter of a configuration, not yet started; None where nothing is to be sent."""
    if settings.endpoint is None:
        return None
    from collector.otlp_sender import Sender  # OpenTelemetry's SDK: only who sends waits for it

    return Exporter(Sender(settings), data_dir, settings.endpoint, store, is_loaded)


@dataclass
class Counters:
    """What was sent since the start; `refused` items the backend will never take, `missed` segments that were removed
    before they could be sent, `failures` requests that will be repeated. `pending` segments wait now."""

    spans: int = 0
    rewards: int = 0
    refused: int = 0
    missed: int = 0
    failures: int = 0
    pending: int = 0
    last_error: str | None = None


class Exporter:
    """The thread. `store` says where rows belong, `is_loaded` whether a segment is in it."""

    def __init__(
        self, sender: "Sender", data_dir: Path, endpoint: str, store: "Store", is_loaded: Callable[[str], bool]
    ) -> None:
        self.counters = Counters()
        self._sender = sender
        self._journal = data_dir / journal.FOLDER
        self._store = store
        self._is_loaded = is_loaded
        self._done = Done(data_dir / FOLDER / f"otlp-{hashlib.sha256(endpoint.encode()).hexdigest()[:12]}.done")
        self._seen: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp-out", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def close(self) -> None:
        """Stop; what is unsent is sent after the next start."""
        self._stop.set()
        self._sender.close()
        if self._thread.is_alive():
            self._thread.join(_LONGEST_WAIT)
        self._done.close()

    def stats(self) -> dict[str, Any]:
        """The counters."""
        return asdict(self.counters)

    def _run(self) -> None:
        wait = _TICK_SECONDS
        while not self._stop.wait(wait):
            try:
                self.send_once()
                wait = _TICK_SECONDS
            except Unsent as error:
                wait = min(_LONGEST_WAIT, wait * 2)
                self._failed(error)
            except Exception as error:  # the boundary of this thread: it must outlive whatever a disk or a backend does
                wait = min(_LONGEST_WAIT, wait * 2)
                self._failed(error)
                log.exception("the export failed; it goes on")

    def _failed(self, error: Exception) -> None:
        if self.counters.last_error != str(error):
            log.warning("OTLP export: %s; trying again", error)
        self.counters.failures += 1
        self.counters.last_error = str(error)

    def send_once(self) -> int:
        """Send every loaded segment that was not sent yet, oldest first; returns how many. Raises Unsent."""
        names = {path.stem for path in self._journal.glob("*" + journal.SEALED)}
        self.counters.missed += len(self._seen - names)
        pending = sorted(name for name in names if name not in self._done and self._is_loaded(name))
        self._seen = set(pending)
        for count, name in enumerate(pending):
            self.counters.pending = len(pending) - count
            if self._stop.is_set():
                return count
            self._send_segment(name)
            self._done.add(name)
            self._seen.discard(name)
        self.counters.pending = 0
        self.counters.last_error = None
        return len(pending)

    def _send_segment(self, name: str) -> None:
        try:
            data = (self._journal / (name + journal.SEALED)).read_bytes()
        except FileNotFoundError:
            self.counters.missed += 1
            return
        good, _ = sift(data)
        for spans, rewards in _batches(good):
            spans = self._settled(spans)
            self._send(self._sender.spans, spans, "spans")
            if rewards:
                self._send(self._sender.rewards, self._aimed(rewards), "rewards")

    def _send(self, send: Callable[[Sequence[dict[str, Any]]], None], rows: list[dict[str, Any]], what: str) -> None:
        """Send; of a batch that the backend refuses, the halves, so that only what it can't take is left out."""
        if not rows:
            return
        try:
            send(rows)
        except Refused as error:
            if len(rows) == 1:
                self.counters.refused += 1
                log.error("OTLP export: the backend refuses one of the %s: %s", what, error)
                return
            middle = len(rows) // 2
            self._send(send, rows[:middle], what)
            self._send(send, rows[middle:], what)
            return
        setattr(self.counters, what, getattr(self.counters, what) + len(rows))

    def _settled(self, spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Agents' own spans under the episode that the store found for them; those that repeat a call are left out."""
        own = [row["span_id"] for row in spans if row["event"] == "otlp"]
        if not own:
            return spans
        placed = self._store.placed(own)
        kept = []
        for row in spans:
            if row["event"] != "otlp":
                kept.append(row)
            elif row["span_id"] in placed:
                kept.append({**row, "episode_id": placed[row["span_id"]]})
        return kept

    def _aimed(self, rewards: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rewards with the span and the trace that they belong to, where these are known yet: of an episode or a
        trace, its first span."""
        ids = [row["target_id"] for row in rewards]
        found = self._store.targets(ids)
        by_target: dict[tuple[str, str], dict[str, Any]] = {}
        for row in found:
            for target in ("span", "trace", "episode", "response"):
                by_target.setdefault((target, row[f"{target}_id"]), row)
        return [{**row, "span": by_target.get((row["target_kind"], row["target_id"]))} for row in rewards]


def _batches(lines: Sequence[bytes]) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """`(spans, rewards)` of some lines at a time."""
    spans: list[dict[str, Any]] = []
    rewards: list[dict[str, Any]] = []
    size = 0
    for line in lines:
        event = kind(line)
        if event in ("span", "otlp"):
            spans.append(journal.decode(line))
        elif event == "reward":
            rewards.append(journal.decode(line))
        size += len(line)
        if len(spans) + len(rewards) >= _BATCH_ROWS or size >= _BATCH_BYTES:
            yield spans, rewards
            spans, rewards, size = [], [], 0
    yield spans, rewards


class Done:
    """Names of what was sent, in a file that is appended to and synced."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""  # a torn last line is sent again
        self._names = set(whole.split())
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{name}\n" for name in sorted(self._names)))
        temporary.replace(path)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        """Note a name; it is on disk when this returns."""
        os.write(self._fd, f"{name}\n".encode())
        os.fdatasync(self._fd)
        self._names.add(name)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
