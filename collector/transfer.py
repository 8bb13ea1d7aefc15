"""Whole episodes out of a store, a page at a time, and rows of other stores into it, each once."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from collector import intake, otel_in, pages, rewards
from collector.errors import BadInput
from collector.formats.bundle import grouped, reward_in, span_in

if TYPE_CHECKING:
    from collector.bodies import ExportBody
    from collector.service import Collector

Rows = Callable[[str, Mapping[str, Any]], list[dict[str, Any]]]
MAX_ROWS = 20_000

_EXTENT = """
SELECT min(start_ns) AS since, max(start_ns) AS until FROM spans WHERE episode_id IN (SELECT unnest($ids))
"""
_SPANS = """
SELECT s.*, p.* EXCLUDE (span_id) FROM (
  SELECT * EXCLUDE (batch, day) FROM spans
  WHERE start_ns BETWEEN $since AND $until AND episode_id IN (SELECT unnest($ids))) AS s
LEFT JOIN (
  SELECT span_id, input_messages, output_messages, tools, token_ids, logprobs, attributes FROM payloads_v
  WHERE start_ns BETWEEN $since AND $until) AS p USING (span_id)
"""
_ECHOES = """
SELECT e.* EXCLUDE (batch, day, episode_id), o.episode_id, p.* EXCLUDE (span_id) FROM echoes AS e
JOIN (SELECT span_id, episode_id FROM spans WHERE start_ns BETWEEN $since AND $until
  AND episode_id IN (SELECT unnest($ids))) AS o ON o.span_id = e.echo_of
LEFT JOIN (SELECT span_id, input_messages, output_messages, tools, attributes FROM payloads_v) AS p
  ON p.span_id = e.span_id
"""
_NO_ECHOES = "SELECT count(*) = 0 AS none FROM echoes"
_KNOWN_SPANS = """
SELECT span_id FROM spans WHERE span_id IN (SELECT unnest($ids))
UNION SELECT span_id FROM echoes WHERE span_id IN (SELECT unnest($ids))
"""
_KNOWN_REWARDS = "SELECT reward_id FROM rewards WHERE reward_id IN (SELECT unnest($ids))"


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
    weights = collector.settings.rewards.weights
    return {"episodes": collector.store.reading(lambda rows: _whole(rows, ids, weights)), "next": following}


def _whole(rows: Rows, ids: Sequence[str], weights: Mapping[str, float]) -> list[dict[str, Any]]:
    """Each of the episodes that has spans, with all rows."""
    extent: dict[str, Any] = rows(_EXTENT, {"ids": list(ids)})[0] if ids else {"since": None}
    if extent["since"] is None:
        return []
    where = {"ids": list(ids), **extent}
    spans = grouped(rows(_SPANS, where))
    echoes = {} if rows(_NO_ECHOES, {})[0]["none"] else grouped(rows(_ECHOES, where))
    judged: dict[str, list[dict[str, Any]]] = {}
    for reward in pages.judged(rows, list(ids), extent["since"], extent["until"]):
        judged.setdefault(reward["episode_id"], []).append(reward)
    return [
        {
            "episode_id": one,
            "reward": rewards.combine(judged.get(one, ()), weights),
            "spans": spans[one],
            "echoes": echoes.get(one, []),
            "rewards": judged.get(one, []),
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
    known_spans, known_rewards = collector.store.reading(lambda read: _known(read, list(rows), list(given)))
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


def _known(rows: Rows, spans: list[str], judged: list[str]) -> tuple[set[str], set[str]]:
    found = {row["span_id"] for row in rows(_KNOWN_SPANS, {"ids": spans})} if spans else set()
    told = {row["reward_id"] for row in rows(_KNOWN_REWARDS, {"ids": judged})} if judged else set()
    return found, told
