"""Pages of episodes and spans, newest first, and the rewards of some episodes: reads that don't touch the whole store.

Spans are stored in about the order of their time, so the engine skips what lies outside a range of it. The rewards of
some episodes are found from their own spans; the view `rewards_v` says the same of all, and costs a pass over all.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from collector import rewards

Rows = Callable[[str, Mapping[str, Any]], list[dict[str, Any]]]

# Where a page can end at the earliest: the engine then skips whatever is older. The rows that were written last will do
# where they hold enough for a page, since any such number of rows is a bound; else it takes a pass over the times.
_SINCE_AMONG_LAST = """
SELECT min(start_ns) AS since, count(*) AS found FROM (SELECT start_ns FROM episodes
  WHERE rowid > (SELECT max(rowid) FROM episodes) - 2048
    AND start_ns <= $before_ns AND (start_ns < $before_ns OR episode_id < $before_id)
    AND ($status::VARCHAR IS NULL OR (errors > 0) = ($status <> 'ok'))
  ORDER BY start_ns DESC LIMIT $limit)
"""
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

# With calls of a slot or a version: of the newest episodes where those fill a page, else of all.
_NEWEST = """
SELECT min(start_ns) AS since, max(end_ns) AS until FROM (SELECT start_ns, end_ns FROM episodes
  WHERE start_ns <= $before_ns ORDER BY start_ns DESC LIMIT 1000)
"""
_EPISODES_OF = """
SELECT * EXCLUDE (prompt_ns, prompt, fold), prompt.slot AS prompt_slot, prompt.version AS prompt_version,
  prompt.candidate AS prompt_candidate
FROM episodes WHERE start_ns BETWEEN $since AND $before_ns AND (start_ns < $before_ns OR episode_id < $before_id)
  AND ($status::VARCHAR IS NULL OR (errors > 0) = ($status <> 'ok'))
  AND episode_id IN (SELECT episode_id FROM spans WHERE start_ns BETWEEN $since AND $until
    AND ($slot::VARCHAR IS NULL OR prompt_slot = $slot OR adapter_slot = $slot)
    AND ($version::INTEGER IS NULL OR (($slot IS NULL OR prompt_slot = $slot) AND prompt_version = $version)
      OR (($slot IS NULL OR adapter_slot = $slot) AND adapter_version = $version)))
ORDER BY start_ns DESC, episode_id DESC LIMIT $limit
"""
_EVER = {"since": -(1 << 63), "until": (1 << 63) - 1}

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
"""
ANY_ECHO = "SELECT 1 FROM echoes LIMIT 1"
_OWN_ECHOES = """
SELECT e.span_id, e.trace_id, NULL AS response_id, s.episode_id, s.span_id AS of FROM echoes AS e
JOIN spans AS s ON s.span_id = e.echo_of
WHERE s.start_ns BETWEEN $since AND $until AND s.episode_id IN (SELECT unnest($ids))
"""
_REWARDS = """
SELECT * EXCLUDE (day, target_key) FROM rewards
WHERE target_key IN (SELECT key_of(unnest($targets)))
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
    where = {"ids": list(ids), "since": since, "until": until}
    own = rows(_OWN, where) + (rows(_OWN_ECHOES, where) if rows(ANY_ECHO, {}) else [])
    spans = {row["span_id"]: (row["episode_id"], row["of"]) for row in own}
    responses = {row["response_id"] for row in own}
    traces = {row["trace_id"] for row in own}
    targets = {*ids, *spans, *responses, *traces} - {None}
    found = [one for one in rows(_REWARDS, {"targets": list(targets)}) if one["target_id"] in targets]
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
    (first,) = rows(_SINCE_AMONG_LAST, where)
    if first["found"] < where["limit"]:
        (first,) = rows(EPISODES_SINCE, where)
    if first["since"] is None:
        return []
    return with_rewards(rows, rows(EPISODES, {**where, "since": first["since"]}), weights)


def episodes_of(rows: Rows, where: Mapping[str, Any], weights: Mapping[str, float]) -> list[dict[str, Any]]:
    """The same of the episodes with a call of a slot, a version or both. `where`: `slot` and `version`, too."""
    (newest,) = rows(_NEWEST, {"before_ns": where["before_ns"]})
    if newest["since"] is None:
        return []
    page = rows(_EPISODES_OF, {**where, **newest})
    if len(page) < where["limit"]:
        page = rows(_EPISODES_OF, {**where, **_EVER})
    return with_rewards(rows, page, weights)


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


def reader(cursor: Any) -> Rows:
    """How to ask a cursor: rows as dictionaries."""

    def rows(statement: str, where: Mapping[str, Any]) -> list[dict[str, Any]]:
        done = cursor.execute(statement, dict(where)) if where else cursor.execute(statement)
        names = [column[0] for column in done.description]
        return [dict(zip(names, row, strict=True)) for row in done.fetchall()]

    return rows
