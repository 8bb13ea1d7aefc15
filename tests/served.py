"""A real `ratchet serve` as a child process, for tests: started on a free loopback port, ended when the block is."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collector.client import Remote

RATCHET = [sys.executable, "-P", "-c", "import ratchet; ratchet.main()"]
START_SECONDS = 120.0


class Patient(Remote):
    """A client whose `flush` does not give up on a busy machine."""

    def flush(self) -> dict[str, Any]:
        """Until what was journalled before can be read, or two minutes have passed."""
        deadline = time.monotonic() + START_SECONDS
        while (told := super().flush())["pending"] and time.monotonic() < deadline:
            continue
        return told


@dataclass
class Served:
    """A running server. `url` has no /v1; `log` is what it printed."""

    url: str
    data_dir: Path
    process: "subprocess.Popen[bytes]"
    log: Path

    @functools.cached_property
    def client(self) -> Remote:
        """The API's client; closed with the server."""
        return Patient(self.url)

    def environment(self, **more: str) -> dict[str, str]:
        """What an agent sees: its own environment with the base URL changed, and a key that nobody checks here."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "RATCHET_"))}
        return {**clean, "OPENAI_BASE_URL": f"{self.url}/v1", "OPENAI_API_KEY": "client-key", **more}


@contextlib.contextmanager
def served(data_dir: Path, upstream: str, *flags: str, config: Path | None = None, **environ: str) -> Iterator[Served]:
    """Start `ratchet serve` in front of `upstream` and wait until it answers. `environ` is added to its environment."""
    data_dir.mkdir(parents=True, exist_ok=True)
    log = data_dir.parent / f"{data_dir.name}.log"
    command = [*RATCHET, "serve", "--port", "0", "--data-dir", str(data_dir), "--upstream", upstream, *flags]
    if config is not None:
        command += ["--config", str(config)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "RATCHET_"))}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env={**environment, **environ}
        )
    running: Served | None = None
    try:
        running = Served(_url(data_dir, process, log), data_dir, process, log)
        yield running
    finally:
        if running is not None:
            running.client.close()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"the server did not end on SIGTERM:\n{log.read_text()}") from None


def _url(data_dir: Path, process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended at start:\n{log.read_text()}"
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            state = json.loads((data_dir / "server.json").read_text())
            if state["pid"] == process.pid:
                return str(state["url"])
        time.sleep(0.02)
    raise AssertionError(f"the server was not ready within {START_SECONDS} s:\n{log.read_text()}")


def run_ratchet(
    *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """One command of ours, to its end."""
    command: Sequence[str] = [*RATCHET, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env, cwd=cwd)
