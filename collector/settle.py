"""Where agents' own spans belong, decided once, when they are loaded: no reader pays for it.

An agent that instruments itself reports calls that the proxy has recorded already; such a span is an *echo*, known by
the response's id, and moves from `spans` to `echoes`. What else is in the agent's trace belongs to the episode in which
the proxy recorded that trace, or the echoed call. Both depend on the rows alone, whatever their order of arrival.
"""

from typing import Any

# A response id that a server gives to each of its answers must not marry calls that are hours apart.
_NEAR_NS = 3_600_000_000_000

_ECHOES_AMONG_NEW = """
SELECT o.span_id, p.span_id, o.trace_id FROM spans AS o JOIN spans AS p ON p.response_id = o.response_id
WHERE o.rowid >= $first AND o.source = 'otlp' AND p.source = 'proxy' AND is_call(o.operation)
  AND abs(p.start_ns - o.start_ns) < $near
QUALIFY row_number() OVER (PARTITION BY o.span_id
  ORDER BY p.trace_id <> o.trace_id, abs(p.start_ns - o.start_ns), p.span_id) = 1
"""
_ECHOES_OF_NEW = """
SELECT o.span_id, p.span_id, o.trace_id FROM spans AS p JOIN spans AS o ON p.response_id = o.response_id
WHERE p.rowid >= $first AND o.source = 'otlp' AND p.source = 'proxy' AND is_call(o.operation)
  AND abs(p.start_ns - o.start_ns) < $near
QUALIFY row_number() OVER (PARTITION BY o.span_id
  ORDER BY p.trace_id <> o.trace_id, abs(p.start_ns - o.start_ns), p.span_id) = 1
"""
_MOVE = """
INSERT INTO echoes BY NAME
SELECT s.*, e.echo_of FROM spans AS s
JOIN (SELECT unnest($echoes) AS span_id, unnest($originals) AS echo_of) AS e USING (span_id) WHERE s.source = 'otlp'
"""
_REMOVE = "DELETE FROM spans WHERE source = 'otlp' AND span_id IN (SELECT unnest($echoes))"
_TRACES = """
SELECT DISTINCT trace_id FROM spans WHERE rowid >= $first AND (source = 'otlp' OR trace_id IN (
  SELECT trace_id FROM spans WHERE source = 'otlp' AND episode_source = 'trace'))
"""
# The episode of the first recorded call of the trace; without one, that of the first call that the trace echoes.
_HOMES = """
WITH asked AS (SELECT unnest($traces) AS trace_id),
known AS (
  SELECT p.trace_id, p.episode_id, 0 AS rank, p.start_ns, p.span_id FROM spans AS p
  WHERE p.source = 'proxy' AND p.trace_id IN (SELECT trace_id FROM asked)
  UNION ALL
  SELECT e.trace_id, p.episode_id, 1, p.start_ns, p.span_id FROM echoes AS e JOIN spans AS p ON p.span_id = e.echo_of
  WHERE e.trace_id IN (SELECT trace_id FROM asked)
)
SELECT trace_id, episode_id FROM known
QUALIFY row_number() OVER (PARTITION BY trace_id ORDER BY rank, start_ns, span_id) = 1
"""
_STRAYS = """
SELECT s.span_id, s.episode_id, h.episode_id FROM spans AS s
JOIN (SELECT unnest($traces) AS trace_id, unnest($episodes) AS episode_id) AS h USING (trace_id)
WHERE s.source = 'otlp' AND s.episode_source = 'trace' AND s.episode_id <> h.episode_id
"""
_LEFT = "SELECT DISTINCT episode_id FROM spans WHERE source = 'otlp' AND span_id IN (SELECT unnest($spans))"
_BRING_HOME = """
UPDATE spans SET episode_id = h.episode_id
FROM (SELECT unnest($spans) AS span_id, unnest($episodes) AS episode_id) AS h
WHERE spans.span_id = h.span_id AND spans.source = 'otlp'
"""
_BRING_PAYLOADS = """
UPDATE payloads SET episode_id = h.episode_id
FROM (SELECT unnest($spans) AS span_id, unnest($episodes) AS episode_id) AS h WHERE payloads.span_id = h.span_id
"""
_BRING_FRESH_PAYLOADS = """
UPDATE fresh_payloads SET episode_id = h.episode_id
FROM (SELECT unnest($spans) AS span_id, unnest($episodes) AS episode_id) AS h WHERE fresh_payloads.span_id = h.span_id
"""


def settle(cursor: Any, first: int, *, observed: bool, recorded: bool) -> set[str]:
    """After rows from `first` (a rowid of `spans`) on were inserted, within the same transaction.

    `observed`: there are agents' own spans among them; `recorded`: there are calls of the proxy. Returns the episodes
    that spans left or joined.
    """
    moved: set[str] = set()
    found: dict[str, tuple[str, str]] = {}
    near = {"first": first, "near": _NEAR_NS}
    if observed:
        found |= {echo: (of, trace) for echo, of, trace in cursor.execute(_ECHOES_AMONG_NEW, near).fetchall()}
    if recorded:
        found |= {echo: (of, trace) for echo, of, trace in cursor.execute(_ECHOES_OF_NEW, near).fetchall()}
    if found:
        echoes = list(found)
        moved |= {episode for (episode,) in cursor.execute(_LEFT, {"spans": echoes}).fetchall()}
        cursor.execute(_MOVE, {"echoes": echoes, "originals": [found[echo][0] for echo in echoes]})
        cursor.execute(_REMOVE, {"echoes": echoes})
    traces = {trace for (trace,) in cursor.execute(_TRACES, {"first": first}).fetchall()}
    traces |= {trace for _, trace in found.values()}
    if not traces:
        return moved
    homes = cursor.execute(_HOMES, {"traces": sorted(traces)}).fetchall()
    where = {"traces": [trace for trace, _ in homes], "episodes": [episode for _, episode in homes]}
    strays = cursor.execute(_STRAYS, where).fetchall() if homes else []
    if strays:
        moved |= {episode for _, *both in strays for episode in both}
        brought = {"spans": [span for span, _, _ in strays], "episodes": [home for _, _, home in strays]}
        cursor.execute(_BRING_HOME, brought)
        cursor.execute(_BRING_PAYLOADS, brought)
        cursor.execute(_BRING_FRESH_PAYLOADS, brought)
    return moved
