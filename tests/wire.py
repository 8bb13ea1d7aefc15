"""A TCP wire between two hosts that a test can cut: connections are passed on to `target` while there is one."""

import contextlib
import socket
import threading
from collections.abc import Iterator


class Wire:
    """Listens on a port of its own for as long as the block lasts, so that what is behind it may change its own."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._target: int | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.cut_after: int | None = None  # bytes towards the target after which a connection breaks, once
        threading.Thread(target=self._accept, daemon=True).start()

    def join(self, url: str) -> None:
        """From now on, connections go to the port of `url`."""
        self._target = int(url.rpartition(":")[2])

    def cut(self) -> None:
        """Break what is open; new connections are closed at once."""
        self._target = None
        self._break()

    def _break(self) -> None:
        with self._lock:
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            target = self._target
            try:
                far = socket.create_connection(("127.0.0.1", target or 0), timeout=5) if target else None
            except OSError:
                far = None
            if far is None:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._open |= {near, far}
            for source, sink, forth in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pass, args=(source, sink, forth), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, forth: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                passed += len(data)
                if forth and self.cut_after is not None and passed > self.cut_after:
                    self.cut_after = None
                    break
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._open -= {source}
        source.close()

    def close(self) -> None:
        """End."""
        self.cut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextlib.contextmanager
def wire() -> Iterator[Wire]:
    """A wire that leads nowhere yet."""
    one = Wire()
    try:
        yield one
    finally:
        one.close()
