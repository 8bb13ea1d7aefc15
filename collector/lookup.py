"""Rows of the store that are asked for by id: whole episodes, what is known already, where a thing belongs."""

from collections.abc import Sequence
from typing import Any

from collector.pages import Rows, judged

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
_PLACED = "SELECT span_id, episode_id FROM spans WHERE span_id IN (SELECT unnest($ids))"
_TARGETS = """
SELECT span_id, trace_id, episode_id, response_id, start_ns FROM spans
WHERE span_id IN (SELECT unnest($ids)) OR response_id IN (SELECT unnest($ids)) OR trace_id IN (SELECT unnest($ids))
  OR episode_id IN (SELECT unnest($ids)) ORDER BY start_ns, span_id
"""

Found = list[dict[str, Any]]


def whole(rows: Rows, ids: Sequence[str]) -> tuple[Found, Found, Found]:
    """`(spans, echoes, rewards)` of some episodes, with all their columns."""
    extent: dict[str, Any] = rows(_EXTENT, {"ids": list(ids)})[0] if ids else {"since": None}
    if extent["since"] is None:
        return [], [], []
    where = {"ids": list(ids), **extent}
    echoes = [] if rows(_NO_ECHOES, {})[0]["none"] else rows(_ECHOES, where)
    return rows(_SPANS, where), echoes, judged(rows, list(ids), extent["since"], extent["until"])


def known(rows: Rows, spans: Sequence[str], rewards: Sequence[str]) -> tuple[set[str], set[str]]:
    """Which of these spans and rewards the store has."""
    found = {row["span_id"] for row in rows(_KNOWN_SPANS, {"ids": list(spans)})} if spans else set()
    told = {row["reward_id"] for row in rows(_KNOWN_REWARDS, {"ids": list(rewards)})} if rewards else set()
    return found, told


def placed(rows: Rows, spans: Sequence[str]) -> dict[str, str]:
    """{span: its episode}, of those that are no echoes."""
    return {row["span_id"]: row["episode_id"] for row in rows(_PLACED, {"ids": list(spans)})}


def targets(rows: Rows, ids: Sequence[str]) -> Found:
    """Spans that one of these ids of spans, responses, traces or episodes names, by their start."""
    return rows(_TARGETS, {"ids": list(ids)})
