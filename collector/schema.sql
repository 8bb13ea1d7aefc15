-- The projection: tables without keys and secondary indexes; readers use the views (*_v).
-- Everything here can be rebuilt from the journal. When this text changes, the store is rebuilt at the next start.

-- Tables

CREATE TABLE IF NOT EXISTS _meta (key VARCHAR, value VARCHAR);

-- A journal segment is loaded if and only if its name is here: both are written in one transaction.
-- `batch` counts the transactions that loaded; `day` (since 1970, UTC) is that of the journal to which rows belong.
CREATE TABLE IF NOT EXISTS _segments (
  name VARCHAR, lines BIGINT, quarantined BIGINT, bytes BIGINT, loaded_ns BIGINT, batch BIGINT, day INTEGER
);

-- Days of the journal whose payloads stand in a Parquet file of the archive. `kept`: not deleted by retention.
CREATE TABLE IF NOT EXISTS _parts (day INTEGER, spans BIGINT, segments BIGINT, kept BOOLEAN);

-- `episodes` holds the spans of all batches up to `batch`; episodes in _dirty are to be counted anew.
CREATE TABLE IF NOT EXISTS _folds (fold BIGINT, batch BIGINT);
CREATE TABLE IF NOT EXISTS _dirty (episode_id VARCHAR);

CREATE TABLE IF NOT EXISTS reward_weights (name VARCHAR, weight DOUBLE);

CREATE TABLE IF NOT EXISTS spans (
  span_id VARCHAR, trace_id VARCHAR, parent_span_id VARCHAR, episode_id VARCHAR, episode_source VARCHAR,
  source VARCHAR, operation VARCHAR, route VARCHAR, start_ns BIGINT, end_ns BIGINT, ttft_ms DOUBLE, attempts INTEGER,
  status VARCHAR, http_status INTEGER, error_type VARCHAR, provider VARCHAR, request_model VARCHAR,
  response_model VARCHAR, response_id VARCHAR, finish_reason VARCHAR, stream BOOLEAN, temperature DOUBLE,
  top_p DOUBLE, max_tokens BIGINT, seed BIGINT, input_tokens BIGINT, output_tokens BIGINT, cached_tokens BIGINT,
  cost_usd DOUBLE, prompt_slot VARCHAR, prompt_version INTEGER, prompt_candidate VARCHAR, adapter_slot VARCHAR,
  adapter_version INTEGER, propensity DOUBLE, request_bytes BIGINT, response_bytes BIGINT,
  name VARCHAR, agent_name VARCHAR, tool_name VARCHAR, batch BIGINT, day INTEGER
);

-- Spans of agents' own instrumentation that repeat a recorded call (echo_of): kept, counted nowhere.
CREATE TABLE IF NOT EXISTS echoes AS SELECT *, CAST(NULL AS VARCHAR) AS echo_of FROM spans LIMIT 0;

CREATE TABLE IF NOT EXISTS payloads (
  span_id VARCHAR, episode_id VARCHAR, start_ns BIGINT,
  input_messages VARCHAR USING COMPRESSION zstd, output_messages VARCHAR USING COMPRESSION zstd,
  tools VARCHAR USING COMPRESSION zstd, token_ids VARCHAR USING COMPRESSION zstd,
  logprobs VARCHAR USING COMPRESSION zstd, attributes VARCHAR USING COMPRESSION zstd, day INTEGER
);

-- Long ones wait here for those of the same episode (histories.py).
CREATE TABLE IF NOT EXISTS fresh_payloads (
  span_id VARCHAR, episode_id VARCHAR, start_ns BIGINT,
  input_messages VARCHAR USING COMPRESSION zstd, output_messages VARCHAR USING COMPRESSION zstd,
  tools VARCHAR USING COMPRESSION zstd, token_ids VARCHAR USING COMPRESSION zstd,
  logprobs VARCHAR USING COMPRESSION zstd, attributes VARCHAR USING COMPRESSION zstd, day INTEGER
);

CREATE TABLE IF NOT EXISTS rewards (
  reward_id VARCHAR, target_kind VARCHAR, target_id VARCHAR, name VARCHAR, value DOUBLE, label VARCHAR,
  explanation VARCHAR, source VARCHAR, idempotency_key VARCHAR, ts_ns BIGINT, day INTEGER, target_key UBIGINT
);

-- One row an episode, derived from `spans` (fold.py).
CREATE TABLE IF NOT EXISTS episodes (
  episode_id VARCHAR, start_ns BIGINT, end_ns BIGINT, steps INTEGER, input_tokens BIGINT, output_tokens BIGINT,
  cost_usd DOUBLE, errors INTEGER, prompt_ns BIGINT,
  prompt STRUCT(slot VARCHAR, version INTEGER, candidate VARCHAR), fold BIGINT
);

CREATE TABLE IF NOT EXISTS versions (
  slot VARCHAR, version INTEGER, kind VARCHAR, hash VARCHAR, template VARCHAR, base_model VARCHAR, path VARCHAR,
  match VARCHAR, parent INTEGER, job_id VARCHAR, note VARCHAR, metrics VARCHAR, created_ns BIGINT
);

CREATE TABLE IF NOT EXISTS candidates (slot VARCHAR, candidate VARCHAR, template VARCHAR, ts_ns BIGINT);

CREATE TABLE IF NOT EXISTS deployments (
  revision BIGINT, slot VARCHAR, action VARCHAR, arms VARCHAR, evidence VARCHAR, job_id VARCHAR, note VARCHAR,
  ts_ns BIGINT
);

CREATE TABLE IF NOT EXISTS evaluations (
  evaluation_id VARCHAR, job_id VARCHAR, slot VARCHAR, version_hash VARCHAR, task_id VARCHAR, replicate INTEGER,
  arm VARCHAR, subset VARCHAR, episode_id VARCHAR, reward DOUBLE, ok BOOLEAN, reason VARCHAR, answer VARCHAR,
  seconds DOUBLE, input_tokens BIGINT, output_tokens BIGINT, calls BIGINT, cost_usd DOUBLE, model VARCHAR,
  ts_ns BIGINT
);

CREATE TABLE IF NOT EXISTS jobs (
  job_id VARCHAR, kind VARCHAR, slot VARCHAR, status VARCHAR, spec VARCHAR, progress VARCHAR, result VARCHAR,
  ts_ns BIGINT
);

-- Keys that were made and revoked. Their secrets are nowhere, only the sha256.
CREATE TABLE IF NOT EXISTS keys (
  key_id VARCHAR, action VARCHAR, name VARCHAR, key_sha256 VARCHAR, scopes VARCHAR, limits VARCHAR, ts_ns BIGINT
);

-- Calls of a model, the steps of an episode; `CALLS` of model.py says the same.
CREATE OR REPLACE MACRO is_call(operation) AS
  operation IN ('chat', 'text_completion', 'generate_content', 'embeddings', 'responses', 'messages', 'other');

-- What the spans of later batches than one add to their episodes.
CREATE OR REPLACE MACRO span_sums(batch_above) AS TABLE
SELECT episode_id, min(start_ns) AS start_ns, max(end_ns) AS end_ns,
  CAST(count(*) FILTER (is_call(operation)) AS INTEGER) AS steps,
  CAST(sum(input_tokens) AS BIGINT) AS input_tokens, CAST(sum(output_tokens) AS BIGINT) AS output_tokens,
  sum(cost_usd) AS cost_usd, CAST(count(*) FILTER (status <> 'ok' AND is_call(operation)) AS INTEGER) AS errors,
  min(start_ns) FILTER (prompt_slot IS NOT NULL) AS prompt_ns,
  arg_min({'slot': prompt_slot, 'version': prompt_version, 'candidate': prompt_candidate}, start_ns)
    FILTER (prompt_slot IS NOT NULL) AS prompt
FROM spans WHERE batch > batch_above GROUP BY episode_id;

-- A number to look a reward's target up by.
CREATE OR REPLACE MACRO key_of(identifier) AS hash(identifier);

-- Journal segments as rows: files is a list of paths, size the longest line that may occur

-- `kind`: 'span' of the proxy, 'otlp' of agents' own instrumentation.
CREATE OR REPLACE MACRO journal_calls(files, size, kind) AS TABLE
SELECT * EXCLUDE (event) FROM read_ndjson(files, maximum_object_size = size, columns = {
  event: 'VARCHAR', span_id: 'VARCHAR', trace_id: 'VARCHAR', parent_span_id: 'VARCHAR', episode_id: 'VARCHAR',
  episode_source: 'VARCHAR', source: 'VARCHAR', operation: 'VARCHAR', route: 'VARCHAR', start_ns: 'BIGINT',
  end_ns: 'BIGINT', ttft_ms: 'DOUBLE', attempts: 'INTEGER', status: 'VARCHAR', http_status: 'INTEGER',
  error_type: 'VARCHAR', provider: 'VARCHAR', request_model: 'VARCHAR', response_model: 'VARCHAR',
  response_id: 'VARCHAR', finish_reason: 'VARCHAR', stream: 'BOOLEAN', temperature: 'DOUBLE', top_p: 'DOUBLE',
  max_tokens: 'BIGINT', seed: 'BIGINT', input_tokens: 'BIGINT', output_tokens: 'BIGINT', cached_tokens: 'BIGINT',
  cost_usd: 'DOUBLE', prompt_slot: 'VARCHAR', prompt_version: 'INTEGER', prompt_candidate: 'VARCHAR',
  adapter_slot: 'VARCHAR', adapter_version: 'INTEGER', propensity: 'DOUBLE', request_bytes: 'BIGINT',
  response_bytes: 'BIGINT', name: 'VARCHAR', agent_name: 'VARCHAR', tool_name: 'VARCHAR'
}) WHERE event = kind;

CREATE OR REPLACE MACRO journal_payloads(files, size, kind) AS TABLE
SELECT * EXCLUDE (event) FROM read_ndjson(files, maximum_object_size = size, columns = {
  event: 'VARCHAR', span_id: 'VARCHAR', episode_id: 'VARCHAR', start_ns: 'BIGINT', input_messages: 'VARCHAR',
  output_messages: 'VARCHAR', tools: 'VARCHAR', token_ids: 'VARCHAR', logprobs: 'VARCHAR', attributes: 'VARCHAR'
}) WHERE event = kind;

CREATE OR REPLACE MACRO journal_rewards(files, size) AS TABLE
SELECT * EXCLUDE (event) FROM read_ndjson(files, maximum_object_size = size, columns = {
  event: 'VARCHAR', reward_id: 'VARCHAR', target_kind: 'VARCHAR', target_id: 'VARCHAR', name: 'VARCHAR',
  value: 'DOUBLE', label: 'VARCHAR', explanation: 'VARCHAR', source: 'VARCHAR', idempotency_key: 'VARCHAR',
  ts_ns: 'BIGINT'
}) WHERE event = 'reward';

CREATE OR REPLACE MACRO journal_versions(files, size) AS TABLE
SELECT * EXCLUDE (event) FROM read_ndjson(files, maximum_object_size = size, columns = {
  event: 'VARCHAR', slot: 'VARCHAR', version: 'INTEGER', kind: 'VARCHAR', hash: 'VARCHAR', template: 'VARCHAR',
  base_model: 'VARCHAR', path: 'VARCHAR', match: 'VARCHAR', parent: 'INTEGER', job_id: 'VARCHAR', note: 'VARCHAR',
  metrics: 'VARCHAR', created_ns: 'BIGINT'
}) WHERE event = 'version';

CREATE OR REPLACE MACRO journal_candidates(files, size) AS TABLE
SELECT * EXCLUDE (event) FROM read_ndjson(files, maximum_object_size = size, columns = {
  event: 'VARCHAR', slot: 'VARCHAR', candidate: 'VARCHAR', template: 'VARCHAR', ts_ns: 'BIGINT'
}) WHERE event = 'candidate';

CREATE OR REPLACE MACRO journal_deployments(files, size) AS TABLE
SELECT * EXCLUDE (event) FROM read_ndjson(files, maximum_object_size = size, columns = {
  event: 'VARCHAR', revision: 'BIGINT', slot: 'VARCHAR', action: 'VARCHAR', arms: 'VARCHAR', evidence: 'VARCHAR',
  job_id: 'VARCHAR', note: 'VARCHAR', ts_ns: 'BIGINT'
}) WHERE event = 'deployment';

CREATE OR REPLACE MACRO journal_evaluations(files, size) AS TABLE
SELECT * EXCLUDE (event) FROM read_ndjson(files, maximum_object_size = size, columns = {
  event: 'VARCHAR', evaluation_id: 'VARCHAR', job_id: 'VARCHAR', slot: 'VARCHAR', version_hash: 'VARCHAR',
  task_id: 'VARCHAR', replicate: 'INTEGER', arm: 'VARCHAR', subset: 'VARCHAR', episode_id: 'VARCHAR',
  reward: 'DOUBLE', ok: 'BOOLEAN', reason: 'VARCHAR', answer: 'VARCHAR', seconds: 'DOUBLE', input_tokens: 'BIGINT',
  output_tokens: 'BIGINT', calls: 'BIGINT', cost_usd: 'DOUBLE', model: 'VARCHAR', ts_ns: 'BIGINT'
}) WHERE event = 'evaluation';

CREATE OR REPLACE MACRO journal_jobs(files, size) AS TABLE
SELECT * EXCLUDE (event) FROM read_ndjson(files, maximum_object_size = size, columns = {
  event: 'VARCHAR', job_id: 'VARCHAR', kind: 'VARCHAR', slot: 'VARCHAR', status: 'VARCHAR', spec: 'VARCHAR',
  progress: 'VARCHAR', result: 'VARCHAR', ts_ns: 'BIGINT'
}) WHERE event = 'job';

CREATE OR REPLACE MACRO journal_keys(files, size) AS TABLE
SELECT * EXCLUDE (event) FROM read_ndjson(files, maximum_object_size = size, columns = {
  event: 'VARCHAR', key_id: 'VARCHAR', action: 'VARCHAR', name: 'VARCHAR', key_sha256: 'VARCHAR', scopes: 'VARCHAR',
  limits: 'VARCHAR', ts_ns: 'BIGINT'
}) WHERE event = 'key';

-- Views

-- Payloads of the days in the archive, beside those of the days since. The variable lists Parquet files.
CREATE OR REPLACE VIEW payloads_v AS
SELECT * EXCLUDE (day) FROM payloads
UNION ALL BY NAME
SELECT * EXCLUDE (day) FROM fresh_payloads
UNION ALL BY NAME
SELECT span_id, episode_id, start_ns, input_messages, output_messages, tools, token_ids, logprobs, attributes
FROM read_parquet(getvariable('archived_payloads'));

CREATE OR REPLACE VIEW spans_v AS
SELECT s.* EXCLUDE (batch, day),
  CASE WHEN is_call(s.operation) THEN CAST(row_number() OVER (
    PARTITION BY s.episode_id, is_call(s.operation) ORDER BY s.start_ns, s.span_id) - 1 AS INTEGER) END AS step,
  p.input_messages, p.output_messages, p.tools, p.token_ids, p.logprobs, p.attributes
FROM spans s LEFT JOIN payloads_v p USING (span_id);

-- Where each reward belongs. Of several spans with one response id or trace id the latest counts.
CREATE OR REPLACE VIEW rewards_v AS
WITH
by_span AS (
  SELECT r.reward_id, s.episode_id, s.span_id
  FROM rewards r JOIN spans s ON s.span_id = r.target_id WHERE r.target_kind = 'span'
  UNION ALL
  SELECT r.reward_id, s.episode_id, s.span_id
  FROM rewards r JOIN echoes e ON e.span_id = r.target_id JOIN spans s ON s.span_id = e.echo_of
  WHERE r.target_kind = 'span'
),
by_response AS (
  SELECT r.reward_id, s.episode_id, s.span_id
  FROM rewards r JOIN spans s ON s.response_id = r.target_id WHERE r.target_kind = 'response'
  QUALIFY row_number() OVER (PARTITION BY r.reward_id ORDER BY s.start_ns DESC, s.span_id DESC) = 1
),
by_trace AS (
  SELECT r.reward_id, s.episode_id, CAST(NULL AS VARCHAR) AS span_id
  FROM rewards r JOIN (
    SELECT trace_id, episode_id, start_ns, span_id FROM spans
    UNION ALL
    SELECT e.trace_id, o.episode_id, o.start_ns, o.span_id FROM echoes e JOIN spans o ON o.span_id = e.echo_of
  ) s ON s.trace_id = r.target_id WHERE r.target_kind = 'trace'
  QUALIFY row_number() OVER (PARTITION BY r.reward_id ORDER BY s.start_ns DESC, s.span_id DESC) = 1
),
found AS (FROM by_span UNION ALL FROM by_response UNION ALL FROM by_trace)
SELECT r.reward_id, r.target_kind, r.target_id,
  CASE WHEN r.target_kind = 'episode' THEN r.target_id ELSE f.episode_id END AS episode_id,
  f.span_id, r.name, r.value, r.label, r.explanation, r.source, r.idempotency_key, r.ts_ns
FROM rewards r LEFT JOIN found f USING (reward_id);

-- Per target and name the latest value counts; weighted values of an episode and its spans are summed. Which of several
-- is the latest is asked only where there are several: comparing pairs costs more than all the rest.
CREATE OR REPLACE VIEW episode_rewards_v AS
WITH counted AS MATERIALIZED (
  SELECT target_kind, target_id, name, any_value(value) AS value, count(*) AS times
  FROM rewards WHERE name IN (SELECT name FROM reward_weights) GROUP BY ALL
),
latest AS MATERIALIZED (
  SELECT target_kind, target_id, name, value FROM counted WHERE times = 1
  UNION ALL
  SELECT target_kind, target_id, name, arg_max(r.value, {'at': r.ts_ns, 'id': r.reward_id}) AS value
  FROM rewards r JOIN counted c USING (target_kind, target_id, name) WHERE c.times > 1 GROUP BY ALL
),
answered AS (
  SELECT l.target_id, l.name, any_value(l.value) AS value, any_value(s.episode_id) AS episode_id, count(*) AS spans
  FROM latest l JOIN spans s ON s.response_id = l.target_id WHERE l.target_kind = 'response'
  GROUP BY l.target_id, l.name
),
placed AS (
  SELECT target_id AS episode_id, name, value FROM latest WHERE target_kind = 'episode'
  UNION ALL
  SELECT s.episode_id, l.name, l.value FROM latest l JOIN spans s ON s.span_id = l.target_id
  WHERE l.target_kind = 'span'
  UNION ALL
  SELECT s.episode_id, l.name, l.value FROM latest l JOIN echoes e ON e.span_id = l.target_id
  JOIN spans s ON s.span_id = e.echo_of WHERE l.target_kind = 'span'
  UNION ALL
  SELECT episode_id, name, value FROM answered WHERE spans = 1
  UNION ALL
  SELECT arg_max(s.episode_id, {'at': s.start_ns, 'id': s.span_id}), a.name, any_value(a.value)
  FROM answered a JOIN spans s ON s.response_id = a.target_id WHERE a.spans > 1 GROUP BY a.target_id, a.name
  UNION ALL
  SELECT arg_max(s.episode_id, {'at': s.start_ns, 'id': s.span_id}), l.name, any_value(l.value) FROM latest l JOIN (
    SELECT trace_id, episode_id, start_ns, span_id FROM spans
    UNION ALL
    SELECT e.trace_id, o.episode_id, o.start_ns, o.span_id FROM echoes e JOIN spans o ON o.span_id = e.echo_of
  ) s ON s.trace_id = l.target_id WHERE l.target_kind = 'trace' GROUP BY l.target_id, l.name
)
SELECT p.episode_id, sum(p.value * w.weight) AS reward FROM placed p JOIN reward_weights w USING (name)
GROUP BY p.episode_id;

CREATE OR REPLACE VIEW episodes_v AS
SELECT e.* EXCLUDE (prompt_ns, prompt, fold), r.reward, e.prompt.slot AS prompt_slot,
  e.prompt.version AS prompt_version, e.prompt.candidate AS prompt_candidate
FROM episodes e LEFT JOIN episode_rewards_v r USING (episode_id);

CREATE OR REPLACE VIEW versions_v AS
SELECT slot, version, kind, hash, parent, created_ns, job_id, note, template, base_model, path, match, metrics
FROM versions;

CREATE OR REPLACE VIEW deployments_v AS
SELECT revision, slot, action, arms, evidence, job_id, note, ts_ns FROM deployments;

CREATE OR REPLACE VIEW jobs_v AS
SELECT * FROM jobs QUALIFY row_number() OVER (PARTITION BY job_id ORDER BY ts_ns DESC, rowid DESC) = 1;

CREATE OR REPLACE VIEW evaluations_v AS SELECT * FROM evaluations;
