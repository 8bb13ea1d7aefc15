"""Operations: is it alive, is it ready, what did it count, what is it."""

import asyncio
import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from collector import backlog
from collector.errors import RatchetError
from collector.journal import FOLDER
from collector.settings import without_credentials
from proxy.files import write_atomically
from proxy.metrics import REGISTRY
from proxy.routes.base import Context, Endpoint, Handler, json_response

_STATS_SECONDS = 2.0
MAX_LAG = 30.0  # seconds that the store may be behind the journal before the server counts as not ready
TEXT = "text/plain; version=0.0.4; charset=utf-8"
SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{?)", re.MULTILINE)  # what is before a label, or before the value

LINES = Counter("ratchet_journal_lines", "Journal lines by what became of them", ("fate",), registry=REGISTRY)
BYTES = Counter("ratchet_journal_bytes", "Bytes written to the journal", registry=REGISTRY)
HEALTHY = Gauge("ratchet_journal_healthy", "1 while the disk takes what is written", registry=REGISTRY)
REVISION = Gauge("ratchet_deployments_revision", "The revision of the deployments in force", registry=REGISTRY)


class Count:
    """Carries a journal's own counters over into the metrics, by what was added since the last time."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._seen: dict[str, int] = {}

    def update(self) -> None:
        """Bring the metrics up to date."""
        journal = self._context.journal
        for fate in ("written", "synced", "dropped"):
            LINES.labels(fate).inc(self._added(fate, getattr(journal, fate)))
        BYTES.inc(self._added("bytes", journal.bytes))
        HEALTHY.set(int(journal.healthy))
        REVISION.set(self._context.versions.current.revision)

    def _added(self, name: str, now: int) -> int:
        added = now - self._seen.get(name, 0)
        self._seen[name] = now
        return added


class Restarts(Collector):
    """How often the supervisor restarted what, read from the file in which it keeps that."""

    def __init__(self, state: Path) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """One counter, by process."""
        family = CounterMetricFamily("ratchet_restarts", "Processes that died and were restarted", labels=["process"])
        with contextlib.suppress(OSError, ValueError, KeyError):
            for name, number in orjson.loads(self._state.read_bytes())["restarts"].items():
                family.add_metric([name], number)
        yield family


class Stored(Collector):
    """What the collector says of its loading; nothing while it does not answer."""

    def __init__(self, stats: Mapping[str, Any]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Lines by fate, rows, and how far behind the store is."""
        loader = self._stats["loader"]
        lines = CounterMetricFamily("ratchet_store_lines", "Journal lines by what the loader did", labels=["fate"])
        lines.add_metric(["loaded"], loader["lines"])
        lines.add_metric(["quarantined"], loader["quarantined"])
        yield lines
        yield GaugeMetricFamily("ratchet_store_spans", "Spans in the store", self._stats["spans"])
        yield GaugeMetricFamily("ratchet_store_lag_seconds", "Age of the oldest segment to be loaded", loader["lag_s"])
        yield GaugeMetricFamily(
            "ratchet_store_unreadable_segments", "Segments that cannot be read now", loader["unreadable"]
        )


class Sent(Collector):
    """What waits on this host for a collector elsewhere; and what was sent there, while the sender answers."""

    def __init__(self, waiting: backlog.Backlog, sent: Mapping[str, Any] | None) -> None:
        self._waiting = waiting
        self._sent = sent

    def collect(self) -> Iterator[Metric]:
        """The backlog by segments, bytes and age; segments and bytes sent, and failures."""
        waiting = self._waiting
        yield GaugeMetricFamily("ratchet_shipper_backlog_segments", "Sealed segments to be sent", waiting.segments)
        yield GaugeMetricFamily("ratchet_shipper_backlog_bytes", "Bytes of the segments to be sent", waiting.bytes)
        yield GaugeMetricFamily("ratchet_shipper_lag_seconds", "Age of the oldest segment to be sent", waiting.lag_s)
        yield GaugeMetricFamily("ratchet_shipper_refused_segments", "Segments set aside for good", waiting.refused)
        if self._sent is not None:
            yield CounterMetricFamily("ratchet_shipper_segments", "Segments sent", self._sent["segments"])
            yield CounterMetricFamily("ratchet_shipper_bytes", "Bytes sent, before packing", self._sent["bytes"])
            yield CounterMetricFamily("ratchet_shipper_packed_bytes", "Bytes sent, packed", self._sent["packed"])
            yield CounterMetricFamily("ratchet_shipper_failures", "Attempts to be repeated", self._sent["failures"])


def endpoint(context: Context, handler: Handler) -> Endpoint:
    """The handler as an endpoint that needs no key."""

    async def served(request: Request) -> Response:
        return await handler(context, request)

    return served


async def healthz(context: Context, _request: Request) -> Response:
    """200 while this worker can serve and record; asks nobody else."""
    problems = []
    if context.draining:
        problems.append("draining: running calls end, new ones are not taken")
    if not context.journal.healthy:
        problems.append(f"the journal cannot be written: {context.journal.last_error}")
    body = {"status": "unhealthy" if problems else "ok", "problems": problems, "journal": context.journal.counters}
    if context.settings.store.collector is not None:
        body["backlog"] = asdict(await _backlog(context))
    return json_response(body, 503 if problems else 200)


async def readyz(context: Context, _request: Request) -> Response:
    """200 when the whole is in order: collector reachable, deployments known, store and sending not far behind."""
    problems: list[str] = []
    body: dict[str, Any] = {"revision": context.versions.current.revision}
    try:
        stats = await context.link.stats()
        body["lag_seconds"] = stats["loader"]["lag_s"]
        if body["revision"] < stats["revision"]:
            problems.append(f"revision {stats['revision']} of the deployments has not arrived yet")
        if body["lag_seconds"] > MAX_LAG:
            problems.append(f"the store is {body['lag_seconds']:.0f} s behind the journal")
    except RatchetError as error:
        problems.append(error.message)
    if context.settings.store.collector is not None:
        problems += _unsent(await _backlog(context))
    if context.draining:
        problems.append("draining")
    body = {"status": "not ready" if problems else "ready", "problems": problems, **body}
    return json_response(body, 503 if problems else 200)


async def metrics(context: Context, _request: Request) -> Response:
    """Prometheus text with the counts of all workers, at most about a second old."""
    far = context.settings.store.collector is not None
    told: dict[str, Any] | None = None
    with contextlib.suppress(RatchetError, TimeoutError):
        async with asyncio.timeout(_STATS_SECONDS):
            told = await (context.link.shipper() if far else context.link.stats())
    more: Collector | None = None if told is None else Stored(told)
    if far:  # the store's own numbers are the collector's to tell
        more = Sent(await _backlog(context), told)
    return Response(await run_in_threadpool(_exposition, context, more), media_type=TEXT)


def _unsent(waiting: backlog.Backlog) -> Iterator[str]:
    if waiting.lag_s > MAX_LAG:
        yield f"{waiting.segments} segments wait here for the collector, the oldest for {waiting.lag_s:.0f} s"
    if waiting.refused:
        yield f"{waiting.refused} segments were refused by the collector and are kept in journal/{backlog.REFUSED}"


async def _backlog(context: Context) -> backlog.Backlog:
    return await run_in_threadpool(backlog.measure, context.settings.store.data_dir / FOLDER)


def publish(context: Context) -> None:
    """Leave this worker's counts where the others find them. A full disk leaves the last ones in place."""
    with contextlib.suppress(OSError):
        write_atomically(context.runtime / f"worker{context.index}.prom", labelled(context.index))


def labelled(index: int) -> bytes:
    """This worker's counts, each with the label `worker`: a restart then resets its own series only."""
    text = generate_latest(REGISTRY).decode()
    return SAMPLE.sub(lambda found: f'{found[1]}{{worker="{index}"{"," if found[2] else "}"}', text).encode()


def merge(texts: Iterable[bytes]) -> bytes:
    """One exposition out of several of the same metrics: the samples of a family have to stand together."""
    families: dict[str, list[str]] = {}
    for text in texts:
        for block in text.decode().split("# HELP ")[1:]:
            about, kind, samples = block.split("\n", 2)
            families.setdefault(f"# HELP {about}\n{kind}\n", []).append(samples)
    return "".join(head + "".join(samples) for head, samples in families.items()).encode()


def _exposition(context: Context, more: Collector | None) -> bytes:
    texts = [labelled(context.index)]
    for index in set(range(context.settings.server.workers)) - {context.index}:
        with contextlib.suppress(OSError):
            texts.append((context.runtime / f"worker{index}.prom").read_bytes())
    others = CollectorRegistry()
    others.register(Restarts(context.runtime / "state.json"))
    if more is not None:
        others.register(more)
    return merge(texts) + generate_latest(others)


async def about(context: Context, request: Request) -> Response:
    """What this is, and what to do with it."""
    base = str(request.base_url).rstrip("/")
    return json_response(
        {
            "name": "ratchet",
            "what": "A proxy for agents: records each call, serves the best prompt versions, learns from rewards.",
            "use": f"OPENAI_BASE_URL={base}/v1",
            "scoped": f"{base}/e/{{episode_id}}/v1",
            "reward": f"POST {base}/reward",
            "upstream": without_credentials(context.settings.upstream.default),
            "see": [f"{base}/healthz", f"{base}/readyz", f"{base}/metrics", f"{base}/api/episodes"],
        }
    )
