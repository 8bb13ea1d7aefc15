"""Whole episodes out of a store, a page at a time, and rows of other stores into it, each once."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from collector import intake, otel_in, rewards
from collector.errors import BadInput
from collector.formats.bundle import grouped, reward_in, span_in

if TYPE_CHECKING:
    from collector.bodies import ExportBody
    from collector.service import Collector

MAX_ROWS = 20_000


def page(collector: "Collector", asked: "ExportBody") -> dict[str, Any]:
    """{"episodes": [{"episode_id", "reward", "spans", "echoes", "rewards"}], "next"}, newest first, all columns."""
    if asked.episodes is not None:
        start = int(asked.cursor or 0)
        ids = asked.episodes[start : start + asked.limit]
        more = start + asked.limit < len(asked.episodes)
        following = str(start + asked.limit) if more else None
    else:
        filters = asked.model_dump(include={"slot", "version", "min_reward", "max_reward", "status"})
        found = collector.episodes(asked.limit, asked.cursor, **filters)
        since = asked.since_ns
        ids = [row["episode_id"] for row in found["episodes"] if since is None or row["start_ns"] >= since]
        following = found["next"] if len(ids) == len(found["episodes"]) else None
    return {"episodes": _whole(collector, ids), "next": following}


def _whole(collector: "Collector", ids: Sequence[str]) -> list[dict[str, Any]]:
    """Each of the episodes that has spans, with all rows."""
    own, repeated, judged = collector.store.whole(ids)
    spans, echoes = grouped(own), grouped(repeated)
    given: dict[str, list[dict[str, Any]]] = {}
    for reward in judged:
        given.setdefault(reward["episode_id"], []).append(reward)
    weights = collector.settings.rewards.weights
    return [
        {
            "episode_id": one,
            "reward": rewards.combine(given.get(one, ()), weights),
            "spans": spans[one],
            "echoes": echoes.get(one, []),
            "rewards": given.get(one, []),
        }
        for one in ids
        if one in spans
    ]


def accept(collector: "Collector", body: Any) -> dict[str, int]:
    """Journal rows that are not there yet: {"spans", "rewards"} added and {"known"} left alone, once on disk.

    `body`: {"spans": [...], "rewards": [...]} in the columns of the store. Raises BadInput that names the field (then
    nothing is stored), Unavailable.
    """
    if not isinstance(body, Mapping) or set(body) - {"spans", "rewards"}:
        raise BadInput("body: must be an object with `spans` and `rewards`", param="body")
    spans, judged = (_listed(body, name) for name in ("spans", "rewards"))
    if len(spans) + len(judged) > MAX_ROWS:
        raise BadInput(f"at most {MAX_ROWS} rows at once", param="body")
    rows = {row["span_id"]: row for row in (span_in(one, f"spans[{index}]") for index, one in enumerate(spans))}
    given = {row["reward_id"]: row for row in (reward_in(one, f"rewards[{i}]") for i, one in enumerate(judged))}
    collector.flush()  # what an earlier part of the same import brought counts as known
    known_spans, known_rewards = collector.store.known(list(rows), list(given))
    rules = collector.settings.store.redaction
    fresh_rows = [otel_in.Observed(**row) for ident, row in rows.items() if ident not in known_spans]
    new = intake.kept([otel_in.masked(row, rules.emails) for row in fresh_rows], rules)
    fresh = [rewards.masked(row) for ident, row in given.items() if ident not in known_rewards]
    collector.write([("otlp", row) for row in new] + [("reward", row) for row in fresh])
    known = len(spans) + len(judged) - len(new) - len(fresh)
    return {"spans": len(new), "rewards": len(fresh), "known": known}


def _listed(body: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    items = body.get(name) or []
    if not isinstance(items, list) or not all(isinstance(one, Mapping) for one in items):
        raise BadInput(f"{name}: must be an array of objects", param=name)
    return items
