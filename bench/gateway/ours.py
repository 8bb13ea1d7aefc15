"""`ratchet serve` with everything on: a key, a slot whose second version is live, redaction, journal, collector."""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import yaml

from bench.gateway import payloads, process
from bench.gateway.load import Address
from bench.gateway.process import NotStarted, Target

KEY = "rk-bench-9f2c7a1e"
SLOT = "bench"
WORKER, COLLECTOR = "proxy.worker", "collector"  # among the arguments of these processes
_RECORDING = ["-P", "-c", "import ratchet; ratchet.main()"]
_UNRECORDED = ["-P", "-m", "bench.gateway.unrecorded"]


@dataclass(frozen=True)
class Records:
    """What the store and the journal hold at the end: spans, distinct span ids, spans served the promoted version."""

    spans: int
    distinct: int
    injected: int


def configuration(upstream: str, workers: int) -> dict[str, Any]:
    """As a user would write it who has one OpenAI-compatible upstream, one key and one prompt."""
    target = {"model": f"openai/{payloads.MODEL}", "api_base": upstream, "api_key": "upstream-key"}
    return {
        "server": {
            "port": 0,
            "workers": workers,
            "keys": [{"name": "bench", "key": KEY, "scopes": ["agent", "reward", "admin"]}],
        },
        "model_list": [{"model_name": payloads.MODEL, "litellm_params": target}],
        "slots": {SLOT: {"template": payloads.PROMPT}},
    }


@contextlib.contextmanager
def served(
    folder: Path, upstream: str, cpus: set[int], *, recording: bool = True, workers: int = 1
) -> Iterator[Target]:
    """Our server over a fresh data directory in `folder`."""
    folder.mkdir(parents=True)
    config, data, log = folder / "ratchet.yaml", folder / "data", folder / "log"
    config.write_text(yaml.safe_dump(configuration(upstream, workers)))
    command = [sys.executable, *(_RECORDING if recording else _UNRECORDED)]
    command += ["serve", "--config", str(config), "--data-dir", str(data)]
    began = time.monotonic()
    with process.running(command, log, cpus) as running:
        url = process.waited(running, log, lambda: _url(data, running.pid))
        headers = (("authorization", f"Bearer {KEY}"),)
        name = "ours" if recording else "unrecorded"
        target = Target(name, Address(httpx.URL(url).port or 80, headers=headers), running, folder)
        process.answering(target, log, began)
        _promote(target)
        if recording:
            target.parts = {"worker": WORKER, "collector": COLLECTOR}
            target.drain = 1.2  # a segment is sealed after a second
            target.flush = lambda: _flush(target)
            target.loaded = lambda: _loaded(target)
        yield target


def _url(data: Path, pid: int) -> str | None:
    with contextlib.suppress(OSError, ValueError, KeyError):
        state = orjson.loads((data / "server.json").read_bytes())
        return str(state["url"]) if state["pid"] == pid else None
    return None


def _client(target: Target) -> httpx.Client:
    return httpx.Client(
        base_url=f"http://127.0.0.1:{target.address.port}", headers=dict(target.address.headers), timeout=60
    )


def _promote(target: Target) -> None:
    """Make a second version live, and wait until a new episode is served it. Raises NotStarted."""
    with _client(target) as client:
        made = client.post(f"/api/slots/{SLOT}/versions", json={"kind": "prompt", "template": payloads.IMPROVED})
        version = made.raise_for_status().json()["version"]
        client.post(f"/api/slots/{SLOT}/promote", json={"version": version}).raise_for_status()
        wanted = f"{SLOT}@{version}"
        for _ in range(100):
            target.sent += 1
            answer = client.post("/v1/chat/completions", content=payloads.scenarios()[0].body)
            if answer.headers.get("x-ratchet-versions") == wanted:
                return
            time.sleep(0.05)
    raise NotStarted(f"{wanted} is not served: {answer.status_code} {answer.text[:300]}")


def _flush(target: Target) -> None:
    """Nobody reads, so the loader would wait for more: what it owes must not stay out of the figures."""
    with contextlib.suppress(httpx.HTTPError), _client(target) as client:
        client.post("/api/flush")


def _loaded(target: Target) -> bool:
    """Whether every call that was sent is a span; a server that does not answer has not loaded anything."""
    try:
        return records(target).spans == target.sent
    except httpx.HTTPError:
        return False


def records(target: Target) -> Records:
    """What the store holds now."""
    sql = "select count(*), count(distinct span_id), count(*) filter (prompt_version = 2) from spans_v"
    with _client(target) as client:
        answer = client.post("/api/query", json={"sql": sql}).raise_for_status().json()
    return Records(*answer["rows"][0])


def lines(folder: Path) -> int:
    """How many spans the journal of a server in `folder` holds."""
    marks = 0
    for path in (folder / "data" / "journal").iterdir():
        with path.open("rb") as file:
            marks += sum(line.startswith(b'{"event":"span"') for line in file)
    return marks
