"""`--sandbox`: a room of its own for each agent process. What is protected, and what is not, is said, not implied."""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

CPU_SECONDS = 600
MEMORY_BYTES = 8 << 30  # of data, not of address space: JavaScript engines reserve far more than they use
FILE_BYTES = 256 << 20
OPEN_FILES = 1024

# What an agent may need of the environment; everything else, keys among it, stays outside.
KEPT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "OPENAI_MODEL", "PYTHONPATH", "NODE_PATH", "SSL_CERT_FILE")

# Run by `python -I -S` before the agent's own command: limits bind the process itself and all that it starts, and no
# Python code runs between fork and exec of ours.
LAUNCHER = """
import os, resource, sys
for name, limit in (part.split("=") for part in sys.argv[1].split(",")):
    kind = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(kind)[1]
    limit = int(limit) if hard == resource.RLIM_INFINITY else min(int(limit), hard)
    resource.setrlimit(kind, (limit, limit))
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"cannot start {sys.argv[2]}: {error}")
"""


def protections() -> tuple[list[str], list[str]]:
    """`(active, absent)`: what `--sandbox` does and does not do on this machine, in words for the user."""
    active = [
        "its own empty folder as working directory, HOME and TMPDIR, removed afterwards",
        f"limits: {CPU_SECONDS} s of CPU, {MEMORY_BYTES >> 30} GiB of memory, {FILE_BYTES >> 20} MiB a file, "
        f"{OPEN_FILES} open files, no core dumps",
        f"an environment of {', '.join(KEPT)} and Ratchet's own variables only",
    ]
    return active, [
        "network: the agent can reach whatever this machine reaches",
        "files: it can read what you can read",
    ]


def bare(env: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that a sandboxed agent gets."""
    return {name: env[name] for name in KEPT if name in env}


class Room:
    """A context: a temporary folder that is removed at the end."""

    def __enter__(self) -> "Room":
        self.path = Path(tempfile.mkdtemp(prefix="ratchet-room-"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def dress(self, command: Sequence[str], cwd: Path) -> list[str]:
        """The command under limits; arguments that name files of `cwd` become absolute, as the folder changes."""
        limits = f"CPU={CPU_SECONDS},DATA={MEMORY_BYTES},FSIZE={FILE_BYTES},NOFILE={OPEN_FILES},CORE=0"
        found = shutil.which(command[0], path=os.environ.get("PATH")) or command[0]
        absolute = [str(cwd / part) if (cwd / part).exists() and part else part for part in [found, *command[1:]]]
        return [sys.executable, "-I", "-S", "-c", LAUNCHER, limits, *absolute]

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """`env` with HOME and the temporary folders inside the room."""
        inside = str(self.path)
        return {**env, "HOME": inside, "TMPDIR": inside, "TEMP": inside, "TMP": inside}
