"""One interface to the collector, with or without a server: `Remote` speaks HTTP, `Local` opens the closed store."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import quote

import orjson

from collector import bodies, settings
from collector.answers import as_dict, as_list, joined, read
from collector.errors import RatchetError, Unavailable
from collector.lock import refuse_a_store

if TYPE_CHECKING:
    import httpx

    from collector.service import Collector

R = TypeVar("R")
_PROBE_SECONDS = 1.0
_ANSWER_SECONDS = 60.0
_CARE_SECONDS = 3600.0


class Client(Protocol):
    """What the optimizer, the runner and the command line ask of the collector. Errors are `collector.errors`."""

    def slots(self) -> list[dict[str, Any]]:
        """Every slot: {"slot", "kind", "match", "versions", "live": {version: share}, "revision"}."""
        ...

    def versions(self, slot: str) -> list[dict[str, Any]]:
        """The versions of a slot, ascending, as `collector.model.Version` with "live" (its share, 0 to 1)."""
        ...

    def version(self, slot: str, version: int) -> dict[str, Any]:
        """One version. Raises NotFound."""
        ...

    def add_version(self, slot: str, **body: Any) -> dict[str, Any]:
        """Register `kind`, `template` (or `base_model`, `path`), `match`, `parent`, `note`, `job_id`, `metrics`.

        Returns {"slot", "version", "hash"}; the same content again gives the existing version.
        """
        ...

    def discover(self, sample: int = 4_000, least_calls: int = 1) -> dict[str, Any]:
        """Templates of the prompts that no slot knows: {"proposals", "sampled", "calls"}."""
        ...

    def adopt(self, slot: str, **body: Any) -> dict[str, Any]:
        """Make a slot of a `proposal` or a `template`: {"slot", "version", "hash"}. Raises NotFound, Conflict."""
        ...

    def add_candidate(self, slot: str, template: str) -> str:
        """Register a prompt under search; returns its id, "c-" and 12 hex digits."""
        ...

    def candidate(self, slot: str, candidate: str) -> str:
        """The template of a candidate. Raises NotFound."""
        ...

    def promote(
        self,
        slot: str,
        version: int,
        traffic: float = 1.0,
        evidence: str = "manual",
        job_id: str | None = None,
        note: str | None = None,
    ) -> int:
        """Deal `traffic` of the new episodes to `version`; returns the revision."""
        ...

    def hold(self, slot: str, version: int, seconds: float = 3600.0) -> str:
        """Have engines serve an adapter version for calls pinned to it; its name there. Raises EngineFailed."""
        ...

    def rollback(self, slot: str, evidence: str = "manual", job_id: str | None = None, note: str | None = None) -> int:
        """Back to the arms before the last promote; returns the revision. Raises Conflict when there are none."""
        ...

    def keys(self) -> dict[str, Any]:
        """{"keys": [...], "required"}: every key without its secret, oldest first."""
        ...

    def create_key(self, name: str, **body: Any) -> dict[str, Any]:
        """Make a key with `scopes` and `limits`: {"key_id", "key", ...}; the secret `key` is told this once."""
        ...

    def revoke_key(self, key: str) -> dict[str, Any]:
        """Revoke a key by its id or name. Raises NotFound."""
        ...

    def snapshot(self, after: int | None = None, timeout: float = 0) -> dict[str, Any]:
        """The registry; with `after`, waits up to `timeout` seconds for a later revision."""
        ...

    def episodes(self, limit: int = 50, cursor: str | None = None, **filters: Any) -> dict[str, Any]:
        """{"episodes": [...], "next": cursor | None}, newest first; filters: slot, version, min_reward, max_reward,
        status."""
        ...

    def episode(self, episode_id: str) -> dict[str, Any]:
        """One episode with its steps and rewards. Raises NotFound."""
        ...

    def spans(self, limit: int = 50, cursor: str | None = None, **filters: Any) -> dict[str, Any]:
        """{"spans": [...], "next": cursor | None}, newest first; filters: episode_id, slot, version, status."""
        ...

    def query(self, sql: str, limit: int = 10_000) -> dict[str, Any]:
        """One SELECT: {"columns": [...], "rows": [[...]], "truncated": bool}. Raises QueryError."""
        ...

    def compact(self, days: int = 1, dry_run: bool = False) -> dict[str, Any]:
        """Move the days that ended `days` days ago or earlier to the archive: {"days", "spans", "rewards", ...}."""
        ...

    def retain(self, days: int, dry_run: bool = False) -> dict[str, Any]:
        """Delete the spans, payloads and rewards of days that ended more than `days` days ago; as `compact`."""
        ...

    def episode_otlp(self, episode_id: str) -> dict[str, Any]:
        """The calls of one episode as an OTLP/JSON export. Raises NotFound."""
        ...

    def export(self, limit: int = 100, cursor: str | None = None, **filters: Any) -> dict[str, Any]:
        """{"episodes": [{"episode_id", "reward", "spans", "echoes", "rewards"}], "next"}: all rows, newest first.

        Filters: episodes (ids), slot, version, min_reward, max_reward, status, since_ns."""
        ...

    def import_rows(self, spans: Sequence[Mapping[str, Any]], rewards: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Store rows of another store, in its columns: {"spans", "rewards"} added, {"known"} were there."""
        ...

    def deployments(self, slot: str) -> list[dict[str, Any]]:
        """The audit log of a slot, ascending. Raises NotFound."""
        ...

    def jobs(self) -> list[dict[str, Any]]:
        """The latest state of every job, newest first."""
        ...

    def job(self, job_id: str) -> dict[str, Any]:
        """The latest state of one job. Raises NotFound."""
        ...

    def events(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Journal `job` and `evaluation` events; returns once they are on disk. Raises BadInput naming the event."""
        ...

    def evaluations(self, job_id: str | None = None) -> list[dict[str, Any]]:
        """Paid rollouts, in the order in which they were loaded."""
        ...

    def reward(self, body: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Any:
        """POST /reward: {"reward_id"} once on disk (a list of them for a list). Raises BadInput."""
        ...

    def flush(self) -> dict[str, Any]:
        """Wait (<= 5 s) until what was journalled before the call can be read: {"loaded", "pending"}."""
        ...

    def stats(self) -> dict[str, Any]:
        """Counters of journal, loader and store."""
        ...

    def close(self) -> None:
        """Release the connection or the store."""
        ...


class Remote:
    """A running server, over HTTP. Raises Unavailable when nothing answers there."""

    def __init__(self, url: str, api_key: str | None = None, transport: "httpx.BaseTransport | None" = None) -> None:
        import httpx  # who opens the store in place needs none

        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        # trust_env off: a proxy of the environment must not see what goes to the own machine.
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=_ANSWER_SECONDS, transport=transport, trust_env=False
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _ask(
        self,
        method: str,
        *path: str,
        body: Any = None,
        params: Mapping[str, Any] | None = None,
        patience: float = _ANSWER_SECONDS,
    ) -> Any:
        import httpx

        given = {name: value for name, value in (params or {}).items() if value is not None}
        url = "/" + "/".join(quote(part, safe="") for part in path)
        try:
            answer = self._http.request(method, url, json=body, params=given, timeout=patience)
        except httpx.ConnectError:
            raise Unavailable(f"nothing answers at {self.url}: is `ratchet serve` running?") from None
        except httpx.HTTPError as error:
            raise Unavailable(f"{self.url} did not answer: {str(error) or type(error).__name__}") from None
        return read(answer, self.url)

    def identity(self, patience: float = _ANSWER_SECONDS) -> dict[str, Any]:
        """Whose server this is: {"data_dir", "started_ns", "revision"}; answers fast whatever the store holds."""
        return as_dict(self._ask("GET", "api", "identity", patience=patience))

    def slots(self) -> list[dict[str, Any]]:
        """See Client."""
        return as_list(self._ask("GET", "api", "slots"), "slots")

    def versions(self, slot: str) -> list[dict[str, Any]]:
        """See Client."""
        return as_list(self._ask("GET", "api", "slots", slot, "versions"), "versions")

    def version(self, slot: str, version: int) -> dict[str, Any]:
        """See Client."""
        return as_dict(self._ask("GET", "api", "slots", slot, "versions", str(version)))

    def add_version(self, slot: str, **body: Any) -> dict[str, Any]:
        """See Client."""
        return as_dict(self._ask("POST", "api", "slots", slot, "versions", body=body))

    def discover(self, sample: int = 4_000, least_calls: int = 1) -> dict[str, Any]:
        """See Client."""
        params = {"sample": sample, "least_calls": least_calls}
        return as_dict(self._ask("GET", "api", "slots", "discover", params=params))

    def adopt(self, slot: str, **body: Any) -> dict[str, Any]:
        """See Client."""
        given = {name: value for name, value in body.items() if value is not None}
        return as_dict(self._ask("POST", "api", "slots", slot, "adopt", body=given))

    def add_candidate(self, slot: str, template: str) -> str:
        """See Client."""
        answer = self._ask("POST", "api", "slots", slot, "candidates", body={"template": template})
        return str(answer["candidate"])

    def candidate(self, slot: str, candidate: str) -> str:
        """See Client."""
        return str(self._ask("GET", "api", "slots", slot, "candidates", candidate)["template"])

    def promote(
        self,
        slot: str,
        version: int,
        traffic: float = 1.0,
        evidence: str = "manual",
        job_id: str | None = None,
        note: str | None = None,
    ) -> int:
        """See Client."""
        body = {"version": version, "traffic": traffic, "evidence": evidence, "job_id": job_id, "note": note}
        return int(self._ask("POST", "api", "slots", slot, "promote", body=body)["revision"])

    def hold(self, slot: str, version: int, seconds: float = 3600.0) -> str:
        """See Client."""
        body = {"version": version, "seconds": seconds}
        return str(self._ask("POST", "api", "slots", slot, "hold", body=body)["served"])

    def rollback(self, slot: str, evidence: str = "manual", job_id: str | None = None, note: str | None = None) -> int:
        """See Client."""
        body = {"evidence": evidence, "job_id": job_id, "note": note}
        return int(self._ask("POST", "api", "slots", slot, "rollback", body=body)["revision"])

    def keys(self) -> dict[str, Any]:
        """See Client."""
        return as_dict(self._ask("GET", "api", "keys"))

    def create_key(self, name: str, **body: Any) -> dict[str, Any]:
        """See Client."""
        return as_dict(self._ask("POST", "api", "keys", body={"name": name, **body}))

    def revoke_key(self, key: str) -> dict[str, Any]:
        """See Client."""
        return as_dict(self._ask("DELETE", "api", "keys", key))

    def snapshot(self, after: int | None = None, timeout: float = 0) -> dict[str, Any]:
        """See Client."""
        params = {"after": after, "timeout": timeout}
        return as_dict(self._ask("GET", "api", "deployments", params=params, patience=timeout + _ANSWER_SECONDS))

    def episodes(self, limit: int = 50, cursor: str | None = None, **filters: Any) -> dict[str, Any]:
        """See Client."""
        return as_dict(self._ask("GET", "api", "episodes", params={"limit": limit, "cursor": cursor, **filters}))

    def episode(self, episode_id: str) -> dict[str, Any]:
        """See Client."""
        return as_dict(self._ask("GET", "api", "episodes", episode_id))

    def spans(self, limit: int = 50, cursor: str | None = None, **filters: Any) -> dict[str, Any]:
        """See Client."""
        return as_dict(self._ask("GET", "api", "spans", params={"limit": limit, "cursor": cursor, **filters}))

    def query(self, sql: str, limit: int = 10_000) -> dict[str, Any]:
        """See Client."""
        first = as_dict(self._ask("POST", "api", "query", body={"sql": sql, "limit": limit}))
        return joined(first, lambda cursor: as_dict(self._ask("POST", "api", "query", body={"cursor": cursor})))

    def compact(self, days: int = 1, dry_run: bool = False) -> dict[str, Any]:
        """See Client."""
        return self._care("compact", {"days": days, "dry_run": dry_run})

    def retain(self, days: int, dry_run: bool = False) -> dict[str, Any]:
        """See Client."""
        return self._care("retain", {"days": days, "dry_run": dry_run})

    def _care(self, what: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return as_dict(self._ask("POST", "api", "store", what, body=body, patience=_CARE_SECONDS))

    def episode_otlp(self, episode_id: str) -> dict[str, Any]:
        """See Client."""
        return as_dict(self._ask("GET", "api", "episodes", episode_id, "otlp"))

    def export(self, limit: int = 100, cursor: str | None = None, **filters: Any) -> dict[str, Any]:
        """See Client."""
        given = {name: value for name, value in filters.items() if value is not None}
        return as_dict(self._ask("POST", "api", "export", body={"limit": limit, "cursor": cursor, **given}))

    def import_rows(self, spans: Sequence[Mapping[str, Any]], rewards: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """See Client."""
        return as_dict(self._ask("POST", "api", "import", body={"spans": list(spans), "rewards": list(rewards)}))

    def deployments(self, slot: str) -> list[dict[str, Any]]:
        """See Client."""
        return as_list(self._ask("GET", "api", "slots", slot, "deployments"), "deployments")

    def jobs(self) -> list[dict[str, Any]]:
        """See Client."""
        return as_list(self._ask("GET", "api", "jobs"), "jobs")

    def job(self, job_id: str) -> dict[str, Any]:
        """See Client."""
        return as_dict(self._ask("GET", "api", "jobs", job_id))

    def events(self, events: Sequence[Mapping[str, Any]]) -> None:
        """See Client."""
        self._ask("POST", "api", "events", body=list(events))

    def evaluations(self, job_id: str | None = None) -> list[dict[str, Any]]:
        """See Client."""
        return as_list(self._ask("GET", "api", "evaluations", params={"job_id": job_id}), "evaluations")

    def reward(self, body: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Any:
        """See Client."""
        return self._ask("POST", "reward", body=body if isinstance(body, Mapping) else list(body))

    def flush(self) -> dict[str, Any]:
        """See Client."""
        return as_dict(self._ask("POST", "api", "flush"))

    def stats(self) -> dict[str, Any]:
        """See Client."""
        return as_dict(self._ask("GET", "api", "stats"))


class Local:
    """The closed store, opened in place under its lock: what was written before a call is read by it.

    Raises Conflict when a server has the data directory.
    """

    def __init__(self, data_dir: str | Path | None = None, config: settings.Settings | None = None) -> None:
        config = config or settings.load(flags={"store.data_dir": None if data_dir is None else str(data_dir)})
        if data_dir is not None:
            store = config.store.model_copy(update={"data_dir": Path(data_dir)})
            config = config.model_copy(update={"store": store})
        refuse_a_store(config.store.data_dir)
        # Imported here: the command line mostly speaks to a server, and starts faster without DuckDB.
        from collector.service import Collector

        self.collector = Collector(config, background=False)

    def close(self) -> None:
        """Load what is left and release the directory."""
        self.collector.close()

    def _read(self, ask: "Callable[[Collector], R]") -> R:
        self.collector.flush()
        return ask(self.collector)

    def slots(self) -> list[dict[str, Any]]:
        """See Client."""
        return self.collector.slots()

    def versions(self, slot: str) -> list[dict[str, Any]]:
        """See Client."""
        return self.collector.versions(slot)

    def version(self, slot: str, version: int) -> dict[str, Any]:
        """See Client."""
        return self.collector.version(slot, version)

    def add_version(self, slot: str, **body: Any) -> dict[str, Any]:
        """See Client."""
        return self.collector.add_version(slot, bodies.check(bodies.VersionBody, body))

    def discover(self, sample: int = 4_000, least_calls: int = 1) -> dict[str, Any]:
        """See Client."""
        return self._read(lambda collector: collector.discover(sample, least_calls))

    def adopt(self, slot: str, **body: Any) -> dict[str, Any]:
        """See Client."""
        self.collector.flush()
        return self.collector.adopt(slot, bodies.check(bodies.AdoptBody, body))

    def add_candidate(self, slot: str, template: str) -> str:
        """See Client."""
        return self.collector.add_candidate(slot, bodies.check(bodies.CandidateBody, {"template": template}).template)

    def candidate(self, slot: str, candidate: str) -> str:
        """See Client."""
        return self.collector.candidate(slot, candidate)

    def promote(
        self,
        slot: str,
        version: int,
        traffic: float = 1.0,
        evidence: str = "manual",
        job_id: str | None = None,
        note: str | None = None,
    ) -> int:
        """See Client."""
        body = {"version": version, "traffic": traffic, "evidence": evidence, "job_id": job_id, "note": note}
        return self.collector.promote(slot, bodies.check(bodies.PromoteBody, body))

    def hold(self, slot: str, version: int, seconds: float = 3600.0) -> str:
        """See Client."""
        return self.collector.hold(slot, bodies.check(bodies.HoldBody, {"version": version, "seconds": seconds}))

    def rollback(self, slot: str, evidence: str = "manual", job_id: str | None = None, note: str | None = None) -> int:
        """See Client."""
        body = {"evidence": evidence, "job_id": job_id, "note": note}
        return self.collector.rollback(slot, bodies.check(bodies.DecisionBody, body))

    def keys(self) -> dict[str, Any]:
        """See Client."""
        return self.collector.keys()

    def create_key(self, name: str, **body: Any) -> dict[str, Any]:
        """See Client."""
        return self.collector.create_key(bodies.check(bodies.KeyBody, {"name": name, **body}))

    def revoke_key(self, key: str) -> dict[str, Any]:
        """See Client."""
        return self.collector.revoke_key(key)

    def snapshot(self, after: int | None = None, timeout: float = 0) -> dict[str, Any]:
        """See Client. Nobody else can change a store that is open here: never waits."""
        return self.collector.snapshot()

    def episodes(self, limit: int = 50, cursor: str | None = None, **filters: Any) -> dict[str, Any]:
        """See Client."""
        return self._read(lambda collector: collector.episodes(limit, cursor, **filters))

    def episode(self, episode_id: str) -> dict[str, Any]:
        """See Client."""
        return self._read(lambda collector: collector.episode(episode_id))

    def spans(self, limit: int = 50, cursor: str | None = None, **filters: Any) -> dict[str, Any]:
        """See Client."""
        return self._read(lambda collector: collector.spans(limit, cursor, **filters))

    def query(self, sql: str, limit: int = 10_000) -> dict[str, Any]:
        """See Client."""
        first = self._read(lambda collector: collector.query(sql, limit).json())
        return joined(first, lambda cursor: self.collector.more(cursor).json())

    def compact(self, days: int = 1, dry_run: bool = False) -> dict[str, Any]:
        """See Client."""
        return self._read(lambda collector: collector.compact(days, dry_run))

    def retain(self, days: int, dry_run: bool = False) -> dict[str, Any]:
        """See Client."""
        return self._read(lambda collector: collector.retain(days, dry_run))

    def episode_otlp(self, episode_id: str) -> dict[str, Any]:
        """See Client."""
        return self._read(lambda collector: collector.episode_otlp(episode_id))

    def export(self, limit: int = 100, cursor: str | None = None, **filters: Any) -> dict[str, Any]:
        """See Client."""
        given = {name: value for name, value in filters.items() if value is not None}
        asked = bodies.check(bodies.ExportBody, {"limit": limit, "cursor": cursor, **given})
        return self._read(lambda collector: collector.export(asked))

    def import_rows(self, spans: Sequence[Mapping[str, Any]], rewards: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """See Client."""
        return self.collector.import_rows({"spans": list(spans), "rewards": list(rewards)})

    def deployments(self, slot: str) -> list[dict[str, Any]]:
        """See Client."""
        self.collector.versions(slot)
        return self.collector.deployments(slot)

    def jobs(self) -> list[dict[str, Any]]:
        """See Client."""
        return self._read(lambda collector: collector.jobs())

    def job(self, job_id: str) -> dict[str, Any]:
        """See Client."""
        return self._read(lambda collector: collector.job(job_id))

    def events(self, events: Sequence[Mapping[str, Any]]) -> None:
        """See Client."""
        self.collector.events(list(events))

    def evaluations(self, job_id: str | None = None) -> list[dict[str, Any]]:
        """See Client."""
        return self._read(lambda collector: collector.evaluations(job_id))

    def reward(self, body: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Any:
        """See Client."""
        return self.collector.reward(body if isinstance(body, Mapping) else list(body))

    def flush(self) -> dict[str, Any]:
        """See Client."""
        return dict(self.collector.flush())

    def stats(self) -> dict[str, Any]:
        """See Client."""
        return self._read(lambda collector: collector.stats())


def open_client(
    url: str | None = None,
    data_dir: str | Path | None = None,
    api_key: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Client:
    """The client for a command: the server at `url` (or RATCHET_URL), else the server of `data_dir`, else its store.

    The key is `api_key` or RATCHET_API_KEY. Raises Unavailable when `url` was given and does not answer, Conflict
    when the store is in use by a server that does not answer.
    """
    env = os.environ if environ is None else environ
    key = api_key or env.get("RATCHET_API_KEY")
    url = url or (None if data_dir is not None else env.get("RATCHET_URL"))
    if url:
        return Remote(url, key)
    flags = {"store.data_dir": None if data_dir is None else str(data_dir)}
    config = settings.load(flags=flags, environ=env)
    found = _serving(config.store.data_dir, key)
    return found if found is not None else Local(config=config)


def _serving(data_dir: Path, api_key: str | None) -> Remote | None:
    """The server that has `data_dir` open, as it says itself in server.json or answers on the default port."""
    for url in (_announced(data_dir), settings.DEFAULT_URL):
        if url is None:
            continue
        remote = Remote(url, api_key)
        try:
            if remote.identity(_PROBE_SECONDS)["data_dir"] == str(data_dir.resolve()):
                return remote
        except (RatchetError, KeyError):  # nobody there, or somebody else
            pass
        remote.close()
    return None


def _announced(data_dir: Path) -> str | None:
    try:
        return str(orjson.loads((data_dir / "server.json").read_bytes())["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
