"""What recording adds to a call, with and without a heavy query running, and how soon a span can be read."""

import json
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Event
from pathlib import Path

from bench.result import Result
from bench.store.data import calls
from bench.store.ingest import folder, settings
from collector import redact
from collector.errors import RatchetError
from collector.journal import Journal
from collector.model import Exchange
from collector.service import Collector

_HEAVY = """
SELECT count(DISTINCT a.input_messages), sum(length(b.output_messages))
FROM spans_v AS a JOIN spans_v AS b ON a.prompt_slot = b.prompt_slot AND a.span_id < b.span_id
"""


def measure(result: Result, seconds: float, rate: int, looks: int) -> None:
    """Fill in the figures: `rate` calls a second for `seconds`, idle and under a heavy query; `looks` at visibility."""
    spans = list(calls(min(4000, int(seconds * rate))))
    with folder() as data_dir:
        context = multiprocessing.get_context("spawn")
        stop, busy, heavy = context.Event(), context.Event(), context.Event()
        other = context.Process(target=_collector, args=(data_dir, stop, busy, heavy))
        other.start()
        try:
            busy.wait(60)
            _write(data_dir, spans, rate, 1.0)  # warm
            idle = _write(data_dir, spans, rate, seconds)
            heavy.set()
            time.sleep(1)
            loaded = _write(data_dir, spans, rate, seconds)
        finally:
            stop.set()
            other.join(60)
    for name, taken in (("idle", idle), ("heavy_query", loaded)):
        result.measures[f"record_p50_ms_{name}"] = taken[len(taken) // 2] * 1e3
        result.measures[f"record_p99_ms_{name}"] = taken[int(len(taken) * 0.99)] * 1e3
    with folder() as data_dir:
        delays = sorted(_visible(data_dir, spans[:looks]))
    result.measures["visible_p50_s"] = delays[len(delays) // 2]
    result.measures["visible_max_s"] = delays[-1]


def _write(data_dir: Path, spans: Sequence[Exchange], rate: int, seconds: float) -> list[float]:
    """Seconds that each call's record took in the proxy's process, sorted: masking, encoding, one write."""
    journal = Journal(data_dir / "journal", "w0")
    taken = []
    begun = time.perf_counter()
    for number in range(int(seconds * rate)):
        due = begun + number / rate
        while (left := due - time.perf_counter()) > 0:
            time.sleep(left)
        span = spans[number % len(spans)]
        start = time.perf_counter()
        journal.append("span", redact.exchange(span))
        taken.append(time.perf_counter() - start)
    journal.close()
    return sorted(taken)


def _collector(data_dir: Path, stop: Event, busy: Event, heavy: Event) -> None:
    """A process with a collector that loads; from `heavy` on it is asked one heavy query after the other."""
    collector = Collector(settings(data_dir))
    busy.set()
    while not stop.wait(0.05):
        if heavy.is_set():
            try:
                collector.query(_HEAVY)
            except RatchetError:  # stopped after its time: as heavy as one that ended
                continue
    collector.close()


def _visible(data_dir: Path, spans: Sequence[Exchange]) -> list[float]:
    """Seconds from the write to the first query that finds the span, at irregular moments."""
    collector = Collector(settings(data_dir))
    journal = Journal(data_dir / "journal", "w0")
    delays = []
    for number, span in enumerate(spans):
        time.sleep(0.1 + 0.37 * number % 1.0)
        written = time.perf_counter()
        journal.append("span", span)
        wanted = f"SELECT count(*) FROM spans WHERE span_id = {json.dumps(span.span_id).replace(chr(34), chr(39))}"
        while collector.query(wanted).json()["rows"] == [[0]]:
            time.sleep(0.01)
        delays.append(time.perf_counter() - written)
    journal.close()
    collector.close()
    return delays
