"""The pipe that ties a child to its parent: end of file means that the parent has died, by whatever signal."""

import os
import signal
import threading
from collections.abc import Callable


def follow(fd: int, ended: Callable[[], None] | None = None) -> None:
    """Call `ended` (default: SIGTERM to this process, so that it ends in order) once the pipe behind `fd` is closed."""

    def watch() -> None:
        while os.read(fd, 64):
            pass
        if ended is not None:
            ended()
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
