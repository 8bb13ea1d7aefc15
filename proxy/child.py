"""One child process of the supervisor: started, watched, restarted, and its last words kept."""

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from collector.errors import Unavailable

log = logging.getLogger("ratchet.supervisor")

FIRST_DELAY = 0.1  # seconds before the first restart; doubles up to LAST_DELAY
LAST_DELAY = 5.0
STEADY = 10.0  # a child that lived this long starts again with FIRST_DELAY
READY = b"ready\n"  # what a child may write to stdout once it serves
TAIL_BYTES = 4096  # of stderr, kept for the message of a failed start
TAIL_LINES = 20


@dataclass(frozen=True)
class Command:
    """What to execute: arguments, what stdin holds (secrets travel here: `ps` shows arguments), fds kept open."""

    argv: Sequence[str]
    stdin: bytes = b""
    fds: tuple[int, ...] = ()


class Child:
    """A process that is kept alive until `stop`. `restarts` counts how often it died unasked."""

    def __init__(
        self,
        name: str,
        command: Callable[[], Command],
        ready: Callable[["Child"], Awaitable[object]],
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        """`command` is asked at each start; `ready(child)` returns when the running process serves."""
        self.name = name
        self.restarts = 0
        self.said_ready = asyncio.Event()
        self._command = command
        self._ready = ready
        self._on_restart = on_restart
        self._tail = b""
        self._process: asyncio.subprocess.Process | None = None
        self._pumps: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._started = False
        self._born = 0.0

    @property
    def pid(self) -> int | None:
        """The process id, None while none runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self, patience: float) -> bool:
        """Start and wait until ready: True, or False when it is still not ready after `patience` seconds.

        From then on it is kept alive. Raises Unavailable with the last lines of stderr when the process ends instead.
        """
        process = await self._spawn()
        ready = asyncio.ensure_future(self._ready(self))
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait({ready, ended}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            is_ready = ready.done() and ready.exception() is None
        finally:
            ready.cancel()
            ended.cancel()
        if process.returncode is not None and not self._stop.is_set():
            await self._drain_pumps()
            raise Unavailable(f"the {self.name} did not start ({_cause(process.returncode)}):\n{self.last_words()}")
        self._started = True
        _echo(self._tail)
        self._keeper = asyncio.create_task(self._keep(process))
        return is_ready

    async def stop(self, patience: float) -> bool:
        """SIGTERM, then SIGKILL after `patience` seconds. False when it had to be killed."""
        self._stop.set()
        self.signal(signal.SIGTERM)
        clean = await self._gone(patience)
        if not clean:
            log.warning("the %s did not end within %.0f s: killed", self.name, patience)
            self.signal(signal.SIGKILL)
            await self._gone(None)
        await self._drain_pumps()
        return clean

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the running process; nothing happens when there is none."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def last_words(self) -> str:
        """The last lines that the process wrote to stderr."""
        lines = self._tail.decode(errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:]) or "(it wrote nothing to stderr)"

    async def _gone(self, patience: float | None) -> bool:
        waits: list[asyncio.Future[object]] = []
        if self._process is not None:
            waits.append(asyncio.ensure_future(self._process.wait()))
        if self._keeper is not None:
            waits.append(asyncio.ensure_future(asyncio.shield(self._keeper)))
        if not waits:
            return True
        _, pending = await asyncio.wait(waits, timeout=patience)
        for waiting in pending:
            waiting.cancel()
        return not pending

    async def _spawn(self) -> asyncio.subprocess.Process:
        command = self._command()
        self.said_ready.clear()
        self._tail = b""
        self._born = time.monotonic()
        pipe = asyncio.subprocess.PIPE
        # A session of its own: Ctrl-C in a terminal reaches the supervisor alone, which then drains in order.
        process = await asyncio.create_subprocess_exec(
            *command.argv, stdin=pipe, stdout=pipe, stderr=pipe, pass_fds=command.fds, start_new_session=True
        )
        self._process = process
        if self._stop.is_set():
            self.signal(signal.SIGTERM)
        for pump in (self._pump_errors(process.stderr), self._pump_words(process.stdout)):
            task = asyncio.create_task(pump)
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its exit is noticed elsewhere
                process.stdin.write(command.stdin)
                await process.stdin.drain()
            process.stdin.close()
        return process

    async def _keep(self, process: asyncio.subprocess.Process) -> None:
        delay = FIRST_DELAY
        while True:
            code = await process.wait()
            if self._stop.is_set():
                return
            delay = FIRST_DELAY if time.monotonic() - self._born > STEADY else delay
            self.restarts += 1
            self._on_restart()
            log.warning("the %s ended (%s): restarted in %.1f s", self.name, _cause(code), delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), delay)
                return
            delay = min(delay * 2, LAST_DELAY)
            try:
                process = await self._spawn()
            except OSError as error:  # no memory or no descriptors just now: the loop comes back, later each time
                log.error("the %s cannot be restarted: %s", self.name, error)

    async def _pump_errors(self, stream: asyncio.StreamReader | None) -> None:
        while stream is not None and (data := await stream.read(65536)):
            self._tail = (self._tail + data)[-TAIL_BYTES:]
            if self._started:  # until then they are kept for the message of a failed start
                _echo(data)

    async def _pump_words(self, stream: asyncio.StreamReader | None) -> None:
        if stream is None:
            return
        if await stream.readline() == READY:
            self.said_ready.set()
        while data := await stream.read(65536):
            _echo(data)

    async def _drain_pumps(self) -> None:
        if self._pumps:  # bounded: a grandchild may hold the pipe open
            await asyncio.wait(set(self._pumps), timeout=1.0)


def _echo(data: bytes) -> None:
    if data:
        sys.stderr.write(data.decode(errors="replace"))
        sys.stderr.flush()


def _cause(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
