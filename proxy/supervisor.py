"""`ratchet serve` as processes: one collector, N workers, and this supervisor, which serves nothing itself.

It binds the port, so a conflict is reported at once and a restarted worker finds its listeners' backlog intact. Every
child holds the read end of one pipe whose write end only the supervisor has: when the supervisor dies, by whatever
signal, the pipe ends and the children end with it.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

from collector.errors import BadInput, Conflict, Unavailable
from collector.settings import Server, Settings
from proxy.child import Child, Command
from proxy.files import write_atomically

log = logging.getLogger("ratchet.supervisor")

BACKLOG = 2048
DRAIN = 30.0  # seconds that running calls get after SIGTERM
OTLP_PORT = 4318
SETTLE = 20.0  # seconds that the collector gets to seal, load and checkpoint
START = 60.0  # seconds until a start is reported as slow; the proxy then serves without the collector
LOCK_WAIT = 2.0  # children of a server killed a moment ago need up to a second to end
SOCKET_PATH_LIMIT = 100  # bytes; sun_path holds 104 on macOS, 108 on Linux


@dataclass(frozen=True)
class Runtime:
    """What the children share: `directory` is private and temporary; `alive_fd` ends when the supervisor dies."""

    directory: Path
    alive_fd: int

    @property
    def collector_socket(self) -> Path:
        """Where the collector listens."""
        return self.directory / "c.sock"

    @property
    def state(self) -> Path:
        """What the supervisor counts, for `/metrics`: {"restarts": {name: n}}."""
        return self.directory / "state.json"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises Conflict when the port is taken, BadInput when the host is none of ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise BadInput(f"server.host: cannot listen on {host!r}: {error.strerror}", param="server.host") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise Conflict(
            f"cannot listen on {host} port {port}: {(error.strerror or str(error)).lower()}; "
            "stop the program that holds it, or choose another port with --port (0 picks a free one)",
            param="server.port",
        ) from None
    return listener


def also_listen(server: Server) -> socket.socket | None:
    """A second listener on the port to which OpenTelemetry's exporters send by default.

    None where it is off; where `auto` finds the port taken, that is said. Raises Conflict for a given port.
    """
    if server.otlp_port is None or (server.otlp_port == "auto" and server.port == 0):
        return None
    if server.otlp_port != "auto":
        return listen(server.host, server.otlp_port)
    try:
        return listen(server.host, OTLP_PORT)
    except Conflict:
        log.warning("port %d is taken: OTLP is received on port %d only (server.otlp_port)", OTLP_PORT, server.port)
        return None


def url_of(listener: socket.socket, host: str) -> str:
    """The URL at which this machine reaches the listener."""
    port = listener.getsockname()[1]
    if host in ("0.0.0.0", ""):
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def claim(data_dir: Path, patience: float = LOCK_WAIT) -> None:
    """Make the data directory, private to this user, and see that no other collector or command holds it.

    Raises Conflict naming the holder, Unavailable when the directory cannot be used.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(data_dir / "collector.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        reason = f"cannot use the data directory {data_dir}: {error.strerror}"
        raise Unavailable(f"{reason}; choose another with --data-dir") from None
    try:
        deadline = time.monotonic() + patience
        while not _free(lock):
            if time.monotonic() > deadline:
                raise Conflict(
                    f"another Ratchet process{_holder(data_dir)} uses the data directory {data_dir.resolve()}; "
                    "stop it, or choose another directory with --data-dir"
                )
            time.sleep(0.05)
    finally:
        os.close(lock)


def _free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(lock, fcntl.LOCK_UN)
    return True


def _holder(data_dir: Path) -> str:
    try:
        server = orjson.loads((data_dir / "server.json").read_bytes())
        return f" (pid {int(server['pid'])}, {server['url']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextlib.contextmanager
def runtime() -> Iterator[Runtime]:
    """A fresh private directory for the sockets, and the pipe that tells children that the supervisor lives."""
    root = tempfile.gettempdir()
    if len(os.fsencode(root)) > SOCKET_PATH_LIMIT - 30:
        root = "/tmp"  # noqa: S108 (mkdtemp makes a private directory in it)
    directory = Path(tempfile.mkdtemp(prefix="ratchet-", dir=root))
    alive, ours = os.pipe()
    try:
        yield Runtime(directory, alive)
    finally:
        os.close(alive)
        os.close(ours)
        shutil.rmtree(directory, ignore_errors=True)


def collector_command(settings: Settings, shared: Runtime) -> Command:
    """The collector's process. It gets what it needs, and no key."""
    config = settings.model_dump_json(exclude={"server": True, "model_list": True, "optimizer": True, "upstream": True})
    argv = [sys.executable, "-P", "-m", "collector", "--socket", str(shared.collector_socket), "--config", "-"]
    argv += ["--parent-fd", str(shared.alive_fd)]
    return Command(argv, stdin=config.encode(), fds=(shared.alive_fd,))


def worker_command(
    settings: Settings,
    shared: Runtime,
    listener: socket.socket,
    index: int,
    first: bool,
    otlp: socket.socket | None = None,
) -> Command:
    """A worker's process. Its settings hold keys, so they travel over stdin. `first`: not yet a restart."""
    spec = {
        "index": index,
        "listen_fd": listener.fileno(),
        "otlp_fd": None if otlp is None else otlp.fileno(),
        "alive_fd": shared.alive_fd,
        "runtime": str(shared.directory),
        "collector_socket": str(shared.collector_socket),
        "first": first,
        "settings": settings.model_dump(mode="json"),
    }
    return Command(
        [sys.executable, "-P", "-m", "proxy.worker", str(index)],
        stdin=orjson.dumps(spec),
        fds=(shared.alive_fd, listener.fileno(), *(() if otlp is None else (otlp.fileno(),))),
    )


class Supervisor:
    """Starts the children, keeps them alive, and ends them in order: workers drain, then the collector settles."""

    def __init__(
        self, settings: Settings, listener: socket.socket, shared: Runtime, otlp: socket.socket | None = None
    ) -> None:
        self.settings = settings
        self.url = url_of(listener, settings.server.host)
        self._listener = listener
        self._otlp = otlp
        self._shared = shared
        self._asked = asyncio.Event()
        self._forced = asyncio.Event()
        self._collector = Child(
            "collector", lambda: collector_command(settings, shared), self._collector_listens, self._count
        )
        self._workers = [self._worker(index) for index in range(settings.server.workers)]

    def ask(self) -> None:
        """End in order; asked a second time, end now."""
        (self._forced if self._asked.is_set() else self._asked).set()

    async def run(self, on_ready: Callable[[str], None]) -> int:
        """Serve until asked to end; the exit code. Raises Unavailable when a child does not start."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.ask)
        starting = asyncio.create_task(self._start())
        asked = asyncio.create_task(self._asked.wait())
        server_file = self.settings.store.data_dir / "server.json"
        try:
            await asyncio.wait({starting, asked}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                about = {"url": self.url, "pid": os.getpid(), "started_ns": time.time_ns()}
                write_atomically(server_file, orjson.dumps(about))
                on_ready(self.url)
                await asked
        finally:
            starting.cancel()
            asked.cancel()
            await asyncio.gather(starting, asked, return_exceptions=True)
            await self._end()
            server_file.unlink(missing_ok=True)
        return 130 if self._forced.is_set() else 0

    async def _start(self) -> None:
        self._count()
        # Together, because importing is most of a start; a worker waits for the collector's first snapshot by itself.
        ready = await asyncio.gather(*(child.start(START) for child in (self._collector, *self._workers)))
        if not all(ready):
            log.warning("still starting after %.0f s: the journal may be long; calls are served meanwhile", START)

    async def _end(self) -> None:
        log.info("ending: running calls get up to %.0f s; ask again (Ctrl-C) to end at once", DRAIN)
        if self._otlp is not None:
            self._otlp.close()
        self._listener.close()  # with the workers' copies closed too, new connections are refused at once
        forced = asyncio.create_task(self._forced.wait())
        orderly = asyncio.create_task(self._stop_in_order())
        await asyncio.wait({orderly, forced}, return_when=asyncio.FIRST_COMPLETED)
        if not orderly.done():
            log.warning("forced: running calls are cut off; what was acknowledged is in the journal")
            for child in (*self._workers, self._collector):
                child.signal(signal.SIGKILL)
        await orderly
        forced.cancel()

    async def _stop_in_order(self) -> None:
        await asyncio.gather(*(worker.stop(DRAIN + 2) for worker in self._workers))
        await self._collector.stop(SETTLE)

    def _worker(self, index: int) -> Child:
        def command() -> Command:
            first = child.restarts == 0
            return worker_command(self.settings, self._shared, self._listener, index, first, self._otlp)

        child = Child(f"worker{index}", command, lambda child: child.said_ready.wait(), self._count)
        return child

    async def _collector_listens(self, _child: Child) -> None:
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_unix_connection(self._shared.collector_socket)
                writer.close()
                return
            await asyncio.sleep(0.02)

    def _count(self) -> None:
        counts = {child.name: child.restarts for child in (self._collector, *self._workers)}
        with contextlib.suppress(OSError):  # a full temporary directory must not end the supervisor
            write_atomically(self._shared.state, orjson.dumps({"restarts": counts}))


def supervise(settings: Settings, on_ready: Callable[[str], None]) -> int:
    """Run the server until it is told to end; the exit code.

    Raises Conflict for a taken port or data directory, BadInput for a wrong host, Unavailable for a failed start.
    """
    with contextlib.closing(listen(settings.server.host, settings.server.port)) as listener:
        claim(settings.store.data_dir)
        with contextlib.ExitStack() as stack:
            otlp = also_listen(settings.server)
            if otlp is not None:
                stack.callback(otlp.close)
            shared = stack.enter_context(runtime())
            return asyncio.run(_run(settings, listener, shared, otlp, on_ready))


async def _run(
    settings: Settings,
    listener: socket.socket,
    shared: Runtime,
    otlp: socket.socket | None,
    on_ready: Callable[[str], None],
) -> int:
    return await Supervisor(settings, listener, shared, otlp).run(on_ready)
