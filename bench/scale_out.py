"""Hosts that feed one collector, measured: `python -m bench.scale_out` writes bench/results/scale_out.json.

Real `ratchet serve` processes on this machine, so the network is loopback and all of them share its cores.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import yaml

from bench.result import RESULTS, Result
from bench.store.data import calls
from collector import backlog
from collector.journal import encode
from tests.fake_upstream import FakeUpstream
from tests.faults import processes
from tests.served import Served, served

MUST: dict[str, tuple[str, float]] = {
    "spans_lost": ("<=", 0),
    "spans_doubled": ("<=", 0),
    "visible_far_max_s": ("<=", 2.0),
}
_SEGMENT_BYTES = 4 << 20
_LOOKS = 15


class Lines:
    """Journal lines of 6 KB calls, each with a span id of its own, however many are asked for."""

    def __init__(self) -> None:
        self._calls = list(calls(500))
        self.made = 0

    def one(self) -> bytes:
        """The next line."""
        call = self._calls[self.made % len(self._calls)]
        self.made += 1
        return encode("span", replace(call, span_id=f"{self.made:016x}", response_id=f"r-{self.made}"))

    def plant(self, data_dir: Path, segments: int, size: int) -> int:
        """Sealed segments of about `size` bytes, as an outage leaves them behind; their bytes."""
        folder = data_dir / "journal"
        folder.mkdir(parents=True, exist_ok=True)
        written = 0
        for number in range(segments):
            content = bytearray(self.one())
            while len(content) < size:
                content += self.one()
            (folder / f"{time.time_ns():019d}-worker0-1-{number:08x}.ndjson").write_bytes(content)
            written += len(content)
        return written


@contextlib.contextmanager
def far(folder: Path, name: str, upstream: str, hub: str) -> Iterator[Served]:
    """A host whose collector is `hub`."""
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump({"store": {"collector": hub}}))
    with served(folder / name, upstream, config=config) as server:
        yield server


def stored(hub: Served) -> int:
    """Spans in the collector's store."""
    return int(hub.client.query("SELECT count(*) FROM spans")["rows"][0][0])


def drained(hub: Served, journals: Sequence[Path], spans: int) -> tuple[float, float]:
    """Seconds from the first segment sent to the last, and to the last span in the store."""

    def waiting() -> int:
        return sum(backlog.measure(folder).segments for folder in journals)

    before = waiting()
    while waiting() == before:
        time.sleep(0.01)
    began = time.perf_counter()
    while waiting():
        time.sleep(0.05)
    sent = time.perf_counter() - began
    while stored(hub) < spans:
        time.sleep(0.1)
    return sent, time.perf_counter() - began


def outage(result: Result, folder: Path, upstream: str, hub: Served, hosts: int, quiet: int, busy: int) -> None:
    """What waits after an outage, sent: small segments as a quiet hour leaves them, large ones of a busy one; the
    latter from one host and from several at once."""
    lines = Lines()
    with far(folder, "idle", upstream, hub.url) as host:
        start = cpu(host)
    for name, count, size, several in (
        ("quiet", quiet, 1, 1),
        ("busy", busy, _SEGMENT_BYTES, 1),
        (f"busy_{hosts}_hosts", busy, _SEGMENT_BYTES, hosts),
    ):
        places = [folder / f"{name}{number}" for number in range(several)]
        size = sum(lines.plant(place, count // several, size) for place in places)
        journals = [place / "journal" for place in places]
        took: list[tuple[float, float]] = []
        watch = threading.Thread(target=lambda: took.append(drained(hub, journals, lines.made)))  # noqa: B023 - joined below
        used = cpu(hub)
        watch.start()
        with contextlib.ExitStack() as stack:
            senders = [stack.enter_context(far(folder, place.name, upstream, hub.url)) for place in places]
            watch.join()
            sending = sum(map(cpu, senders)) - several * start  # a host sends while it is still starting
            result.measures[f"{name}_hosts_cpu_ms_per_mb"] = 1e3 * sending / (size / 1e6)
            result.measures[f"{name}_collector_cpu_ms_per_mb"] = 1e3 * (cpu(hub) - used) / (size / 1e6)
        ((sent, loaded),) = took
        result.measures |= {
            f"{name}_segments_per_s": count // several * several / sent,
            f"{name}_mb_per_s": size / 1e6 / sent,
            f"{name}_loaded_mb_per_s": size / 1e6 / loaded,
        }
        result.notes[name] = {"segments": count // several * several, "mb": size / 1e6, "hosts": several}
    rows = hub.client.query("SELECT count(*), count(DISTINCT span_id) FROM spans")["rows"]
    result.measures |= {"spans_lost": lines.made - rows[0][1], "spans_doubled": rows[0][0] - rows[0][1]}


def cpu(server: Served) -> float:
    """Seconds of processor time that a server used: they say more than the clock where a machine is shared."""
    ticks = 0
    for pid in (server.process.pid, *processes.children(server.process.pid)):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def visible(server: Served) -> list[float]:
    """Seconds from an answer until its span is found by a query, at irregular moments."""
    delays = []
    for number in range(_LOOKS):
        time.sleep(0.1 + 0.37 * number % 1.0)
        body = {"model": "fake-model", "messages": [{"role": "user", "content": f"look {number}"}]}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        answered = time.perf_counter()
        wanted = f"SELECT 1 FROM spans WHERE span_id = '{answer.headers['x-ratchet-span']}'"
        while not server.client.query(wanted)["rows"]:
            time.sleep(0.01)
        delays.append(time.perf_counter() - answered)
    return delays


def latency(result: Result, folder: Path, upstream: str) -> None:
    """The same looks at a server with a store of its own and at one whose collector is elsewhere, in one run."""
    with served(folder / "near", upstream) as hub, far(folder, "far", upstream, hub.url) as host:
        for name, server in (("near", hub), ("far", host)):
            found = visible(server)
            result.measures |= {
                f"visible_{name}_median_s": statistics.median(found),
                f"visible_{name}_max_s": max(found),
            }


def picture(result: Result, path: Path, names: Sequence[str]) -> None:
    """Bytes sent, and sent and loaded, for each kind of backlog."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.7 * len(names) + 1.2))
    for offset, (measure, label) in enumerate((("mb_per_s", "sent"), ("loaded_mb_per_s", "sent and loaded"))):
        values = [result.measures[f"{name}_{measure}"] for name in names]
        places = [number + 0.4 * offset for number in range(len(names))]
        axes.barh(places, values, height=0.38, label=label, color=("#2a7f62", "#8fc1a9")[offset])
        for place, value in zip(places, values, strict=True):
            axes.annotate(f" {value:.3g}", (value, place), va="center", fontsize=8)
    axes.set_yticks([number + 0.2 for number in range(len(names))], names)
    axes.set_xlabel("MB/s of journal")
    axes.invert_yaxis()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Read the flags, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale_out", description=__doc__)
    parser.add_argument("--quiet", type=int, default=3_600, help="small segments: an hour of one worker")
    parser.add_argument("--busy", type=int, default=60, help="segments of 4 MB")
    parser.add_argument("--hosts", type=int, default=3, help="that send at once")
    flags = parser.parse_args()
    began = time.monotonic()
    result = Result("scale_out", MUST)
    with tempfile.TemporaryDirectory() as name, FakeUpstream() as upstream:
        folder = Path(name)
        latency(result, folder, upstream.url)
        with served(folder / "hub", upstream.url) as hub:
            outage(result, folder, upstream.url, hub, flags.hosts, flags.quiet, flags.busy)
    result.write(time.monotonic() - began)
    picture(result, RESULTS / "scale_out.svg", ["quiet", "busy", f"busy_{flags.hosts}_hosts"])
    result.show()


if __name__ == "__main__":
    main()
