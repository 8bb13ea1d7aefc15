"""A process of the bench: started on the CPUs that it may use, watched until it answers, ended with its whole tree."""

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bench.gateway import cpu, payloads
from bench.gateway.load import SDK_HEADERS, Address

ROOT = Path(__file__).resolve().parents[2]
START = 120.0  # seconds until a target must answer
_PORT = re.compile(r"^port (\d+)$", re.MULTILINE)
_CLEAN = ("OPENAI_", "RATCHET_", "LITELLM_", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")


T = TypeVar("T")


class NotStarted(Exception):
    """A target that does not answer; says what it printed last."""


@dataclass
class Target:
    """A running gateway. `boot`: seconds from its start to its first answer; `sent` counts every call that it was sent;
    `folder` holds what it writes; `drain`: seconds that it gets before its CPU is read, `flush` has it put what it
    recorded where it belongs by then, `loaded` says whether it has (always true for one that records nothing)."""

    name: str
    address: Address
    process: "subprocess.Popen[bytes] | None" = None
    folder: Path | None = None
    boot: float = 0.0
    sent: int = 0
    drain: float = 0.5
    flush: Callable[[], None] = lambda: None
    loaded: Callable[[], bool] = lambda: True
    parts: Mapping[str, str] = field(default_factory=dict)
    meter: cpu.Meter = field(init=False)

    def __post_init__(self) -> None:
        self.meter = cpu.Meter(self.process.pid if self.process else os.getpid())

    def resident(self, mark: str = "") -> int:
        """Bytes held by the tree's processes, by those with `mark` among their arguments where one is given."""
        if self.process is None:
            return 0
        pids = cpu.tree(self.process.pid)
        return sum(cpu.resident(pid) for pid in pids if not mark or mark in cpu.arguments(pid))


def environment(**more: str) -> dict[str, str]:
    """The caller's, without what would send calls elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_CLEAN)}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled
    return {**kept, "PYTHONPATH": str(ROOT), **more}


@contextlib.contextmanager
def running(
    argv: Sequence[str], log: Path, cpus: set[int], env: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process on `cpus`, its output in `log`; ended with all its children."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)  # a child inherits it
    try:
        with log.open("wb") as sink:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=dict(env or environment()),
                cwd=log.parent,
            )
    finally:
        os.sched_setaffinity(0, before)
    try:
        yield process
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    pids = cpu.tree(process.pid)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    for pid in pids:  # what outlived its parent, or did not listen
        if process.pid != pid or process.poll() is None:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def port_of(process: "subprocess.Popen[bytes]", log: Path) -> int:
    """The port that a process says it listens on. Raises NotStarted."""
    return int(waited(process, log, lambda: _PORT.search(log.read_text(errors="replace")))[1])


def waited(process: "subprocess.Popen[bytes]", log: Path, ask: Callable[[], T | None]) -> T:
    """What `ask` answers, as soon as it answers. Raises NotStarted where the process ends or takes too long."""
    deadline = time.monotonic() + START
    while process.poll() is None and time.monotonic() < deadline:
        found = ask()
        if found is not None:
            return found
        time.sleep(0.01)
    raise NotStarted(log.read_text(errors="replace")[-2_000:])


def answering(target: Target, log: Path, began: float) -> Target:
    """Wait until the target answers a chat call, and note how long that took since `began`. Raises NotStarted."""
    assert target.process is not None
    waited(target.process, log, lambda: ask(target) or None)
    target.boot = time.monotonic() - began
    return target


def ask(target: Target) -> bool:
    """One small call: whether a target answers it as it should. A call that reaches nobody is not counted as sent."""
    headers = {**dict(SDK_HEADERS), **dict(target.address.headers)}
    body = target.address.body(payloads.scenarios()[0].body)
    connection = http.client.HTTPConnection("127.0.0.1", target.address.port, timeout=30)
    try:
        connection.request("POST", target.address.path, body, headers)
        target.sent += 1
        answer = connection.getresponse()
        return answer.status == 200 and b"Paris" in answer.read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
