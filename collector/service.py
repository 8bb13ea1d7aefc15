"""The collector itself, without HTTP: journal, loader, store and registry behind one object.

`api.py` serves it, `client.Local` uses it in place. Every method may be called from any thread.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict
from typing import Any

import orjson

from collector import (
    adapters,
    bodies,
    engines,
    episodes,
    journal,
    keys,
    otel,
    otlp_out,
    redact,
    registry,
    results,
    rewards,
    transfer,
)
from collector import discover as discovery
from collector.errors import BadInput, Conflict, NotFound, Unavailable
from collector.inbox import Inbox
from collector.loader import Loader
from collector.loading import Loading
from collector.lock import DirectoryLock
from collector.model import Version
from collector.readers import Readers
from collector.settings import Settings
from collector.stores import keeper_of, open_store

DATABASE = "ratchet.duckdb"

SNAPSHOT = "deployments.json"
MAX_PAGE = 500
MAX_SAMPLE = 20_000
_SAMPLE_CHARACTERS = 64 << 20
_DISK_SECONDS = 30.0
_FLUSH_SECONDS = 5.0
_ENGINES_SECONDS = 2.0

log = logging.getLogger(__name__)


class Collector:
    """The running collector of one data directory. Raises Conflict when another one holds it.

    With `background`, a thread loads sealed segments as they appear; without, only `flush` and `close` load.
    """

    def __init__(self, settings: Settings, *, background: bool = True) -> None:
        self.settings = settings
        self.data_dir = settings.store.data_dir
        self.started_ns = time.time_ns()
        self._lock = threading.RLock()  # the registry: check, journal, apply as one step
        self._stop = threading.Event()
        self._listeners: list[Callable[[], object]] = []
        self._proposals: dict[str, discovery.Proposal] = {}  # of the last look, so that one of them can be adopted
        self._closed = False
        with contextlib.ExitStack() as undo:
            lock = DirectoryLock(self.data_dir)
            undo.callback(lock.release)
            directory = self.data_dir / journal.FOLDER
            directory.mkdir(mode=0o700, exist_ok=True)
            self.store = open_store(self.data_dir / DATABASE, directory, settings.store, settings.rewards.weights)
            undo.callback(self.store.close)
            self.loader = Loader(self.store, directory)
            self._loading = Loading(self.loader, self.store)
            self.inbox = Inbox(directory, self.loader)
            self.keeper = keeper_of(self.store, self.loader, self._loading.lock, settings.store, directory)
            self.readers = Readers()
            undo.callback(self.readers.close)
            self._loading.catch_up()
            self.registry = registry.Registry(self.store.registry_events())
            self.journal = journal.Journal(directory, "collector")
            undo.callback(self.journal.close)
            self._ensure_slots()
            self._undo = undo.pop_all()
        self._engines = engines.Engines([engines.HttpEngine(entry) for entry in settings.engines])
        self._held: dict[tuple[str, int], float] = {}  # adapter versions on trial, until when
        self._undo.callback(self._engines.close)
        if background and settings.engines:
            threading.Thread(target=self._keep_engines, name="engines", daemon=True).start()
        self._otlp = otlp_out.begin(settings.export.otlp, self.data_dir, self.store, self.loader.is_loaded)
        if self._otlp is not None and background:
            self._undo.callback(self._otlp.close)
            self._otlp.start()
        if background:
            self._loading.start()
            threading.Thread(target=self.keeper.run, args=(self._stop,), name="keeper", daemon=True).start()

    def close(self) -> None:
        """Seal, load what is left, write a checkpoint, release the directory. Twice is once."""
        if self._closed:
            return
        self._closed = True
        self._stop.set()
        self._loading.stop()
        self.journal.close()
        self._loading.catch_up()
        self._undo.close()

    # Loading

    def flush(self) -> dict[str, int]:
        """Wait (<= 5 s) until what any process had journalled before the call is loaded: {"loaded", "pending"}."""
        self.journal.seal()
        wanted = self._waiting()
        total = len(wanted)
        deadline = time.monotonic() + _FLUSH_SECONDS
        while wanted and time.monotonic() < deadline:
            self._loading.catch_up()
            wanted = {name for name in wanted & self._waiting() if not self.loader.is_loaded(name)}
            if wanted and self._stop.wait(0.02):
                break
        return {"loaded": total - len(wanted), "pending": len(wanted)}

    def _waiting(self) -> set[str]:
        """Names of segments with lines that are not loaded, sealed or not."""
        found: set[str] = set()
        with os.scandir(self.data_dir / journal.FOLDER) as entries:
            for entry in entries:
                name, dot, suffix = entry.name.rpartition(".")
                if dot + suffix in (journal.OPEN, journal.SEALED) and not self.loader.is_loaded(name):
                    found.add(name)
        return found

    # Registry

    def on_change(self, listener: Callable[[], object]) -> Callable[[], None]:
        """Call `listener` after each change of the registry, in the thread that made it; returns how to stop that."""
        self._listeners.append(listener)

        def stop() -> None:
            with contextlib.suppress(ValueError):
                self._listeners.remove(listener)

        return stop

    def snapshot(self) -> dict[str, Any]:
        """The registry as proxies need it."""
        with self._lock:
            return self.registry.snapshot()

    def slots(self) -> list[dict[str, Any]]:
        """Every slot with what is live."""
        with self._lock:
            return self.registry.slots()

    def versions(self, slot: str) -> list[dict[str, Any]]:
        """The versions of a slot. Raises NotFound."""
        with self._lock:
            return self.registry.versions(slot)

    def version(self, slot: str, version: int) -> dict[str, Any]:
        """One version. Raises NotFound."""
        with self._lock:
            return self.registry.version(slot, version)

    def candidate(self, slot: str, candidate: str) -> str:
        """The template of a candidate. Raises NotFound."""
        with self._lock:
            return self.registry.candidate(slot, candidate)

    def deployments(self, slot: str | None = None) -> list[dict[str, Any]]:
        """The audit log, ascending."""
        with self._lock:
            return self.registry.log(slot)

    def add_version(self, slot: str, body: bodies.VersionBody) -> dict[str, Any]:
        """Register a version: {"slot", "version", "hash"}, once on disk. Raises BadInput, Conflict, Unavailable."""
        version = Version(
            slot=slot, version=0, hash=self._hash(body), created_ns=time.time_ns(), **body.model_dump(mode="python")
        )
        with self._lock:
            number, events = self.registry.add_version(version)
            self._commit(events)
        return {"slot": slot, "version": number, "hash": version.hash}

    def _hash(self, body: bodies.VersionBody) -> str:
        if body.kind == "prompt":
            if body.path is not None or body.base_model is not None:
                raise BadInput("path: belongs to adapter versions", param="path" if body.path else "base_model")
            return registry.template_hash(body.template or "")
        if body.template is not None:
            raise BadInput("template: belongs to prompt versions", param="template")
        if not body.path or not body.base_model:
            raise BadInput("an adapter version needs `base_model` and `path`", param="path")
        return adapters.content_hash(body.path, body.base_model, self.data_dir / "adapters")

    def add_candidate(self, slot: str, template: str) -> str:
        """Register a prompt under search; returns its id once on disk."""
        with self._lock:
            candidate, events = self.registry.add_candidate(slot, template, time.time_ns())
            self._commit(events)
        return candidate

    def promote(self, slot: str, body: bodies.PromoteBody) -> int:
        """Deploy; returns the revision once on disk. Raises NotFound, BadInput, Conflict, Unavailable; and EngineFailed
        when an engine can't serve an adapter: then nothing is deployed."""
        self._ready(slot, body.version)
        with self._lock:
            events = self.registry.promote(
                slot,
                body.version,
                body.traffic,
                time.time_ns(),
                evidence=body.evidence,
                job_id=body.job_id,
                note=body.note,
            )
            self._commit(events)
            return self.registry.revision

    def rollback(self, slot: str, body: bodies.DecisionBody) -> int:
        """Back to the arms before the last promote; returns the revision once on disk."""
        with self._lock:
            events = self.registry.rollback(
                slot, time.time_ns(), evidence=body.evidence, job_id=body.job_id, note=body.note
            )
            self._commit(events)
            return self.registry.revision

    def hold(self, slot: str, body: bodies.HoldBody) -> str:
        """Have engines serve an adapter version without traffic, so that pinned calls can try it; its name there.

        Raises NotFound, BadInput (a prompt, or no engine has its base model) and EngineFailed.
        """
        with self._lock:
            version = self.registry.version(slot, body.version)
        if version["kind"] != "adapter":
            raise BadInput(f"slot {slot} holds prompts: only adapters are served by engines", param="slot")
        base = version["base_model"]
        if not self._engines.serving(base):
            raise BadInput(
                f"no engine of the base model {base} is configured: see `engines` in the config", param="slot"
            )
        self._held[slot, body.version] = time.monotonic() + body.seconds
        self._ready(slot, body.version)
        return adapters.served_name(slot, body.version, version["hash"])

    def _ready(self, slot: str, number: int) -> None:
        """An adapter is served by its engines before any call is routed to it."""
        with self._lock:
            version = self.registry.version(slot, number)
        if version["kind"] == "adapter":
            self._engines.ready(self._served(slot, number, version["hash"], version["base_model"], version["path"]))

    def _served(self, slot: str, number: int, content: str, base_model: str, path: str) -> engines.Served:
        name = adapters.served_name(slot, number, content)
        return engines.Served(base_model, name, (self.data_dir / "adapters" / path).resolve())

    def _settle(self) -> None:
        """Have the engines serve what episodes may use, and nothing older."""
        drain = max(entry.drain_seconds for entry in self.settings.engines)
        with self._lock:
            needed, known = self.registry.adapters(time.time_ns() - int(drain * 1e9)), self.registry.adapters()
        held = {key for key, until in list(self._held.items()) if until > time.monotonic()}
        needed += [one for one in known if (one.slot, one.version) in held and one not in needed]
        keep, every = (
            [self._served(one.slot, one.version, one.hash, one.base_model or "", one.path or "") for one in versions]
            for versions in (needed, known)
        )
        self._engines.settle(keep, [version.name for version in every])

    def _keep_engines(self) -> None:
        while not self._stop.wait(_ENGINES_SECONDS):
            try:
                self._settle()
            except Exception:  # the boundary of this thread: it must outlive whatever an engine answers
                log.exception("the engines could not be looked after; trying again")

    # Keys

    def keys(self) -> dict[str, Any]:
        """{"keys": [...], "required"}: every key without its digest, and whether keys are asked for."""
        with self._lock:
            return {"keys": self.registry.keys.listed(), "required": self.registry.keys.any}

    def create_key(self, body: bodies.KeyBody) -> dict[str, Any]:
        """A new key with its secret, which nothing keeps, once on disk. Raises BadInput, Conflict, Unavailable."""
        with self._lock:
            first = not self.registry.keys.any
            secret, key, events = self.registry.keys.create(body.name, tuple(body.scopes), body.limits, time.time_ns())
            self._commit(events)
        return {**keys.shown(key), "key": secret, "first": first}

    def revoke_key(self, key: str) -> dict[str, Any]:
        """The key of that id or name, revoked, once on disk. Raises NotFound, Unavailable."""
        with self._lock:
            found, events = self.registry.keys.revoke(key, time.time_ns())
            self._commit(events)
            return keys.shown(self.registry.keys.get(found.key_id))

    def _commit(self, events: list[registry.Event]) -> None:
        """Journal, wait for the disk, only then apply, publish and tell."""
        before = self.registry.serial
        futures = [self.journal.append_durable(event, fields) for event, fields in events]
        try:
            for (event, fields), future in zip(events, futures, strict=True):
                _await([future])
                self.registry.apply(event, fields)
        finally:  # also when a later event failed: what is on disk is so
            if self.registry.serial != before:
                self._publish()
                for listener in list(self._listeners):
                    listener()

    def _publish(self) -> None:
        """Leave the snapshot in a file, from which a worker starts when the collector is down."""
        path = self.data_dir / SNAPSHOT
        temporary = path.with_name(f".{SNAPSHOT}.tmp")
        try:
            temporary.write_bytes(orjson.dumps(self.registry.snapshot()))
            temporary.chmod(0o600)
            temporary.replace(path)
        except OSError as error:  # a copy for convenience: the journal has the truth
            log.error("cannot write %s: %s", path, error)

    def _ensure_slots(self) -> None:
        """Prompts of the configuration become versions; one that changed there becomes a further version, not live."""
        with self._lock:
            self._commit(self.registry.missing_initial(time.time_ns()))
            self._publish()
        for name, slot in self.settings.slots.items():
            match = slot.match.model_dump(exclude_none=True)
            self.add_version(
                name, bodies.VersionBody(template=slot.template, match=match, note="from the configuration")
            )

    # Discovery

    def discover(self, sample: int = 4_000, least_calls: int = 1) -> dict[str, Any]:
        """Templates of the prompts that no slot knows, mined from the newest `sample` such calls: {"proposals",
        "sampled", "calls"}, where `calls` counts all of them. Raises BadInput."""
        if not 1 <= sample <= MAX_SAMPLE:
            raise BadInput(f"sample: must lie between 1 and {MAX_SAMPLE}", param="sample")
        rows = self._loading.fresh().unknown_calls(sample, _SAMPLE_CHARACTERS)
        parsed = [results.parsed(row, ("input_messages",)) for row in rows]
        with self._lock:
            known = self.registry.templates()
        proposals = discovery.propose(discovery.read(parsed), known, least_calls)
        self._proposals = {one.proposal: one for one in proposals}
        return {
            "proposals": [asdict(one) for one in proposals],
            "sampled": len(rows),
            "calls": self.store.stats()["unknown_prompts"],
        }

    def adopt(self, slot: str, body: bodies.AdoptBody) -> dict[str, Any]:
        """Make a slot whose version 1, live at once, is a proposal's template or one that is given. Raises NotFound,
        BadInput, Conflict where the slot is there already."""
        registry.check_slot_name(slot)
        with self._lock:
            if any(one["slot"] == slot for one in self.registry.slots()):
                raise Conflict(
                    f"slot {slot} is there already; POST /api/slots/{slot}/versions adds to it", param="slot"
                )
            template, match = body.template, {}
            if body.proposal is not None:
                proposal = self._proposal(body.proposal)
                template = proposal.template
                match = {"role": "user"} if proposal.role == "user" else {}
            return self.add_version(slot, bodies.VersionBody(template=template, match=match, note=body.note))

    def _proposal(self, ident: str) -> discovery.Proposal:
        if ident not in self._proposals:
            self.discover()
        if ident not in self._proposals:
            raise NotFound(
                f"no proposal {ident}: what is proposed follows the traffic; look at `ratchet slots discover` again",
                param="proposal",
            )
        return self._proposals[ident]

    # Writing

    def reward(self, body: Any) -> dict[str, Any] | list[dict[str, Any]]:
        """POST /reward: ids once on disk. Raises BadInput that names the field, Unavailable."""
        parsed = rewards.parse(body, time.time_ns())
        _await([self.journal.append_durable("reward", reward) for reward in parsed])
        ids = [{"reward_id": reward.reward_id} for reward in parsed]
        return ids if isinstance(body, list) else ids[0]

    def events(self, body: Any) -> int:
        """Journal `job` and `evaluation` events; returns how many, once on disk. Raises BadInput, Unavailable.

        Secrets in an agent's answer are masked; a job's spec has to stay as it is, so that the job can be resumed.
        """
        parsed = bodies.events(body)
        lines = [(one.event, one.model_dump(exclude={"event"})) for one in parsed]
        for _, fields in lines:
            if "answer" in fields:
                fields["answer"], _ = redact.text(fields["answer"], self.settings.store.redaction.emails)
        _await([self.journal.append_durable(event, fields) for event, fields in lines])
        return len(parsed)

    def write(self, lines: Sequence[tuple[str, Any]]) -> None:
        """Journal events that are checked already; returns once they are on disk. Raises Unavailable."""
        _await([self.journal.append_durable(event, fields) for event, fields in lines])

    def import_rows(self, body: Any) -> dict[str, int]:
        """Rows of another store, those that are new: {"spans", "rewards", "known"}. Raises BadInput, Unavailable."""
        return transfer.accept(self, body)

    # Reading

    def export(self, asked: bodies.ExportBody) -> dict[str, Any]:
        """Whole episodes: {"episodes": [{"episode_id", "reward", "spans", "echoes", "rewards"}], "next"}."""
        self._loading.fresh()
        return transfer.page(self, asked)

    def episodes(self, limit: int = 50, cursor: str | None = None, **filters: Any) -> dict[str, Any]:
        """{"episodes": [...], "next"}, newest first. Filters: slot, version, min_reward, max_reward, status."""
        names = ("slot", "version", "min_reward", "max_reward", "status")
        rows, following = _page(self._loading.fresh().episodes, "episode_id", limit, cursor, names, filters)
        for row in rows:
            row["status"] = "error" if row["errors"] else "ok"
        return {"episodes": rows, "next": following}

    def spans(self, limit: int = 50, cursor: str | None = None, **filters: Any) -> dict[str, Any]:
        """{"spans": [...], "next"}, newest first. Filters: episode_id, slot, version, status."""
        names = ("episode_id", "slot", "version", "status")
        rows, following = _page(self._loading.fresh().spans, "span_id", limit, cursor, names, filters)
        return {"spans": rows, "next": following}

    def episode(self, episode_id: str) -> dict[str, Any]:
        """One episode. Raises NotFound when neither a call nor a reward names it."""
        spans, judged = self._loading.fresh().episode(episode_id)
        if not spans and not judged:
            raise NotFound(f"no episode {episode_id!r}", param="episode_id")
        echoes = self.store.echoes(episode_id)
        weights = self.settings.rewards.weights
        return episodes.to_json(episodes.build(episode_id, spans, judged, weights, echoes, time.time_ns()))

    def episode_otlp(self, episode_id: str) -> dict[str, Any]:
        """The calls of an episode in OTLP's JSON encoding (an ExportTraceServiceRequest). Raises NotFound."""
        spans, _ = self._loading.fresh().episode(episode_id)
        if not spans:
            raise NotFound(f"no episode {episode_id!r}", param="episode_id")
        return otel.request(sorted(spans, key=lambda row: (row["start_ns"], row["span_id"])))

    def unmatched_rewards(self, limit: int = 100) -> list[dict[str, Any]]:
        """Rewards whose target has not been seen (yet), newest first."""
        return self._loading.fresh().unmatched_rewards(limit)

    def query(self, sql: str, limit: int = 10_000, page: int | None = None) -> results.Table:
        """One SELECT. Raises QueryError."""
        return self._loading.fresh().query(sql, limit, page)

    def more(self, cursor: str, page: int | None = None) -> results.Table:
        """The next page of a query. Raises NotFound, QueryError."""
        return self.store.more(cursor, page)

    def compact(self, days: int = 1, dry_run: bool = False) -> dict[str, Any]:
        """Move old days to the archive. Raises BadInput, Unavailable."""
        return self.keeper.compact(days, dry_run)

    def retain(self, days: int, dry_run: bool = False) -> dict[str, Any]:
        """Delete the spans of older days. Raises BadInput, Unavailable."""
        return self.keeper.retain(days, dry_run)

    def jobs(self) -> list[dict[str, Any]]:
        """The latest state of every job, newest first."""
        return [_job(row) for row in self._loading.fresh().jobs()]

    def job(self, job_id: str) -> dict[str, Any]:
        """The latest state of one job. Raises NotFound."""
        found = self._loading.fresh().jobs(job_id)
        if not found:
            raise NotFound(f"no job {job_id!r}", param="job_id")
        return _job(found[0])

    def evaluations(self, job_id: str | None = None) -> list[dict[str, Any]]:
        """Paid rollouts."""
        return self._loading.fresh().evaluations(job_id)

    def identity(self) -> dict[str, Any]:
        """Whose collector this is, without a look at the store: {"data_dir", "started_ns", "revision"}."""
        return {
            "data_dir": str(self.data_dir.resolve()),
            "started_ns": self.started_ns,
            "revision": self.registry.revision,
        }

    def stats(self) -> dict[str, Any]:
        """What was written, loaded, lost, and how far behind the store is."""
        with self._lock:
            slots = self.registry.slots()
        return {
            **self._loading.fresh().stats(),
            **self.identity(),
            "slots": len(slots),
            "versions": sum(slot["versions"] for slot in slots),
            "rebuilt": self.store.rebuilt,
            "journal": self.journal.counters,
            "loader": asdict(self.loader.counters),
            "engines": self._engines.state(),
            "otlp": None if self._otlp is None else self._otlp.stats(),
            "inbox": self.inbox.stats(),
        }


def _job(row: dict[str, Any]) -> dict[str, Any]:
    """A job as readers want it: what the journal carries as JSON strings as values. What is no JSON stays text."""
    shown = dict(row)
    for name in ("spec", "progress", "result"):
        with contextlib.suppress(orjson.JSONDecodeError, TypeError):
            shown[name] = orjson.loads(row[name])
    return shown


def _await(futures: "list[Future[None]]") -> None:
    for future in futures:
        try:
            future.result(_DISK_SECONDS)
        except FutureTimeout:
            raise Unavailable(f"the disk did not answer within {_DISK_SECONDS:g} s") from None


def _page(
    read: Callable[..., list[dict[str, Any]]],
    key: str,
    limit: int,
    cursor: str | None,
    names: tuple[str, ...],
    filters: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], str | None]:
    """One page and the cursor of the next. Raises BadInput for unknown filters, a bad limit or cursor."""
    for name in filters:
        if name not in names:
            raise BadInput(f"{name}: unknown filter; known: {', '.join(names)}", param=name)
    if not 1 <= limit <= MAX_PAGE:
        raise BadInput(f"limit: must lie between 1 and {MAX_PAGE}", param="limit")
    start, _, identifier = (cursor or "").partition(":")
    if cursor and not (start.isdigit() and len(start) <= 19 and identifier):
        raise BadInput("cursor: give `next` of the page before", param="cursor")
    where = {name: filters.get(name) for name in names}
    before = {"before_ns": int(start) if start else None, "before_id": identifier or None}
    rows = read(**where, **before, limit=limit + 1)
    page = rows[:limit]
    following = f"{page[-1]['start_ns']}:{page[-1][key]}" if len(rows) > limit else None
    return page, following
