"""When segments are loaded: by a thread, much at a time while nobody looks, and at once for whoever reads."""

import logging
import threading
import time

from collector.loader import Loader
from collector.store import Store

_TICK_SECONDS = 1.0
_PATIENCE_SECONDS = 1.0  # of a reader, while a batch is loaded

log = logging.getLogger(__name__)


class Loading:
    """The thread, started by `start`. Without it, only `catch_up` loads. `lock` is held by whoever loads."""

    def __init__(self, loader: Loader, store: Store) -> None:
        self.lock = threading.Lock()
        self._loader = loader
        self._store = store
        self._turn = threading.Condition()  # guards what follows
        self._asked = 0  # how often readers have asked for a batch
        self._answered = 0  # up to which of these a turn of the thread has ended since
        self._stopped = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Load from now on what is sealed."""
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after the batch that it is at."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()
        if self._thread is not None:
            self._thread.join()

    def fresh(self) -> Store:
        """The store, for a reader: with what was sealed half a second ago or earlier, unless loading takes long."""
        if self._thread is not None:
            with self._turn:
                self._asked += 1
                mine = self._asked
                self._turn.notify_all()
                self._turn.wait_for(lambda: self._answered >= mine or self._stopped, _PATIENCE_SECONDS)
        return self._store

    def catch_up(self) -> None:
        """Load all that is sealed, or was left open by the dead, now."""
        with self.lock:
            self._loader.adopt()
            self._loader.load_once()

    def _run(self) -> None:
        swept = 0.0
        while True:
            with self._turn:
                if self._asked == self._answered and not self._stopped:
                    self._turn.wait(_TICK_SECONDS)
                if self._stopped:
                    return
                asked = self._asked
            sweeps = time.monotonic() - swept >= _TICK_SECONDS
            swept = time.monotonic() if sweeps else swept
            try:
                self._look(sweeps, asked > self._answered)
            except Exception:  # the boundary of the loader thread: it must outlive whatever a disk or an engine does
                log.exception("the loader failed; it goes on")
            with self._turn:
                self._answered = asked
                self._turn.notify_all()

    def _look(self, sweeps: bool, asked: bool) -> None:
        with self.lock:
            if sweeps:
                self._loader.adopt_left()
                self._store.sweep()
            if self._loader.due(asked=asked):
                self._loader.load_once()
