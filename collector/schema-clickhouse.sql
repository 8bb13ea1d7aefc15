-- The tables and views of a store on ClickHouse; readers see the columns that schema.sql has on DuckDB.
-- Statements end in a semicolon at the end of a line. Tables are made once, views whenever this text changes.
--
-- A segment of the journal is inserted table by table, each insert with a token made of the segment's name: an insert
-- that is repeated because nobody knows whether it was taken is dropped by the table's own memory of tokens. The name
-- is written to _segments last.

CREATE TABLE IF NOT EXISTS _meta (key String, value String, ts_ns Int64) ENGINE = MergeTree ORDER BY key;

CREATE TABLE IF NOT EXISTS _segments (
  name String, lines UInt64, quarantined UInt64, bytes UInt64, loaded_ns Int64, day Int32
) ENGINE = MergeTree ORDER BY name SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;

CREATE TABLE IF NOT EXISTS reward_weights (name String, weight Float64, revision Int64)
ENGINE = MergeTree ORDER BY revision;

-- What the proxy recorded. Wide, since a column that nobody asks for is not read.
CREATE TABLE IF NOT EXISTS calls (
  span_id String, trace_id Nullable(String), parent_span_id Nullable(String), episode_id String,
  episode_source LowCardinality(Nullable(String)), source LowCardinality(Nullable(String)),
  operation LowCardinality(Nullable(String)), route LowCardinality(Nullable(String)),
  start_ns Int64 CODEC(Delta, ZSTD), end_ns Nullable(Int64) CODEC(ZSTD), ttft_ms Nullable(Float64),
  attempts Nullable(Int32), status LowCardinality(Nullable(String)), http_status Nullable(Int32),
  error_type LowCardinality(Nullable(String)), provider LowCardinality(Nullable(String)),
  request_model LowCardinality(Nullable(String)), response_model LowCardinality(Nullable(String)),
  response_id Nullable(String), finish_reason LowCardinality(Nullable(String)), stream Nullable(Bool),
  temperature Nullable(Float64), top_p Nullable(Float64), max_tokens Nullable(Int64), seed Nullable(Int64),
  input_tokens Nullable(Int64), output_tokens Nullable(Int64), cached_tokens Nullable(Int64),
  cost_usd Nullable(Float64), prompt_slot LowCardinality(Nullable(String)), prompt_version Nullable(Int32),
  prompt_candidate LowCardinality(Nullable(String)), adapter_slot LowCardinality(Nullable(String)),
  adapter_version Nullable(Int32), propensity Nullable(Float64), request_bytes Nullable(Int64),
  response_bytes Nullable(Int64), name LowCardinality(Nullable(String)),
  agent_name LowCardinality(Nullable(String)), tool_name LowCardinality(Nullable(String)),
  input_messages Nullable(String) CODEC(ZSTD(3)), output_messages Nullable(String) CODEC(ZSTD(3)),
  tools Nullable(String) CODEC(ZSTD(3)), token_ids Nullable(String) CODEC(ZSTD(3)),
  logprobs Nullable(String) CODEC(ZSTD(3)), attributes Nullable(String) CODEC(ZSTD(3)),
  segment LowCardinality(String), day Int32,
  INDEX by_span span_id TYPE bloom_filter(0.01) GRANULARITY 1,
  INDEX by_episode episode_id TYPE bloom_filter(0.01) GRANULARITY 1,
  INDEX by_trace trace_id TYPE bloom_filter(0.01) GRANULARITY 1,
  INDEX by_response response_id TYPE bloom_filter(0.01) GRANULARITY 1,
  INDEX by_segment segment TYPE minmax GRANULARITY 1
) ENGINE = MergeTree PARTITION BY day ORDER BY (start_ns, span_id)
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;

-- What agents' own instrumentation sent, each span once.
CREATE TABLE IF NOT EXISTS observed AS calls;

-- Which of them repeat a call, and where their traces belong. Decided when either side is loaded; the smallest wins.
CREATE TABLE IF NOT EXISTS _echoed (
  span_id String, echo_of String, trace_id Nullable(String), far Bool, apart Int64
) ENGINE = MergeTree ORDER BY span_id;

CREATE TABLE IF NOT EXISTS _homes (
  trace_id String, episode_id String, rank UInt8, start_ns Int64, span_id String
) ENGINE = MergeTree ORDER BY trace_id;

CREATE TABLE IF NOT EXISTS rewards (
  reward_id String, target_kind LowCardinality(String), target_id String, name LowCardinality(String), value Float64,
  label Nullable(String), explanation Nullable(String) CODEC(ZSTD(3)), source LowCardinality(Nullable(String)),
  idempotency_key Nullable(String), ts_ns Int64 CODEC(ZSTD), segment LowCardinality(String), day Int32,
  INDEX by_id reward_id TYPE bloom_filter(0.01) GRANULARITY 1
) ENGINE = MergeTree PARTITION BY day ORDER BY (target_id, name, ts_ns)
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;

CREATE TABLE IF NOT EXISTS versions (
  slot String, version Nullable(Int32), kind Nullable(String), hash Nullable(String), template Nullable(String),
  base_model Nullable(String), path Nullable(String), match Nullable(String), parent Nullable(Int32),
  job_id Nullable(String), note Nullable(String), metrics Nullable(String), created_ns Nullable(Int64),
  segment LowCardinality(String), day Int32
) ENGINE = MergeTree ORDER BY slot
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;

CREATE TABLE IF NOT EXISTS candidates (
  slot String, candidate Nullable(String), template Nullable(String), ts_ns Nullable(Int64),
  segment LowCardinality(String), day Int32
) ENGINE = MergeTree ORDER BY slot
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;

CREATE TABLE IF NOT EXISTS deployments (
  revision Int64, slot Nullable(String), action Nullable(String), arms Nullable(String), evidence Nullable(String),
  job_id Nullable(String), note Nullable(String), ts_ns Nullable(Int64), segment LowCardinality(String), day Int32
) ENGINE = MergeTree ORDER BY revision
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;

CREATE TABLE IF NOT EXISTS evaluations (
  evaluation_id String, job_id Nullable(String), slot Nullable(String), version_hash Nullable(String),
  task_id Nullable(String), replicate Nullable(Int32), arm Nullable(String), subset Nullable(String),
  episode_id Nullable(String), reward Nullable(Float64), ok Nullable(Bool), reason Nullable(String),
  answer Nullable(String) CODEC(ZSTD(3)), seconds Nullable(Float64), input_tokens Nullable(Int64),
  output_tokens Nullable(Int64), calls Nullable(Int64), cost_usd Nullable(Float64), model Nullable(String),
  ts_ns Nullable(Int64), segment LowCardinality(String), day Int32,
  INDEX by_id evaluation_id TYPE bloom_filter(0.01) GRANULARITY 1
) ENGINE = MergeTree ORDER BY evaluation_id
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;

CREATE TABLE IF NOT EXISTS jobs (
  job_id String, kind Nullable(String), slot Nullable(String), status Nullable(String), spec Nullable(String),
  progress Nullable(String), result Nullable(String), ts_ns Int64, segment LowCardinality(String), day Int32
) ENGINE = MergeTree ORDER BY (job_id, ts_ns)
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;

CREATE TABLE IF NOT EXISTS keys (
  key_id String, action Nullable(String), name Nullable(String), key_sha256 Nullable(String),
  scopes Nullable(String), limits Nullable(String), ts_ns Nullable(Int64), segment LowCardinality(String), day Int32
) ENGINE = MergeTree ORDER BY key_id
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;

-- Lines are tried here: parsed as they would be, kept nowhere.
CREATE TABLE IF NOT EXISTS _try_calls AS calls ENGINE = Null;
CREATE TABLE IF NOT EXISTS _try_rewards AS rewards ENGINE = Null;
CREATE TABLE IF NOT EXISTS _try_versions AS versions ENGINE = Null;
CREATE TABLE IF NOT EXISTS _try_candidates AS candidates ENGINE = Null;
CREATE TABLE IF NOT EXISTS _try_deployments AS deployments ENGINE = Null;
CREATE TABLE IF NOT EXISTS _try_evaluations AS evaluations ENGINE = Null;
CREATE TABLE IF NOT EXISTS _try_jobs AS jobs ENGINE = Null;
CREATE TABLE IF NOT EXISTS _try_keys AS keys ENGINE = Null;

-- Views. Aliases end in _, so that none is a database's name.

CREATE OR REPLACE VIEW _echoes_of AS
SELECT span_id, argMin(echo_of, (far, apart, echo_of)) AS original FROM _echoed GROUP BY span_id;

CREATE OR REPLACE VIEW _homes_of AS
SELECT trace_id, toNullable(argMin(episode_id, (rank, start_ns, span_id))) AS home FROM _homes GROUP BY trace_id;

-- Every span with its payload. Once agents' own spans come, clickhouse_sql.py replaces this by what settles them: until
-- then nobody pays for it.
CREATE OR REPLACE VIEW _recorded AS SELECT * FROM calls;

CREATE OR REPLACE VIEW spans AS
SELECT * EXCEPT (input_messages, output_messages, tools, token_ids, logprobs, attributes, segment) FROM _recorded;

CREATE OR REPLACE VIEW echoes AS
SELECT own_.* EXCEPT (input_messages, output_messages, tools, token_ids, logprobs, attributes, segment),
  of_.original AS echo_of
FROM observed AS own_ JOIN _echoes_of AS of_ ON of_.span_id = own_.span_id;

CREATE OR REPLACE VIEW payloads_v AS
SELECT span_id, episode_id, start_ns, input_messages, output_messages, tools, token_ids, logprobs, attributes
FROM _recorded
UNION ALL
SELECT span_id, episode_id, start_ns, input_messages, output_messages, tools, token_ids, logprobs, attributes
FROM observed WHERE span_id IN (SELECT span_id FROM _echoed);

CREATE OR REPLACE VIEW spans_v AS
SELECT * EXCEPT (input_messages, output_messages, tools, token_ids, logprobs, attributes, segment, day, _is_call),
  if(_is_call, toNullable(toInt32(
    row_number() OVER (PARTITION BY episode_id, _is_call ORDER BY start_ns, span_id) - 1)), NULL) AS step,
  input_messages, output_messages, tools, token_ids, logprobs, attributes
FROM (
  SELECT *, ifNull(operation IN ('chat', 'text_completion', 'generate_content', 'embeddings', 'responses', 'messages',
    'other'), false) AS _is_call
  FROM _recorded
);

-- Where the targets of rewards lie. Of several spans with one response id or trace id the latest counts.
CREATE OR REPLACE VIEW _targets AS
SELECT 'span' AS target_kind, span_id AS target_id, toNullable(episode_id) AS found, toNullable(span_id) AS at
FROM spans WHERE span_id IN (SELECT target_id FROM rewards WHERE target_kind = 'span')
UNION ALL
SELECT 'span', of_.span_id, toNullable(span_.episode_id), toNullable(span_.span_id)
FROM (SELECT * FROM _echoes_of WHERE span_id IN (SELECT target_id FROM rewards WHERE target_kind = 'span')) AS of_
JOIN spans AS span_ ON span_.span_id = of_.original
UNION ALL
SELECT 'response', assumeNotNull(response_id), toNullable(argMax(episode_id, (start_ns, span_id))),
  toNullable(argMax(span_id, (start_ns, span_id)))
FROM spans WHERE response_id IN (SELECT target_id FROM rewards WHERE target_kind = 'response') GROUP BY response_id
UNION ALL
SELECT 'trace', assumeNotNull(trace_id), toNullable(argMax(episode_id, (start_ns, span_id))), NULL
FROM (
  SELECT trace_id, episode_id, start_ns, span_id FROM spans
  WHERE trace_id IN (SELECT target_id FROM rewards WHERE target_kind = 'trace')
  UNION ALL
  SELECT echo_.trace_id, span_.episode_id, span_.start_ns, span_.span_id
  FROM echoes AS echo_ JOIN spans AS span_ ON span_.span_id = echo_.echo_of
  WHERE echo_.trace_id IN (SELECT target_id FROM rewards WHERE target_kind = 'trace')
) GROUP BY trace_id;

CREATE OR REPLACE VIEW rewards_v AS
SELECT given_.reward_id AS reward_id, given_.target_kind AS target_kind, given_.target_id AS target_id,
  if(given_.target_kind = 'episode', toNullable(given_.target_id), there_.found) AS episode_id, there_.at AS span_id,
  given_.name AS name, given_.value AS value, given_.label AS label, given_.explanation AS explanation, given_.source AS source,
  given_.idempotency_key AS idempotency_key, given_.ts_ns AS ts_ns
FROM rewards AS given_ LEFT JOIN _targets AS there_
ON there_.target_kind = given_.target_kind AND there_.target_id = given_.target_id;

CREATE OR REPLACE VIEW _weights AS
SELECT name, weight FROM reward_weights WHERE revision = (SELECT max(revision) FROM reward_weights);

-- Per target and name the latest value counts; weighted values of an episode and its spans are summed.
CREATE OR REPLACE VIEW episode_rewards_v AS
SELECT assumeNotNull(each_.episode) AS episode_id, toNullable(sum(each_.latest * weight_.weight)) AS reward
FROM (
  SELECT target_kind, target_id, name, any(episode_id) AS episode, argMax(value, (ts_ns, reward_id)) AS latest
  FROM rewards_v WHERE episode_id IS NOT NULL AND name IN (SELECT name FROM _weights)
  GROUP BY target_kind, target_id, name
) AS each_ JOIN _weights AS weight_ ON weight_.name = each_.name
GROUP BY each_.episode;

CREATE OR REPLACE VIEW episodes AS
SELECT episode_id, first AS start_ns, last AS end_ns, toInt32(calls) AS steps, tokens_in AS input_tokens,
  tokens_out AS output_tokens, cost AS cost_usd, toInt32(failed) AS errors, prompt.1 AS prompt_slot,
  prompt.2 AS prompt_version, prompt.3 AS prompt_candidate
FROM (
  SELECT episode_id, min(start_ns) AS first, max(end_ns) AS last, countIf(_is_call) AS calls,
    sum(input_tokens) AS tokens_in, sum(output_tokens) AS tokens_out, sum(cost_usd) AS cost,
    countIf(status <> 'ok' AND _is_call) AS failed,
    argMinIf((prompt_slot, prompt_version, prompt_candidate), start_ns, prompt_slot IS NOT NULL) AS prompt
  FROM (
    SELECT *, ifNull(operation IN ('chat', 'text_completion', 'generate_content', 'embeddings', 'responses',
      'messages', 'other'), false) AS _is_call
    FROM spans
  ) GROUP BY episode_id
);

CREATE OR REPLACE VIEW episodes_v AS
SELECT one_.episode_id AS episode_id, one_.start_ns AS start_ns, one_.end_ns AS end_ns, one_.steps AS steps,
  one_.input_tokens AS input_tokens, one_.output_tokens AS output_tokens, one_.cost_usd AS cost_usd,
  one_.errors AS errors, judged_.reward AS reward, one_.prompt_slot AS prompt_slot, one_.prompt_version AS prompt_version,
  one_.prompt_candidate AS prompt_candidate
FROM episodes AS one_ LEFT JOIN episode_rewards_v AS judged_
ON judged_.episode_id = one_.episode_id;

CREATE OR REPLACE VIEW versions_v AS
SELECT slot, version, kind, hash, parent, created_ns, job_id, note, template, base_model, path, match, metrics
FROM versions;

CREATE OR REPLACE VIEW deployments_v AS
SELECT revision, slot, action, arms, evidence, job_id, note, ts_ns FROM deployments;

CREATE OR REPLACE VIEW jobs_v AS
SELECT job_id, kind, slot, status, spec, progress, result, ts_ns FROM jobs ORDER BY ts_ns DESC LIMIT 1 BY job_id;

CREATE OR REPLACE VIEW evaluations_v AS SELECT * EXCEPT (segment, day) FROM evaluations;
