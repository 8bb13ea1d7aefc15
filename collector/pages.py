"""Pages of episodes and spans, newest first, and the rewards of some episodes: reads that don't touch the whole store.

Spans are stored in about the order of their time, so the engine skips what lies outside a range of it. The rewards of
some episodes are found from their own spans; the view `rewards_v` says the same of all, and costs a pass over all.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from collector import rewards

Rows = Callable[[str, Mapping[str, Any]], list[dict[str, Any]]]

# Where a page can end at the earliest: the engine then skips whatever is older.
EPISODES_SINCE = """
SELECT min(start_ns) AS since FROM (SELECT start_ns FROM episodes
  WHERE start_ns <= $before_ns AND (start_ns < $before_ns OR episode_id < $before_id)
    AND ($status::VARCHAR IS NULL OR (errors > 0) = ($status <> 'ok'))
  ORDER BY start_ns DESC LIMIT $limit)
"""
EPISODES = """
SELECT * EXCLUDE (prompt_ns, prompt, fold), prompt.slot AS prompt_slot, prompt.version AS prompt_version,
  prompt.candidate AS prompt_candidate
FROM episodes WHERE start_ns BETWEEN $since AND $before_ns AND (start_ns < $before_ns OR episode_id < $before_id)
  AND ($status::VARCHAR IS NULL OR (errors > 0) = ($status <> 'ok'))
ORDER BY start_ns DESC, episode_id DESC LIMIT $limit
"""

EPISODES_WHERE = """
SELECT * FROM episodes_v WHERE start_ns <= $before_ns AND (start_ns < $before_ns OR episode_id < $before_id)
  AND ($slot::VARCHAR IS NULL OR episode_id IN (
    SELECT episode_id FROM spans WHERE prompt_slot = $slot OR adapter_slot = $slot))
  AND ($version::INTEGER IS NULL OR episode_id IN (
    SELECT episode_id FROM spans WHERE ($slot IS NULL AND $version IN (prompt_version, adapter_version))
      OR (prompt_slot = $slot AND prompt_version = $version) OR (adapter_slot = $slot AND adapter_version = $version)))
  AND ($min_reward::DOUBLE IS NULL OR reward >= $min_reward)
  AND ($max_reward::DOUBLE IS NULL OR reward <= $max_reward)
  AND ($status::VARCHAR IS NULL OR (errors > 0) = ($status <> 'ok'))
ORDER BY start_ns DESC, episode_id DESC LIMIT $limit
"""

SPANS = """
SELECT * EXCLUDE (batch, day) FROM spans
WHERE start_ns <= $before_ns AND (start_ns < $before_ns OR span_id < $before_id)
  AND ($episode_id::VARCHAR IS NULL OR episode_id = $episode_id)
  AND ($slot::VARCHAR IS NULL OR prompt_slot = $slot OR adapter_slot = $slot)
  AND ($version::INTEGER IS NULL OR (($slot IS NULL OR prompt_slot = $slot) AND prompt_version = $version)
    OR (($slot IS NULL OR adapter_slot = $slot) AND adapter_version = $version))
  AND ($status::VARCHAR IS NULL OR status = $status)
ORDER BY start_ns DESC, span_id DESC LIMIT $limit
"""

_OWN = """
SELECT span_id, trace_id, response_id, episode_id, span_id AS of FROM spans
WHERE start_ns BETWEEN $since AND $until AND episode_id IN (SELECT unnest($ids))
UNION ALL
SELECT e.span_id, e.trace_id, NULL, s.episode_id, s.span_id FROM echoes AS e JOIN spans AS s ON s.span_id = e.echo_of
WHERE s.start_ns BETWEEN $since AND $until AND s.episode_id IN (SELECT unnest($ids))
"""
_REWARDS = """
SELECT * EXCLUDE (day, target_key) FROM rewards
WHERE target_key IN (SELECT key_of(unnest($targets))) AND list_contains($targets, target_id)
"""
_LATEST_RESPONSE = """
SELECT response_id AS target_id, episode_id, span_id FROM spans
WHERE start_ns >= $since AND response_id IN (SELECT unnest($targets))
QUALIFY row_number() OVER (PARTITION BY response_id ORDER BY start_ns DESC, span_id DESC) = 1
"""
_LATEST_TRACE = """
SELECT trace_id AS target_id, episode_id, NULL AS span_id FROM (
  SELECT trace_id, episode_id, start_ns, span_id FROM spans
  WHERE start_ns >= $since AND trace_id IN (SELECT unnest($targets))
  UNION ALL
  SELECT e.trace_id, o.episode_id, o.start_ns, o.span_id FROM echoes AS e JOIN spans AS o ON o.span_id = e.echo_of
  WHERE o.start_ns >= $since AND e.trace_id IN (SELECT unnest($targets))
) QUALIFY row_number() OVER (PARTITION BY trace_id ORDER BY start_ns DESC, span_id DESC) = 1
"""


def judged(rows: Rows, ids: Sequence[str], since: int, until: int) -> list[dict[str, Any]]:
    """The rewards of some episodes as `rewards_v` has them; their spans began from `since` to `until` (ns)."""
    own = rows(_OWN, {"ids": list(ids), "since": since, "until": until})
    spans = {row["span_id"]: (row["episode_id"], row["of"]) for row in own}
    responses = {row["response_id"] for row in own}
    traces = {row["trace_id"] for row in own}
    targets = {*ids, *spans, *responses, *traces} - {None}
    found = rows(_REWARDS, {"targets": list(targets)})
    latest = {
        "response": _latest(rows, _LATEST_RESPONSE, "response", found, since),
        "trace": _latest(rows, _LATEST_TRACE, "trace", found, since),
        "span": spans,
        "episode": {one: (one, None) for one in ids},
    }
    placed = []
    for reward in found:
        episode, span = latest[reward["target_kind"]].get(reward["target_id"], (None, None))
        if episode in latest["episode"]:
            placed.append({**reward, "episode_id": episode, "span_id": span})
    return sorted(placed, key=lambda reward: (reward["ts_ns"], reward["reward_id"]))


def _latest(
    rows: Rows, statement: str, kind: str, found: Sequence[Mapping[str, Any]], since: int
) -> dict[str, tuple[str, str | None]]:
    """Of several spans with one response id or trace id the latest counts, whatever its episode."""
    targets = list({reward["target_id"] for reward in found if reward["target_kind"] == kind})
    if not targets:
        return {}
    where = {"targets": targets, "since": since}
    return {row["target_id"]: (row["episode_id"], row["span_id"]) for row in rows(statement, where)}


def episodes(rows: Rows, where: Mapping[str, Any], weights: Mapping[str, float]) -> list[dict[str, Any]]:
    """A page of episodes by time and status. `where`: before_ns, before_id, status, limit."""
    (first,) = rows(EPISODES_SINCE, where)
    if first["since"] is None:
        return []
    return with_rewards(rows, rows(EPISODES, {**where, **first}), weights)


def with_rewards(rows: Rows, episodes: list[dict[str, Any]], weights: Mapping[str, float]) -> list[dict[str, Any]]:
    """Rows of `episodes`, each with its `reward`."""
    if not episodes:
        return episodes
    since = min(row["start_ns"] for row in episodes)
    until = max(row["end_ns"] for row in episodes)
    by_episode: dict[str, list[dict[str, Any]]] = {row["episode_id"]: [] for row in episodes}
    for reward in judged(rows, list(by_episode), since, until):
        by_episode[reward["episode_id"]].append(reward)
    return [{**row, "reward": rewards.combine(by_episode[row["episode_id"]], weights)} for row in episodes]
