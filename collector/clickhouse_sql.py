"""Every statement that a store on ClickHouse is asked: constants, whose values are bound as {name:Type}."""

# Loading

KNOWN_SEGMENTS = "SELECT DISTINCT name FROM _segments WHERE name IN {ids:Array(String)}"
NOTE = "INSERT INTO _segments FORMAT JSONEachRow"

# Journal event -> table.
TABLES = {
    "span": "calls",
    "otlp": "observed",
    "reward": "rewards",
    "version": "versions",
    "candidate": "candidates",
    "deployment": "deployments",
    "evaluation": "evaluations",
    "job": "jobs",
    "key": "keys",
}
INSERTS = {
    "span": "INSERT INTO calls FORMAT JSONEachRow",
    "otlp": "INSERT INTO observed FORMAT JSONEachRow",
    "reward": "INSERT INTO rewards FORMAT JSONEachRow",
    "version": "INSERT INTO versions FORMAT JSONEachRow",
    "candidate": "INSERT INTO candidates FORMAT JSONEachRow",
    "deployment": "INSERT INTO deployments FORMAT JSONEachRow",
    "evaluation": "INSERT INTO evaluations FORMAT JSONEachRow",
    "job": "INSERT INTO jobs FORMAT JSONEachRow",
    "key": "INSERT INTO keys FORMAT JSONEachRow",
}
TRIALS = {
    "span": "INSERT INTO _try_calls FORMAT JSONEachRow",
    "otlp": "INSERT INTO _try_calls FORMAT JSONEachRow",
    "reward": "INSERT INTO _try_rewards FORMAT JSONEachRow",
    "version": "INSERT INTO _try_versions FORMAT JSONEachRow",
    "candidate": "INSERT INTO _try_candidates FORMAT JSONEachRow",
    "deployment": "INSERT INTO _try_deployments FORMAT JSONEachRow",
    "evaluation": "INSERT INTO _try_evaluations FORMAT JSONEachRow",
    "job": "INSERT INTO _try_jobs FORMAT JSONEachRow",
    "key": "INSERT INTO _try_keys FORMAT JSONEachRow",
}
# Events that may come again, the field by which they are known, and the question which of some are there.
REPEATED = {
    "otlp": ("span_id", "SELECT span_id AS id FROM observed WHERE span_id IN {ids:Array(String)}"),
    "reward": ("reward_id", "SELECT reward_id AS id FROM rewards WHERE reward_id IN {ids:Array(String)}"),
    "evaluation": (
        "evaluation_id",
        "SELECT evaluation_id AS id FROM evaluations WHERE evaluation_id IN {ids:Array(String)}",
    ),
}

# Settling: see settle.py. A pair that is found twice is the same pair, and the smallest wins, so this may be repeated.

WITH_OBSERVED = """
CREATE OR REPLACE VIEW _recorded AS
SELECT * FROM calls
UNION ALL
SELECT own_.* REPLACE (
  if(own_.episode_source = 'trace', coalesce(home_.home, own_.episode_id), own_.episode_id) AS episode_id)
FROM observed AS own_ LEFT JOIN _homes_of AS home_ ON home_.trace_id = own_.trace_id
WHERE own_.span_id NOT IN (SELECT span_id FROM _echoed)
"""
ANY_OBSERVED = "SELECT count() > 0 AS any FROM observed"
ECHOES_AMONG_NEW = """
INSERT INTO _echoed SELECT own_.span_id, call_.span_id, own_.trace_id,
  ifNull(call_.trace_id <> own_.trace_id, true), abs(call_.start_ns - own_.start_ns)
FROM (
  SELECT * FROM observed WHERE segment IN {segments:Array(String)} AND operation IN {operations:Array(String)}
) AS own_
JOIN (SELECT * FROM calls WHERE response_id IN (
  SELECT response_id FROM observed WHERE segment IN {segments:Array(String)})) AS call_
ON call_.response_id = own_.response_id WHERE abs(call_.start_ns - own_.start_ns) < {near:Int64}
"""
ECHOES_OF_NEW = """
INSERT INTO _echoed SELECT own_.span_id, call_.span_id, own_.trace_id,
  ifNull(call_.trace_id <> own_.trace_id, true), abs(call_.start_ns - own_.start_ns)
FROM (SELECT * FROM observed WHERE operation IN {operations:Array(String)} AND response_id IN (
  SELECT response_id FROM calls WHERE segment IN {segments:Array(String)})) AS own_
JOIN (SELECT * FROM calls WHERE segment IN {segments:Array(String)}) AS call_
ON call_.response_id = own_.response_id WHERE abs(call_.start_ns - own_.start_ns) < {near:Int64}
"""
HOMES_OF_NEW = """
INSERT INTO _homes SELECT assumeNotNull(trace_id), episode_id, 0, start_ns, span_id FROM calls
WHERE trace_id IN (
  SELECT trace_id FROM observed WHERE segment IN {segments:Array(String)} AND episode_source = 'trace')
ORDER BY start_ns, span_id LIMIT 1 BY trace_id
"""
HOMES_AMONG_NEW = """
INSERT INTO _homes SELECT assumeNotNull(trace_id), episode_id, 0, start_ns, span_id FROM calls
WHERE segment IN {segments:Array(String)} AND trace_id IN (
  SELECT trace_id FROM observed WHERE episode_source = 'trace' AND trace_id IN (
    SELECT trace_id FROM calls WHERE segment IN {segments:Array(String)}))
ORDER BY start_ns, span_id LIMIT 1 BY trace_id
"""
HOMES_BY_ECHO = """
INSERT INTO _homes SELECT assumeNotNull(echo_.trace_id), call_.episode_id, 1, call_.start_ns, call_.span_id
FROM (SELECT * FROM _echoed WHERE trace_id IS NOT NULL AND (
  span_id IN (SELECT span_id FROM observed WHERE segment IN {segments:Array(String)})
  OR echo_of IN (SELECT span_id FROM calls WHERE segment IN {segments:Array(String)}))) AS echo_
JOIN (SELECT * FROM calls WHERE span_id IN (SELECT echo_of FROM _echoed)) AS call_ ON call_.span_id = echo_.echo_of
"""

# Pages: see pages.py

# The times of the newest spans: where a page may end at the earliest.
NEWEST = """
SELECT min(start_ns) AS since, count() AS found FROM (
  SELECT start_ns FROM (
    SELECT start_ns FROM calls WHERE start_ns <= {before_ns:Int64} ORDER BY start_ns DESC LIMIT {count:UInt64}
    UNION ALL
    SELECT start_ns FROM observed WHERE start_ns <= {before_ns:Int64} ORDER BY start_ns DESC LIMIT {count:UInt64}
  ) ORDER BY start_ns DESC LIMIT {count:UInt64}
)
"""
EPISODES = """
SELECT * FROM episodes
WHERE episode_id IN (SELECT episode_id FROM spans WHERE start_ns BETWEEN {since:Int64} AND {before_ns:Int64})
  AND start_ns BETWEEN {since:Int64} AND {before_ns:Int64}
  AND (start_ns < {before_ns:Int64} OR episode_id < {before_id:String})
  AND ({status:Nullable(String)} IS NULL OR (errors > 0) = ({status:Nullable(String)} <> 'ok'))
ORDER BY start_ns DESC, episode_id DESC LIMIT {limit:UInt64}
"""
EPISODES_WHERE = """
SELECT * FROM episodes_v
WHERE start_ns <= {before_ns:Int64} AND (start_ns < {before_ns:Int64} OR episode_id < {before_id:String})
  AND ({slot:Nullable(String)} IS NULL OR episode_id IN (
    SELECT episode_id FROM spans
    WHERE prompt_slot = {slot:Nullable(String)} OR adapter_slot = {slot:Nullable(String)}))
  AND ({version:Nullable(Int32)} IS NULL OR episode_id IN (
    SELECT episode_id FROM spans
    WHERE ({slot:Nullable(String)} IS NULL
        AND (prompt_version = {version:Nullable(Int32)} OR adapter_version = {version:Nullable(Int32)}))
      OR (prompt_slot = {slot:Nullable(String)} AND prompt_version = {version:Nullable(Int32)})
      OR (adapter_slot = {slot:Nullable(String)} AND adapter_version = {version:Nullable(Int32)})))
  AND ({min_reward:Nullable(Float64)} IS NULL OR reward >= {min_reward:Nullable(Float64)})
  AND ({max_reward:Nullable(Float64)} IS NULL OR reward <= {max_reward:Nullable(Float64)})
  AND ({status:Nullable(String)} IS NULL OR (errors > 0) = ({status:Nullable(String)} <> 'ok'))
ORDER BY start_ns DESC, episode_id DESC LIMIT {limit:UInt64}
"""
SPANS = """
SELECT * EXCEPT (day) FROM spans
WHERE start_ns <= {before_ns:Int64} AND (start_ns < {before_ns:Int64} OR span_id < {before_id:String})
  AND ({episode_id:Nullable(String)} IS NULL OR episode_id = {episode_id:Nullable(String)})
  AND ({slot:Nullable(String)} IS NULL
    OR prompt_slot = {slot:Nullable(String)} OR adapter_slot = {slot:Nullable(String)})
  AND ({version:Nullable(Int32)} IS NULL
    OR (({slot:Nullable(String)} IS NULL OR prompt_slot = {slot:Nullable(String)})
      AND prompt_version = {version:Nullable(Int32)})
    OR (({slot:Nullable(String)} IS NULL OR adapter_slot = {slot:Nullable(String)})
      AND adapter_version = {version:Nullable(Int32)}))
  AND ({status:Nullable(String)} IS NULL OR status = {status:Nullable(String)})
ORDER BY start_ns DESC, span_id DESC LIMIT {limit:UInt64}
"""

# The rewards of some episodes, found from their own spans; `rewards_v` says the same of all.
OWN = """
SELECT span_id, episode_id, span_id AS at FROM spans
WHERE start_ns BETWEEN {since:Int64} AND {until:Int64} AND episode_id IN {ids:Array(String)}
"""
OWN_ECHOES = """
SELECT echo_.span_id AS span_id, span_.episode_id AS episode_id, span_.span_id AS at
FROM echoes AS echo_ JOIN (
  SELECT span_id, episode_id FROM spans
  WHERE start_ns BETWEEN {since:Int64} AND {until:Int64} AND episode_id IN {ids:Array(String)}
) AS span_ ON span_.span_id = echo_.echo_of
"""
AIMED = """
SELECT * EXCEPT (segment, day) FROM rewards WHERE target_id IN {ids:Array(String)} OR target_id IN (
  SELECT arrayJoin([toNullable(span_id), trace_id, response_id]) AS one FROM spans
  WHERE start_ns BETWEEN {since:Int64} AND {until:Int64} AND episode_id IN {ids:Array(String)} AND one IS NOT NULL)
"""
AIMED_AT_ECHOES = """
SELECT * EXCEPT (segment, day) FROM rewards WHERE target_id IN (
  SELECT arrayJoin([toNullable(echo_.span_id), echo_.trace_id]) AS one
  FROM echoes AS echo_ JOIN (
    SELECT span_id FROM spans
    WHERE start_ns BETWEEN {since:Int64} AND {until:Int64} AND episode_id IN {ids:Array(String)}
  ) AS span_ ON span_.span_id = echo_.echo_of WHERE one IS NOT NULL)
"""
# Of several spans with one response id or trace id the latest counts.
LATEST = {
    "response": """
SELECT assumeNotNull(response_id) AS target, argMax(episode_id, (start_ns, span_id)) AS episode,
  toNullable(argMax(span_id, (start_ns, span_id))) AS at
FROM spans WHERE start_ns >= {since:Int64} AND response_id IN {ids:Array(String)} GROUP BY response_id
""",
    "trace": """
SELECT assumeNotNull(trace_id) AS target, argMax(episode_id, (start_ns, span_id)) AS episode, NULL AS at FROM (
  SELECT trace_id, episode_id, start_ns, span_id FROM spans
  WHERE start_ns >= {since:Int64} AND trace_id IN {ids:Array(String)}
  UNION ALL
  SELECT echo_.trace_id, span_.episode_id, span_.start_ns, span_.span_id
  FROM (SELECT trace_id, echo_of FROM echoes WHERE trace_id IN {ids:Array(String)}) AS echo_
  JOIN spans AS span_ ON span_.span_id = echo_.echo_of WHERE span_.start_ns >= {since:Int64}
) GROUP BY trace_id
""",
}

# One episode, and whole episodes

EXTENT = """
SELECT count() AS found, min(start_ns) AS since, max(start_ns) AS until FROM spans
WHERE episode_id IN {ids:Array(String)}
"""
WHOLE_SPANS = """
SELECT * EXCEPT (segment, day) FROM _recorded
WHERE start_ns BETWEEN {since:Int64} AND {until:Int64} AND episode_id IN {ids:Array(String)}
"""
EPISODE_SPANS = """
SELECT * EXCEPT (segment, day, token_ids, logprobs) FROM _recorded
WHERE start_ns BETWEEN {since:Int64} AND {until:Int64} AND episode_id = {episode_id:String}
"""
WHOLE_ECHOES = """
SELECT own_.* EXCEPT (segment, day, episode_id, token_ids, logprobs), at_.echo_of AS echo_of, at_.home AS episode_id
FROM observed AS own_ JOIN (
  SELECT of_.span_id AS echo, of_.original AS echo_of, span_.episode_id AS home FROM _echoes_of AS of_ JOIN (
    SELECT span_id, episode_id FROM spans
    WHERE start_ns BETWEEN {since:Int64} AND {until:Int64} AND episode_id IN {ids:Array(String)}
  ) AS span_ ON span_.span_id = of_.original
) AS at_ ON at_.echo = own_.span_id
"""
EPISODE_ECHOES = """
SELECT span_id, parent_span_id, echo_of FROM echoes
WHERE echo_of IN (SELECT span_id FROM spans WHERE episode_id = {episode_id:String})
"""

# The rest of what is read

UNMATCHED = """
SELECT * FROM rewards_v WHERE episode_id IS NULL
  OR (target_kind = 'episode' AND episode_id NOT IN (SELECT toNullable(episode_id) FROM spans))
ORDER BY ts_ns DESC LIMIT {limit:UInt64}
"""
UNKNOWN = """
SELECT span_id, request_model, input_messages FROM (
  SELECT *, sum(lengthUTF8(input_messages)) OVER (ORDER BY start_ns DESC, span_id) AS so_far FROM (
    SELECT span_id, start_ns, request_model, input_messages FROM _recorded
    WHERE prompt_slot IS NULL AND input_messages IS NOT NULL
      AND operation IN ('chat', 'responses', 'messages', 'text_completion')
    ORDER BY start_ns DESC, span_id LIMIT {limit:UInt64}
  )
) WHERE so_far <= {characters:Int64} ORDER BY start_ns DESC, span_id
"""
COUNTS = """
SELECT (SELECT count() FROM spans) AS spans, (SELECT count() FROM rewards) AS rewards,
  (SELECT uniqExact(episode_id) FROM spans) AS episodes,
  (SELECT countIf(prompt_slot IS NULL AND operation IN ('chat', 'responses', 'messages', 'text_completion'))
     FROM spans) AS unknown_prompts,
  (SELECT countIf(target_kind <> 'episode' AND episode_id IS NULL) FROM rewards_v)
    + (SELECT count() FROM rewards WHERE target_kind = 'episode'
       AND target_id NOT IN (SELECT episode_id FROM spans)) AS unmatched_rewards
"""
KNOWN = {
    "spans": "SELECT span_id AS id FROM _recorded WHERE span_id IN {ids:Array(String)}",
    "observed": "SELECT span_id AS id FROM observed WHERE span_id IN {ids:Array(String)}",
    "rewards": "SELECT reward_id AS id FROM rewards WHERE reward_id IN {ids:Array(String)}",
}
PLACED = "SELECT span_id, episode_id FROM spans WHERE span_id IN {ids:Array(String)}"
TARGETS = """
SELECT span_id, trace_id, episode_id, response_id, start_ns FROM spans
WHERE span_id IN {ids:Array(String)} OR response_id IN {ids:Array(String)} OR trace_id IN {ids:Array(String)}
  OR episode_id IN {ids:Array(String)} ORDER BY start_ns, span_id
"""

# Care

DAYS = """
SELECT day, sum(spans) AS spans, sum(rewards) AS rewards FROM (
  SELECT day, count() AS spans, 0 AS rewards FROM calls WHERE day < {before:Int32} GROUP BY day
  UNION ALL
  SELECT day, count(), 0 FROM observed WHERE day < {before:Int32} GROUP BY day
  UNION ALL
  SELECT day, 0, count() FROM rewards WHERE day < {before:Int32} GROUP BY day
) GROUP BY day ORDER BY day
"""
DROP = (
    "ALTER TABLE calls DROP PARTITION {day:Int32}",
    "ALTER TABLE observed DROP PARTITION {day:Int32}",
    "ALTER TABLE rewards DROP PARTITION {day:Int32}",
)

# Opening

CREATE_DATABASE = "CREATE DATABASE IF NOT EXISTS {name:Identifier}"
SCHEMA_OF = "SELECT argMax(value, ts_ns) AS value FROM _meta WHERE key = 'schema'"
SET_SCHEMA = "INSERT INTO _meta FORMAT JSONEachRow"
WEIGHTS = "SELECT name, weight FROM _weights"
SET_WEIGHTS = "INSERT INTO reward_weights FORMAT JSONEachRow"
