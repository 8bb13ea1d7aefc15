"""Sealed segments of this host's journal to a collector elsewhere, each deleted once that one has it on disk.

The journal is the buffer: while the collector is away, segments wait in it, and only their names are in memory. A
segment travels under a name that holds this host's id, so sending it again, after a crash of either side, changes
nothing. What the collector will never take is moved to `journal/refused/`, where it is counted and shown.
"""

import asyncio
import contextlib
import logging
import os
import random
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from collector import backlog, journal
from collector.backlog import REFUSED
from collector.errors import Conflict, RatchetError, told
from collector.lock import HOST_FILE
from collector.part import Part, Refused, parts

_LANES = 4  # segments under way at once: one is read and packed while the collector syncs another
_TICK_SECONDS = 0.1
_ADOPT_SECONDS = 1.0
_FIRST_WAIT = 0.25
_LONGEST_WAIT = 5.0
_LONGEST_ASKED = 60.0  # of what Retry-After may ask for
_ANSWER_SECONDS = 60.0
_SLOWEST_BYTES = 50_000  # a second, of one lane: slower than that the line counts as gone
_UNREADABLE_SECONDS = 30.0
_HOST = re.compile(r"[0-9a-z]{1,16}")  # as the collector's inbox takes it

log = logging.getLogger(__name__)


class Unsent(RatchetError):
    """The collector did not take it now: to be sent again, not before `after` seconds where it asked for that."""

    status = 503
    code = "collector_unavailable"

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


@dataclass
class Counters:
    """What was sent since the start: segments, their bytes, those bytes packed. `failures`: what is to be repeated;
    `unreadable`: segments that cannot be read now and are tried again."""

    segments: int = 0
    bytes: int = 0
    packed: int = 0
    failures: int = 0
    unreadable: int = 0
    last_error: str | None = None


def host_id(data_dir: Path) -> str:
    """Eight letters that name this data directory among all that feed a collector; made once, kept in it.

    Raises Conflict where the file holds something else: the collector would refuse every name that is made of it.
    """
    path = data_dir / HOST_FILE
    try:
        host = path.read_text(errors="replace").strip()
    except FileNotFoundError:
        return _new_host(path)
    if not _HOST.fullmatch(host):
        raise Conflict(
            f"{path} must hold 1 to 16 of 0-9 a-z, this host's id: restore it (the collector has it in the names of "
            "this host's segments, after the time), or delete it to get a new one"
        )
    return host


def _new_host(path: Path) -> str:
    """Synced before it has its name: a power cut must leave no empty id behind."""
    host = secrets.token_hex(4)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(host)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    journal.sync_directory(path.parent)
    return host


def patience(size: int) -> float:
    """Seconds in which a request of `size` bytes must be sent and answered."""
    return _ANSWER_SECONDS + size / _SLOWEST_BYTES


def sent_name(name: str, host: str) -> str:
    """The segment's name at the collector: its time first, so that all hosts' segments sort by time."""
    began, _, rest = name.partition("-")
    return f"{began}-{host}-{rest}"


class Shipper:
    """Sends what is sealed in `folder` to the collector at `url`, by `session`, which has the key."""

    def __init__(self, folder: Path, host: str, session: aiohttp.ClientSession, url: str) -> None:
        self.counters = Counters()
        self._folder = folder
        self._host = host
        self._session = session
        self._url = url
        self._wake = asyncio.Event()
        self._unreadable: dict[str, float] = {}  # name -> when to try again
        self._sending = asyncio.Lock()

    async def stats(self) -> dict[str, Any]:
        """The counters, and what waits."""
        return {**asdict(self.counters), "backlog": asdict(await asyncio.to_thread(backlog.measure, self._folder))}

    async def run(self) -> None:
        """Send for ever."""
        wait = _FIRST_WAIT
        adopted = 0.0
        while True:
            pause = _TICK_SECONDS
            try:
                if time.monotonic() - adopted >= _ADOPT_SECONDS:
                    adopted = time.monotonic()
                    await asyncio.to_thread(journal.adopt, self._folder)
                await self.send_once()
                wait = _FIRST_WAIT
            except Unsent as error:
                pause = max(wait * random.uniform(0.5, 1.0), error.after)  # noqa: S311 - so that not all hosts come at once
                wait = min(_LONGEST_WAIT, wait * 2)
                self._failed(error)
            except Exception as error:  # the boundary of this task: it must outlive whatever a disk or a network does
                pause = wait
                wait = min(_LONGEST_WAIT, wait * 2)
                self._failed(error)
                log.exception("sending the journal failed; it goes on")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)
            self._wake.clear()

    async def send_once(self) -> int:
        """Send every sealed segment, the oldest first, some at a time; returns how many. Raises Unsent."""
        async with self._sending:
            names = await asyncio.to_thread(self._sealed)
            waiting = iter(names)
            ends = await asyncio.gather(*(self._lane(waiting) for _ in range(_LANES)), return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException):
                raise end
        if names:
            self.counters.last_error = None
        return len(names)

    async def flush(self, seconds: float) -> int:
        """Send what was written before the call; how many segments are left of that after `seconds`."""
        wanted = await asyncio.to_thread(self._waiting)
        deadline = time.monotonic() + seconds
        self._wake.set()
        while wanted and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
            wanted &= await asyncio.to_thread(self._waiting)
        return len(wanted)

    async def drain(self, seconds: float) -> None:
        """Send what is left before the end, as long as the collector takes it; the rest waits for the next start."""
        with contextlib.suppress(Unsent, TimeoutError, OSError):
            async with asyncio.timeout(seconds):
                await asyncio.to_thread(journal.adopt, self._folder)
                await self.send_once()

    def _sealed(self) -> list[str]:
        now = time.monotonic()
        names = [
            name.removesuffix(journal.SEALED) for name in os.listdir(self._folder) if name.endswith(journal.SEALED)
        ]
        return sorted(name for name in names if now >= self._unreadable.get(name, 0.0))

    def _waiting(self) -> set[str]:
        names = (name.rpartition(".") for name in os.listdir(self._folder) if not name.startswith("."))
        return {name for name, dot, suffix in names if dot + suffix in (journal.OPEN, journal.SEALED)}

    async def _lane(self, names: Iterator[str]) -> None:
        for name in names:
            await self._send(name)

    async def _send(self, name: str) -> None:
        path = self._folder / (name + journal.SEALED)
        left = parts(path)
        stored = False
        try:
            while not stored and (one := await asyncio.to_thread(next, left, None)) is not None:
                stored = await self._put(name, *one)
            if not stored and path.stat().st_size:
                raise Unsent("the collector has all parts of a segment and does not say that it is stored")
            await asyncio.to_thread(path.unlink, missing_ok=True)
        except Refused as error:
            await asyncio.to_thread(self._set_aside, path)
            log.error("segment %s is refused by the collector and kept in %s/: %s", name, REFUSED, error.message)
        except OSError as error:
            log.error("segment %s cannot be read, it is tried again later: %s", name, error)
            self._unreadable[name] = time.monotonic() + _UNREADABLE_SECONDS
            self.counters.unreadable += 1
            self.counters.last_error = str(error)
        else:
            self._unreadable.pop(name, None)
            self.counters.segments += 1

    async def _put(self, name: str, part: Part, packed: bytes) -> bool:
        """Whether the whole segment is on the collector's disk now. Raises Unsent, Refused."""
        headers = {**part.headers, "content-type": "application/zstd"}
        timeout = aiohttp.ClientTimeout(total=patience(len(packed)), sock_connect=5)
        there = sent_name(name, self._host)
        url = f"{self._url}/api/segments/{there}"
        try:
            async with self._session.put(url, data=packed, headers=headers, timeout=timeout) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unsent(f"the collector does not answer ({str(error) or type(error).__name__})") from error
        if response.status not in (200, 202):
            raise _failure(response.status, body, response.headers.get("retry-after", ""))
        stored = _said(body, there)
        self.counters.bytes += part.end - part.start
        self.counters.packed += len(packed)
        return stored

    def _set_aside(self, path: Path) -> None:
        (self._folder / REFUSED).mkdir(mode=0o700, exist_ok=True)
        path.rename(self._folder / REFUSED / path.name)

    def _failed(self, error: BaseException) -> None:
        if self.counters.last_error != str(error):
            log.warning("the journal waits on this host: %s; trying again", error)
        self.counters.failures += 1
        self.counters.last_error = str(error)


def _said(body: bytes, name: str) -> bool:
    """What an answer says of this very segment: anybody may answer 200 to anything, and a segment is deleted for it."""
    try:
        answer = orjson.loads(body)
        if answer["segment"] == name:
            return answer["stored"] is True
    except (ValueError, KeyError, TypeError):
        pass
    raise Unsent("whoever answers at store.collector is no collector: it does not say what became of the segment")


def _failure(status: int, body: bytes, retry_after: str) -> RatchetError:
    """What an answer other than yes means."""
    message, code = told(body)
    message = message or body[:200].decode(errors="replace") or "no reason given"
    if status == Refused.status and code == Refused.code:
        return Refused(message)
    after = min(float(retry_after), _LONGEST_ASKED) if retry_after.isdecimal() else 0.0
    if status in (401, 403):
        return Unsent(refusal(message), after)
    return Unsent(f"the collector answered {status}: {message}", after)


def refusal(message: str) -> str:
    """What to do where the collector does not know this host's key."""
    return f"the collector refuses this host ({message}); give store.collector_key a key of its with the scope `admin`"
