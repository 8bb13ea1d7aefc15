"""One interface to the collector, with or without a server: `Remote` speaks HTTP, `Local` opens the closed store."""

from collections.abc import Mapping
from typing import Any, Protocol


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

    def rollback(self, slot: str, evidence: str = "manual", job_id: str | None = None, note: str | None = None) -> int:
        """Back to the arms before the last promote; returns the revision. Raises Conflict when there are none."""
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

    def jobs(self) -> list[dict[str, Any]]:
        """The latest state of every job, newest first."""
        ...

    def job(self, job_id: str) -> dict[str, Any]:
        """The latest state of one job. Raises NotFound."""
        ...

    def events(self, events: list[dict[str, Any]]) -> None:
        """Journal `job` and `evaluation` events; returns once they are on disk. Raises BadInput naming the event."""
        ...

    def evaluations(self, job_id: str | None = None) -> list[dict[str, Any]]:
        """Paid rollouts, in the order in which they were loaded."""
        ...

    def reward(self, body: Mapping[str, Any] | list[Mapping[str, Any]]) -> dict[str, Any] | list[dict[str, Any]]:
        """POST /reward: {"reward_id"} once on disk (a list for a list). Raises BadInput."""
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
