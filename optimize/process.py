"""One agent process: started in its own group, fed, bounded in time and output, and never left behind."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OUTPUT_BYTES = 1 << 20  # of each stream; the rest is read and dropped, so that no agent blocks on a full pipe
TERM_SECONDS = 2.0  # between asking a group to end and killing it
DRAIN_SECONDS = 1.0  # for output still in the pipes after the process has ended


@dataclass(frozen=True)
class Finished:
    """How a process ended. `returncode` is negative for a signal; `timed_out` means that we ended it."""

    returncode: int
    stdout: str
    stderr: str
    timed_out: bool
    truncated: bool


class _Capture(asyncio.SubprocessProtocol):
    """Keeps the head of stdout and the tail of stderr."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[None] = loop.create_future()
        self.drained: asyncio.Future[None] = loop.create_future()
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.truncated = False
        self._open = {1, 2}

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 1:
            room = OUTPUT_BYTES - len(self.stdout)
            self.truncated = self.truncated or len(data) > room
            self.stdout += data[:room]
            return
        self.stderr += data
        if len(self.stderr) > OUTPUT_BYTES:
            del self.stderr[: len(self.stderr) - OUTPUT_BYTES]

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._open.discard(fd)
        if not self._open and not self.drained.done():
            self.drained.set_result(None)

    def process_exited(self) -> None:
        if not self.exited.done():
            self.exited.set_result(None)


async def run_process(
    command: Sequence[str], *, stdin: str, env: Mapping[str, str], cwd: Path | None = None, seconds: float
) -> Finished:
    """Run `command` to its end, at most `seconds`; whatever it started in its group ends with it.

    A cancelled caller ends the group too. Raises OSError where the command cannot be started.
    """
    loop = asyncio.get_running_loop()
    transport, capture = await loop.subprocess_exec(
        _Capture, *command, env=dict(env), cwd=cwd, start_new_session=True, stdin=-1, stdout=-1, stderr=-1
    )
    group = transport.get_pid()
    timed_out = False
    try:
        try:
            _feed(transport, stdin)
            async with asyncio.timeout(seconds):
                await asyncio.shield(capture.exited)
        except TimeoutError:
            timed_out = True
            await _end(group, capture)
        finally:
            _signal(group, signal.SIGKILL)  # the agent when we were cancelled, and children that outlive it
            await capture.exited
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await asyncio.shield(capture.drained)
    finally:
        transport.close()
    return Finished(
        transport.get_returncode() or 0,
        capture.stdout.decode(errors="replace"),
        capture.stderr.decode(errors="replace"),
        timed_out,
        capture.truncated,
    )


def _feed(transport: asyncio.SubprocessTransport, text: str) -> None:
    pipe = transport.get_pipe_transport(0)
    if isinstance(pipe, asyncio.WriteTransport):  # an agent that never reads stdin only closes the pipe
        pipe.write(text.encode())
        pipe.write_eof()


async def _end(group: int, capture: _Capture) -> None:
    _signal(group, signal.SIGTERM)
    try:
        async with asyncio.timeout(TERM_SECONDS):
            await asyncio.shield(capture.exited)
    except TimeoutError:
        _signal(group, signal.SIGKILL)
        await capture.exited


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
