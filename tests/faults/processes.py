"""The processes of a running server, found by who started whom."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def parent(pid: int) -> int | None:
    """The parent of a process that is alive. A zombie counts as gone, unless threads of it are still at work: a killed
    one may be in a sync, and holds its files and locks until that returns."""
    try:
        state, ppid, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        threads = len(os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" and threads <= 1 else int(ppid)


def children(pid: int) -> list[int]:
    """The living children of a process."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and parent(int(name)) == pid]


def arguments(pid: int) -> list[str]:
    """The command line of a process, [] when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def find(server: int, module: str) -> list[int]:
    """The children of a server that run a module: `collector` or `proxy.worker`."""
    return sorted(pid for pid in children(server) if module in arguments(pid))


def until(condition: Callable[[], object], seconds: float, what: str) -> float:
    """Wait for a condition; returns how long that took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - begun


def on_each_worker(server: int, act: Callable[[], object]) -> None:
    """Act while one worker alone can answer, the others stopped; and so on, with each of them."""
    workers = find(server, "proxy.worker")
    for one in workers:
        others = [pid for pid in workers if pid != one]
        try:
            for pid in others:
                os.kill(pid, signal.SIGSTOP)
            act()
        finally:
            for pid in others:
                os.kill(pid, signal.SIGCONT)


def kill_all(server: "subprocess.Popen[bytes]") -> None:
    """kill -9 of a server and its children; returns when all have ended, and so let go of what they held."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(server.pid, signal.SIGSTOP)  # so that it starts nobody meanwhile
    family = [server.pid, *children(server.pid)]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    server.wait(10)
    until(lambda: not any(parent(pid) for pid in family), 20, "all have ended")
