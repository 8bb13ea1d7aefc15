"""What a tree of processes has used: CPU time from the scheduler's own nanosecond counters, memory, and pinning."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")
_KIB = 1024


def schedstat(text: str) -> int:
    """Nanoseconds on a CPU out of one `/proc/.../schedstat`: the first of its three numbers."""
    return int(text.split(maxsplit=1)[0])


def children(stats: Iterable[str]) -> dict[int, list[int]]:
    """Which process has which children, out of the lines of `/proc/<pid>/stat`. A name may hold spaces and brackets."""
    found: dict[int, list[int]] = {}
    for line in stats:
        pid = int(line.partition(" ")[0])
        parent = int(line.rpartition(")")[2].split()[1])
        found.setdefault(parent, []).append(pid)
    return found


def tree(root: int) -> list[int]:
    """The process and everything below it, that lives now."""
    stats = []
    for entry in os.scandir(PROC):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stats.append(Path(entry.path, "stat").read_text())
    below = children(stats)
    found = [root]
    for pid in found:
        found += below.get(pid, [])
    return found


class Meter:
    """The CPU time of a tree. A thread that ended keeps what it was last seen with."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._seen: dict[tuple[int, int], int] = {}

    def read(self) -> int:
        """Nanoseconds since the tree's beginning, over all threads ever seen."""
        for pid in tree(self._root):
            for task in threads(pid):
                with contextlib.suppress(OSError):
                    self._seen[pid, task] = schedstat((PROC / f"{pid}/task/{task}/schedstat").read_text())
        return sum(self._seen.values())

    def share(self, mark: str) -> int:
        """The nanoseconds, at the last reading, of the processes that live and have `mark` among their arguments."""
        marked = {pid for pid in {pid for pid, _ in self._seen} if mark in arguments(pid)}
        return sum(used for (pid, _), used in self._seen.items() if pid in marked)


def threads(pid: int) -> list[int]:
    """The threads of a process; none of one that is gone."""
    try:
        return [int(name) for name in os.listdir(PROC / str(pid) / "task")]
    except OSError:
        return []


def resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 for one that is gone."""
    with contextlib.suppress(OSError):
        for line in (PROC / f"{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * _KIB
    return 0


def pin(root: int, cpus: set[int]) -> None:
    """Keep a whole tree on some CPUs."""
    for pid in tree(root):
        for task in threads(pid):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(task, cpus)


def arguments(pid: int) -> list[str]:
    """The command line of a process; empty for one that is gone."""
    try:
        return (PROC / f"{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []
