"""The deployments as this worker knows them: an immutable snapshot in memory, swapped whole when a revision arrives."""

import asyncio
import itertools
import logging
import os
import tempfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from collector import template
from collector.adapters import served_name
from collector.errors import RatchetError, Unavailable

log = logging.getLogger(__name__)
Fetch = Callable[[int | None, float], Awaitable[dict[str, Any]]]
FetchCandidate = Callable[[str, str], Awaitable[str | None]]
POLL_SECONDS = 25.0
CANDIDATES_KEPT = 1024


class Choice(NamedTuple):
    """The version an episode is dealt, and the probability with which it was."""

    version: int
    propensity: float


class Known(NamedTuple):
    """A version's text, as slots are matched against it. `first` and `last` are the literal ends of its template."""

    slot: str
    version: int
    template: str
    variables: tuple[str, ...]
    first: str
    last: str


class Grant(NamedTuple):
    """A key in force: what spans call it, what it may do, and how much of it (name of the limit, value)."""

    ident: str
    name: str
    key_sha256: str
    scopes: frozenset[str]
    limits: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Slot:
    """One slot: its texts by version, where it may be matched, and its arms over time. The text of an adapter's version
    is the name by which engines serve it."""

    name: str
    texts: dict[int, str]
    model: str | None
    role: str | None
    revisions: tuple[int, ...]  # ascending
    arms: tuple[tuple[tuple[int, float], ...], ...]  # from the revision of the same index on: (version, share)

    def choose(self, episode_id: str, revision: int) -> Choice | None:
        """What the episode is dealt under `revision`: always the same, uniform over episodes. None: no arms yet."""
        at = bisect_right(self.revisions, revision) - 1
        if at < 0:
            return None
        arms = self.arms[at]
        if not arms:
            return None
        if len(arms) == 1:
            return Choice(arms[0][0], 1.0)
        total = sum(share for _, share in arms)
        dealt = int.from_bytes(sha256(f"{episode_id}\0{self.name}".encode()).digest()[:8], "big") / 2**64 * total
        for version, share in arms:
            dealt -= share
            if dealt < 0:
                return Choice(version, share / total)
        return Choice(arms[-1][0], arms[-1][1] / total)


@dataclass(frozen=True)
class Snapshot:
    """All slots at one revision. `exact` finds versions by their literal text; `templates` are those with variables,
    the most specific (most literal text) first. `slots` are those of prompts, `adapters` the others."""

    revision: int = 0
    slots: dict[str, Slot] = field(default_factory=dict)
    exact: dict[str, tuple[Known, ...]] = field(default_factory=dict)
    templates: tuple[Known, ...] = ()
    keys: tuple[Grant, ...] = ()
    keyed: bool = False  # whether a key was ever made: then they are asked for
    adapters: dict[str, Slot] = field(default_factory=dict)
    lengths: frozenset[int] = frozenset()  # of the texts in `exact`: a long text need not be hashed to be none of them
    serial: int = field(default_factory=itertools.count(1).__next__, compare=False)  # no two snapshots share one

    def assign(self, episode_id: str, revision: int) -> dict[str, Choice]:
        """The choice of each slot that has arms at `revision`."""
        chosen = {name: slot.choose(episode_id, revision) for name, slot in self.slots.items()}
        return {name: choice for name, choice in chosen.items() if choice is not None}


def build(raw: dict[str, Any]) -> Snapshot:
    """The snapshot of the registry's JSON form. Raises KeyError, TypeError or ValueError if it isn't of that form."""
    slots: dict[str, Slot] = {}
    exact: dict[str, list[Known]] = {}
    templates: list[Known] = []
    adapters: dict[str, Slot] = {}
    for name, entry in raw["slots"].items():
        if entry["kind"] != "prompt":
            adapters[name] = _adapter(name, entry, raw["log"])
            continue
        slots[name] = _slot(name, entry, raw["log"])
        for version, text in slots[name].texts.items():
            known = _known(name, version, text)
            exact.setdefault(text, []).append(known)
            if known.variables and "".join(template.split(text)[0]).strip():
                templates.append(known)
    templates.sort(key=lambda known: -sum(map(len, template.split(known.template)[0])))
    return Snapshot(
        int(raw["revision"]),
        slots,
        {text: tuple(found) for text, found in exact.items()},
        tuple(templates),
        tuple(_grant(key) for key in raw.get("keys", ())),
        bool(raw.get("keyed", False)),
        adapters,
        frozenset(map(len, exact)),
    )


def _grant(key: dict[str, Any]) -> Grant:
    limits = tuple(sorted((str(name), float(value)) for name, value in key["limits"].items()))
    return Grant(key["key_id"], key["name"], key["key_sha256"], frozenset(key["scopes"]), limits)


def _adapter(name: str, entry: dict[str, Any], audit: list[dict[str, Any]]) -> Slot:
    versions = [
        {"version": version["version"], "template": served_name(name, version["version"], version["hash"])}
        for version in entry["versions"]
    ]
    match = {"model": (entry.get("match") or {}).get("model") or entry["versions"][-1]["base_model"]}
    return _slot(name, {"versions": versions, "match": match}, audit)


def _slot(name: str, entry: dict[str, Any], audit: list[dict[str, Any]]) -> Slot:
    mine = sorted((line for line in audit if line["slot"] == name), key=lambda line: int(line["revision"]))
    match = entry.get("match") or {}
    return Slot(
        name,
        {int(version["version"]): str(version["template"]) for version in entry["versions"]},
        match.get("model"),
        match.get("role"),
        tuple(int(line["revision"]) for line in mine),
        tuple(tuple(sorted((int(v), float(share)) for v, share in line["arms"].items() if share > 0)) for line in mine),
    )


def _known(slot: str, version: int, text: str) -> Known:
    literals, _ = template.split(text)
    return Known(slot, version, text, tuple(template.variables(text)), literals[0], literals[-1])


class Versions:
    """Keeps `current` up to date by long polls. Survives outages of the collector, and boots from `cache`."""

    def __init__(self, fetch: Fetch, cache: Path, candidates: FetchCandidate | None = None) -> None:
        """`fetch(after, timeout)` gives the registry's snapshot; `candidates(slot, id)` a text under search or None."""
        self.current = Snapshot()
        self._fetch = fetch
        self._fetch_candidate = candidates
        self._cache = cache
        self._from_cache = False  # until the collector's own word, which counts even where it is older
        self._changed = asyncio.Event()
        self._candidates: OrderedDict[tuple[str, str], str] = OrderedDict()

    def load_cache(self) -> None:
        """Takes the snapshot of an earlier run, if there is a sound one."""
        try:
            self.current = build(orjson.loads(self._cache.read_bytes()))
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the cached deployments can't be used: %s", error)
            return
        self._from_cache = True

    async def watch(self) -> None:
        """Polls for ever. While the collector is away the last snapshot stays in force."""
        delay = 0.05
        after: int | None = None
        while True:
            try:
                raw = await self._fetch(after, POLL_SECONDS)
                await self._adopt(raw)
                after = self.current.revision
                delay = 0.05
                if raw["revision"] < after:  # answered at once, and so would be the next poll
                    await asyncio.sleep(1.0)
            except Exception as error:  # noqa: BLE001 - boundary: whatever one poll raises, the next one may succeed
                log.info("deployments can't be fetched, trying again in %.2f s: %s", delay, error)
                await asyncio.sleep(delay)
                delay = min(2 * delay, 1.0)

    async def refresh(self) -> None:
        """Fetches once, now: a version just registered may not have come with a revision. Raises Unavailable."""
        try:
            raw = await asyncio.wait_for(self._fetch(None, 0), 2)
        except RatchetError:
            raise
        except Exception as error:  # boundary: the transport is the caller's, its errors all mean the same here
            raise Unavailable(f"the registry can't be reached: {error}") from error
        await self._adopt(raw)

    async def reach(self, revision: int, seconds: float = 1.0) -> Snapshot:
        """A snapshot of at least `revision`, which another worker has seen already; after `seconds`, what there is."""
        if self.current.revision < revision:
            try:
                async with asyncio.timeout(seconds):
                    while self.current.revision < revision:
                        await self._changed.wait()
            except TimeoutError:
                log.warning("revision %d is awaited, serving %d", revision, self.current.revision)
        return self.current

    async def candidate(self, slot: str, candidate: str) -> str | None:
        """The text of a prompt under search; fetched once, checked against its hash. Raises Unavailable."""
        held = self._candidates.get((slot, candidate))
        if held is not None:
            self._candidates.move_to_end((slot, candidate))
            return held
        if self._fetch_candidate is None:
            return None
        text = await self._fetch_candidate(slot, candidate)
        if text is None or candidate != "c-" + sha256(text.encode()).hexdigest()[:12]:
            return None
        self._candidates[slot, candidate] = text
        if len(self._candidates) > CANDIDATES_KEPT:
            self._candidates.popitem(last=False)
        return text

    async def _adopt(self, raw: dict[str, Any]) -> None:
        snapshot = build(raw)
        older = snapshot.revision < self.current.revision and not self._from_cache
        self._from_cache = False
        if older or snapshot == self.current:
            return
        self.current = snapshot
        self._changed.set()
        self._changed = asyncio.Event()
        try:
            await asyncio.to_thread(_write, self._cache, orjson.dumps(raw))
        except OSError as error:
            log.warning("the deployments can't be cached: %s", error)


def _write(path: Path, content: bytes) -> None:
    """Atomically, so that a worker that boots meanwhile reads the old or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise
