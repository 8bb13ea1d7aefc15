"""Our server with recording off, which the product has no switch for: what the bench holds `recording on` against.

Keys, episodes, injection and the reading of answers work as ever, but a call that ends leaves nothing: no line is
built, redacted, written, synced or loaded.

    python -m bench.gateway.unrecorded serve ...        as `ratchet serve ...`
    python -m bench.gateway.unrecorded worker N         a worker of it; the supervisor below starts these
"""

import dataclasses
import sys
from typing import Any


def _forget(_recorder: Any, call: Any) -> None:
    call.written = True


def worker() -> None:
    """One worker whose recorder forgets."""
    from proxy import worker
    from proxy.record import Recorder

    setattr(Recorder, "write", _forget)  # noqa: B010 (mypy and ruff disagree about an assignment here)
    worker.main()


def serve() -> None:
    """The server, with such workers."""
    import ratchet
    from proxy import supervisor

    original = supervisor.worker_command

    def command(*arguments: Any, **named: Any) -> Any:
        made = original(*arguments, **named)
        index = made.argv[-1]
        return dataclasses.replace(made, argv=[sys.executable, "-P", "-m", "bench.gateway.unrecorded", "worker", index])

    supervisor.worker_command = command
    ratchet.main()


if __name__ == "__main__":
    worker() if sys.argv[1] == "worker" else serve()
