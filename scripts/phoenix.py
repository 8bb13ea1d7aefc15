"""Against a real Arize Phoenix on loopback: what Ratchet sends arrives, shown by Phoenix's own API; and the same OTLP
batches to both, in spans a second until they can be read.

`make test-phoenix` runs it. Phoenix gets an environment of its own, .venvs/phoenix. Exit 1 when something is missing.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson

from collector import otel
from collector.journal import FOLDER, Journal
from collector.model import Exchange, Reward
from collector.otel_in import Observed
from collector.otlp import PROTOBUF
from collector.service import Collector
from collector.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".venvs" / "phoenix"
WANTED = "arize-phoenix>=20,<21"
START_SECONDS = 180.0
PATIENCE = 90.0
TRACE = f"{0xABCDEF:032x}"


def main() -> int:
    """The checks, then the comparison; 0 when everything arrived."""
    _install()
    with tempfile.TemporaryDirectory(prefix="ratchet-phoenix") as folder:
        found = check(Path(folder))
        print(json.dumps(found, indent=2), flush=True)
        count = int(os.environ.get("SPANS", "1000"))
        if count:
            print(json.dumps(compare(Path(folder), count), indent=2), flush=True)
    return 0 if all(value is not False for value in found.values()) else 1


def _install() -> None:
    if (HOME / "bin" / "phoenix").exists():
        return
    print(f"Installing {WANTED} into {HOME.relative_to(ROOT)} (once) ...", flush=True)
    venv.create(HOME, with_pip=True)
    pip = [str(HOME / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", WANTED]
    subprocess.run(pip, check=True)


@contextlib.contextmanager
def phoenix(folder: Path, port: int) -> Iterator[str]:
    """A running Phoenix that keeps its data in `folder`; its base URL."""
    environment = {
        **os.environ,
        "PHOENIX_WORKING_DIR": str(folder),
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_PORT": str(port),
        "PHOENIX_GRPC_PORT": str(free_port()),
        "PHOENIX_TELEMETRY_ENABLED": "false",
    }
    with (folder / "phoenix.log").open("ab") as log:
        process = subprocess.Popen(
            [str(HOME / "bin" / "phoenix"), "serve"], env=environment, stdout=log, stderr=log, cwd=folder
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: _answers(f"{url}/healthz"), START_SECONDS, "Phoenix to start")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Seconds until it held. Raises TimeoutError."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.05)
    return time.monotonic() - began


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, trust_env=False).is_success
    return False


def _read(url: str, **params: Any) -> list[dict[str, Any]]:
    answer = httpx.get(url, params=params, trust_env=False, timeout=30)
    if answer.status_code == 404:
        return []
    answer.raise_for_status()
    return list(answer.json()["data"])


def span(number: int, **fields: Any) -> Exchange:
    """A recorded call of one trace."""
    start = time.time_ns() + number * 1_000_000
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Question {number}?"}]
    given: dict[str, Any] = {
        "span_id": f"{number:016x}",
        "trace_id": TRACE,
        "episode_id": "phoenix-1",
        "episode_source": "url",
        "start_ns": start,
        "end_ns": start + 900_000,
        "operation": "chat",
        "route": "/v1/chat/completions",
        "status": "ok",
        "request_model": "m",
        "response_id": f"resp-{number}",
        "input_tokens": 12,
        "output_tokens": 3,
        "input_messages": json.dumps(asked),
        "output_messages": json.dumps([{"role": "assistant", "content": f"Answer {number}."}]),
    }
    return Exchange(**{**given, **fields})


def check(folder: Path) -> dict[str, Any]:
    """Spans with messages, a tree, and rewards arrive; what was recorded during an outage arrives after it."""
    (folder / "phoenix").mkdir()
    port = free_port()
    data_dir = folder / "data"
    endpoint = {"endpoint": f"http://127.0.0.1:{port}", "rewards": "phoenix"}
    settings = Settings.model_validate({"store": {"data_dir": str(data_dir)}, "export": {"otlp": endpoint}})
    agent = {"operation": "invoke_agent", "input_messages": None, "output_messages": None}
    root = Observed(**{**_row(span(1, **agent)), "source": "otlp", "agent_name": "planner", "name": "invoke_agent"})
    call = span(2, parent_span_id=root.span_id)
    judged = [
        Reward("rw-1", "response", "resp-2", 0.75, time.time_ns(), "quality", "good", "complete", "human"),
        Reward("rw-2", "episode", "phoenix-1", 1.0, time.time_ns()),
    ]
    with phoenix(folder / "phoenix", port) as url:
        collector = Collector(settings)
        _write(data_dir, ("otlp", root), ("span", call), *(("reward", one) for one in judged))
        spans_url = f"{url}/v1/projects/default/spans"
        wait_for(lambda: len(_read(spans_url)) == 2, PATIENCE, "two spans in Phoenix")
        notes_url = f"{url}/v1/projects/default/span_annotations"
        wait_for(lambda: len(_read(notes_url, span_ids=call.span_id)) == 1, PATIENCE, "an annotation in Phoenix")
        seen = {one["context"]["span_id"]: one for one in _read(spans_url)}
        (note,) = _read(notes_url, span_ids=call.span_id)
        traces = _read(f"{url}/v1/projects/default/trace_annotations", trace_ids=TRACE)
    _write(data_dir, ("span", span(3, parent_span_id=root.span_id)))
    wait_for(lambda: collector.stats()["otlp"]["failures"] > 0, PATIENCE, "the outage to be noticed")
    with phoenix(folder / "phoenix", port):
        waited = wait_for(lambda: len(_read(spans_url)) == 3, PATIENCE, "the span of the outage")
        again = _read(notes_url, span_ids=call.span_id)
    stats = collector.stats()["otlp"]
    collector.close()
    attributes = seen[call.span_id]["attributes"]
    return {
        "spans_arrived": set(seen) == {root.span_id, call.span_id},
        "tree_arrived": seen[call.span_id]["parent_id"] == root.span_id,
        "kinds_arrived": [seen[one]["span_kind"] for one in (root.span_id, call.span_id)] == ["AGENT", "LLM"],
        "messages_arrived": attributes.get("llm.input_messages.1.message.content") == "Question 2?",
        "reward_arrived": (note["name"], note["result"]["score"], note["annotator_kind"]) == ("quality", 0.75, "HUMAN"),
        "episode_reward_arrived": [one["result"]["score"] for one in traces] == [1.0],
        "outage_lost_nothing": True,
        "outage_doubled_nothing": len(again) == 1,
        "seconds_after_the_outage": round(waited, 2),
        "sent": stats,
    }


def _row(call: Exchange) -> dict[str, Any]:
    return dict(orjson.loads(orjson.dumps(call)))


def _write(data_dir: Path, *events: tuple[str, Any]) -> None:
    journal = Journal(data_dir / FOLDER, "drill")
    for event, body in events:
        journal.append(event, body)
    journal.close()


def compare(folder: Path, count: int) -> dict[str, Any]:
    """The same OTLP batches of 6 KB spans, one sender: spans a second until all can be read by each one's API."""
    batches = [_batch(start, min(100, count - start)) for start in range(0, count, 100)]
    (folder / "phoenix-load").mkdir()
    with phoenix(folder / "phoenix-load", free_port()) as url:
        theirs = _load(url, batches, lambda: _phoenix_count(url) >= count)
    with _ratchet(folder / "ratchet-load") as url:
        ours = _load(url, batches, lambda: _our_count(url) >= count)
    return {
        "spans": count,
        "phoenix_spans_per_second": round(count / theirs, 1),
        "ratchet_spans_per_second": round(count / ours, 1),
        "ratio": round(theirs / ours, 2),
    }


def _batch(start: int, count: int) -> bytes:
    from google.protobuf.json_format import ParseDict
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    text = "The quick brown fox jumps over the lazy dog. " * 120
    asked = json.dumps([{"role": "user", "content": text}])
    rows = [
        {**_row(span(start + number + 1, input_messages=asked)), "trace_id": f"{(start + number) // 5 + 1:032x}"}
        for number in range(count)
    ]
    request = ExportTraceServiceRequest()
    tree = otel.request(rows)
    for one in tree["resourceSpans"][0]["scopeSpans"][0]["spans"]:
        ids = {name: bytes.fromhex(one.pop(name)) for name in ("traceId", "spanId")}
        one.pop("parentSpanId")
        made = ParseDict(one, _scope(request).spans.add())
        made.trace_id, made.span_id = ids["traceId"], ids["spanId"]
    return bytes(request.SerializeToString())


def _scope(request: Any) -> Any:
    if not request.resource_spans:
        request.resource_spans.add().scope_spans.add()
    return request.resource_spans[0].scope_spans[0]


def _load(url: str, batches: list[bytes], visible: Callable[[], bool]) -> float:
    """Seconds from the first byte sent until everything can be read."""
    began = time.monotonic()
    with httpx.Client(trust_env=False, timeout=60) as client:
        for body in batches:
            while (status := _post(client, url, body)) == 503:
                time.sleep(0.1)
            if status != 200:
                raise RuntimeError(f"{url} answered {status}")
    wait_for(visible, 300.0, f"{url} to show all spans")
    return time.monotonic() - began


def _post(client: httpx.Client, url: str, body: bytes) -> int:
    return client.post(f"{url}/v1/traces", content=body, headers={"content-type": PROTOBUF}).status_code


def _phoenix_count(url: str) -> int:
    query = "{ projects { edges { node { name recordCount } } } }"
    answer = httpx.post(f"{url}/graphql", json={"query": query}, trust_env=False, timeout=60)
    edges = answer.json()["data"]["projects"]["edges"]
    return sum(edge["node"]["recordCount"] for edge in edges if edge["node"]["name"] == "default")


def _our_count(url: str) -> int:
    body = {"sql": "SELECT count(*) FROM spans_v"}
    return int(httpx.post(f"{url}/api/query", json=body, trust_env=False, timeout=60).json()["rows"][0][0])


@contextlib.contextmanager
def _ratchet(data_dir: Path) -> Iterator[str]:
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("ratchet")),
        "serve",
        "--port",
        str(port),
        "--data-dir",
        str(data_dir),
    ]
    with (data_dir.parent / "ratchet.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: _answers(f"{url}/readyz"), START_SECONDS, "Ratchet to start")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


if __name__ == "__main__":
    sys.exit(main())
