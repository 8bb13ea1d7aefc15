"""A store of a hundred thousand episodes browsed by API and by command line: how long each look takes."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from bench.result import Result
from bench.store.ingest import folder, settings
from collector.service import Collector

_START_SECONDS = 60.0
_LOOKS = {
    "page": "/api/episodes?limit=50",
    "slot": "/api/episodes?limit=50&slot=agent",
    "version": "/api/episodes?limit=50&slot=agent&version=2",
    "rare_version": "/api/episodes?limit=50&slot=agent&version=99",
    "reward": "/api/episodes?limit=50&min_reward=0.99",
    "spans": "/api/spans?limit=50&slot=agent&version=2",
}
_LINES = {"list": ("episodes", "list", "--json"), "show": ("episodes", "show", "--json")}


def measure(result: Result, data_dir: Path, rounds: int) -> None:
    """Fill in milliseconds of each look at the closed store in `data_dir`, which a process of its own then serves."""
    with _served(data_dir) as client:
        began = time.perf_counter()
        first = client.get(_LOOKS["page"]).raise_for_status().json()
        result.measures["browse_api_first_page_ms"] = (time.perf_counter() - began) * 1e3
        shown = first["episodes"][7]["episode_id"]
        looks = {**_LOOKS, "next": f"{_LOOKS['page']}&cursor={first['next']}", "episode": f"/api/episodes/{shown}"}
        for name, path in looks.items():
            result.measures[f"browse_api_{name}_ms"] = min(_asked(client, path) for _ in range(rounds))
    for name, words in _LINES.items():
        arguments = [*words, *([shown] if name == "show" else []), "--data-dir", str(data_dir)]
        result.measures[f"browse_cli_{name}_s"] = min(_run(arguments) for _ in range(rounds))


def _asked(client: httpx.Client, path: str) -> float:
    began = time.perf_counter()
    client.get(path).raise_for_status()
    return (time.perf_counter() - began) * 1e3


def _run(arguments: list[str]) -> float:
    """Seconds of one command, the interpreter's start included."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ratchet", *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


@contextlib.contextmanager
def _served(data_dir: Path) -> Iterator[httpx.Client]:
    with folder() as home:
        socket = home / "s"
        config = json.dumps({"store": {"data_dir": str(data_dir)}})
        process = subprocess.Popen(
            [sys.executable, "-m", "collector", "--socket", str(socket), "--config", config], stderr=subprocess.DEVNULL
        )
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://store") as client:
                _ready(client, process)
                yield client
        finally:
            process.terminate()
            process.wait(60)


def _ready(client: httpx.Client, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + _START_SECONDS
    while True:
        with contextlib.suppress(httpx.TransportError):
            client.get("/api/identity", timeout=60).raise_for_status()
            return
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError("the collector did not start")
        time.sleep(0.01)


def start(result: Result, rounds: int) -> None:
    """Fill in the seconds from nothing to the first answer of a collector with an empty store."""
    taken = []
    for _ in range(rounds):
        with folder() as data_dir:
            Collector(settings(data_dir), background=False).close()
            began = time.perf_counter()
            with _served(data_dir):
                taken.append(time.perf_counter() - began)
    result.measures["start_s"] = min(taken)
