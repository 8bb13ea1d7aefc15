"""Jobs: long work that can be watched, cancelled from elsewhere, and resumed after any death.

A job's state is its latest `job` event. While a process works on it, that process holds a lock file, so that nobody
resumes what still runs.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from collector.client import Client
from collector.errors import Conflict, RatchetError, Unavailable
from optimize.patience import patiently

REPORT_SECONDS = 2.0  # between two progress events at least
# All of them, not only the latest state: a progress event written at the same moment must not hide a cancellation.
CANCELLATIONS = "select job_id, ts_ns from jobs where status = 'cancelled' order by ts_ns desc"


class JobCancelled(RatchetError):
    """Somebody cancelled the job; what was paid is kept."""

    code = "cancelled"


class Told(Protocol):
    """How a job ended."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe."""


Ended = TypeVar("Ended", bound=Told)


def new_job_id() -> str:
    """ "job-" and 12 hex digits."""
    return f"job-{secrets.token_hex(6)}"


def decoded(job: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The `spec`, `progress` or `result` of a job, {} where there is none."""
    value = job.get(name)
    if isinstance(value, str):
        value = json.loads(value)
    return dict(value) if isinstance(value, Mapping) else {}


class Job:
    """One job of this process, writing its own state."""

    def __init__(self, client: Client, job_id: str, kind: str, slot: str | None, spec: Mapping[str, Any]) -> None:
        self.job_id = job_id
        self.spec = dict(spec)
        self.progress: dict[str, Any] = {}
        self._client = client
        self._kind = kind
        self._slot = slot
        self._reported = 0.0
        self._started_ns = time.time_ns()

    async def start(self) -> None:
        """Say that the job runs (again)."""
        await self._write("running")

    async def report(self, **progress: Any) -> None:
        """Say how far it is, at most every REPORT_SECONDS. Raises JobCancelled once somebody cancelled it."""
        self.progress.update(progress)
        if time.monotonic() - self._reported < REPORT_SECONDS:
            return
        rows = (await patiently(lambda: self._client.query(CANCELLATIONS)))["rows"]
        if any(job_id == self.job_id and ts_ns > self._started_ns for job_id, ts_ns in rows):
            raise JobCancelled(f"{self.job_id} was cancelled")
        await self._write("running")

    async def finish(self, status: str, result: Mapping[str, Any] | None = None) -> None:
        """Say how it ended: done, failed or cancelled."""
        await self._write(status, result)

    async def run(self, steps: Callable[[], Awaitable[Ended]]) -> Ended:
        """Do the steps and return their result, with the job's state kept true however they end."""
        await self.start()
        try:
            result = await steps()
        except (JobCancelled, asyncio.CancelledError):
            await self._ended("cancelled")
            raise
        except Exception as error:  # boundary: whatever it was, the job's state must not stay "running"
            await self._ended("failed", {"error": error.message if isinstance(error, RatchetError) else repr(error)})
            raise
        await self.finish("done", result.as_dict())
        return result

    async def _ended(self, status: str, result: Mapping[str, Any] | None = None) -> None:
        with contextlib.suppress(Unavailable):  # then the lock alone tells that nobody works on it
            await self.finish(status, result)

    async def _write(self, status: str, result: Mapping[str, Any] | None = None) -> None:
        event = {
            "event": "job",
            "job_id": self.job_id,
            "kind": self._kind,
            "slot": self._slot,
            "status": status,
            "spec": json.dumps(self.spec),
            "progress": json.dumps(self.progress),
            "result": None if result is None else json.dumps(result),
            "ts_ns": time.time_ns(),
        }
        await patiently(lambda: self._client.events([event]))
        self._reported = time.monotonic()


def cancel(client: Client, job_id: str) -> None:
    """Cancel a running job, wherever it runs: it stops after the rollouts under way. Raises NotFound, Conflict."""
    job = client.job(job_id)
    if job["status"] != "running":
        raise Conflict(f"{job_id} is {job['status']}, not running")
    names = ("job_id", "kind", "slot")
    texts = {name: job[name] if isinstance(job[name], str) else json.dumps(job[name]) for name in ("spec", "progress")}
    event = {"event": "job", **{name: job[name] for name in names}, **texts, "result": None}
    client.events([{**event, "status": "cancelled", "ts_ns": time.time_ns()}])
    client.flush()


class JobLock:
    """A context: this process, and no other, works on the job. The kernel releases it when the process dies."""

    def __init__(self, data_dir: Path, job_id: str) -> None:
        self._path = data_dir / "jobs" / f"{job_id}.lock"
        self._job = job_id

    def __enter__(self) -> "JobLock":
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise Conflict(f"{self._job} is being worked on by another process") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
