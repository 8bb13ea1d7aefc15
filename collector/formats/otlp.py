"""OTLP/JSON, a request a line, as OpenTelemetry's file exporter writes it: spans, then evaluations as log records."""

from collections.abc import Mapping
from typing import Any

import orjson

from collector import otel, otel_in
from collector import otlp as wire
from collector.errors import BadInput
from collector.formats.bundle import Bundle, reward_in, reward_out, span_in, span_out

# What the conventions have no name for, so that nothing is lost on the way.
ROW = "ratchet.row"
_EXTRA = ("route", "source", "request_bytes", "response_bytes", "token_ids", "logprobs", "parent_span_id", "stream")
# What a reader infers where it is missing: here a missing one is missing.
_INFERRED = ("finish_reason", "error_type")
JUDGED = {"name": "gen_ai.evaluation.name", "value": "gen_ai.evaluation.score.value"} | {
    "label": "gen_ai.evaluation.score.label",
    "explanation": "gen_ai.evaluation.explanation",
    "reward_id": "ratchet.reward.id",
    "target_kind": "ratchet.reward.target_kind",
    "target_id": "ratchet.reward.target_id",
    "source": "ratchet.reward.source",
    "idempotency_key": "ratchet.reward.idempotency_key",
}


def line(episode: Mapping[str, Any]) -> bytes:
    """One episode of the export API as one or two lines."""
    found = b""
    if episode["spans"]:
        rows = [span_in(span_out(row)) for row in (*episode["spans"], *episode["echoes"])]
        body = otel.request(rows)
        spans = body["resourceSpans"][0]["scopeSpans"][0]["spans"]
        for row, span in zip(rows, spans, strict=True):
            kept = {name: row[name] for name in (*_EXTRA, *_lossy(row)) if row.get(name) is not None}
            kept |= {name: row.get(name) for name in _INFERRED}
            span["attributes"].append({"key": ROW, "value": {"stringValue": orjson.dumps(kept).decode()}})
        found += orjson.dumps(body) + b"\n"
    if episode["rewards"]:
        found += orjson.dumps(logs(episode["rewards"])) + b"\n"
    return found


def _lossy(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that the conventions' names don't give back as they are."""
    texts = ("input_messages", "output_messages")
    kept = tuple(name for name in texts if row.get(name) is not None and otel.messages(row[name]) == row[name])
    # Of an agent's own span, `attributes` hold events and where it came from too.
    return ("attributes", "tools", *(("name", *texts) if row["source"] == "otlp" else kept))


def logs(rewards: Any) -> dict[str, Any]:
    """Rewards as `gen_ai.evaluation.result` records, the body of an OTLP/HTTP logs export in JSON."""
    records = [evaluation(reward_out(reward)) for reward in rewards]
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "ratchet"}}]}
    return {
        "resourceLogs": [{"resource": resource, "scopeLogs": [{"scope": {"name": otel.SCOPE}, "logRecords": records}]}]
    }


def evaluation(reward: Mapping[str, Any]) -> dict[str, Any]:
    """One reward as a log record."""
    attributes = {JUDGED[name]: value for name, value in reward.items() if name in JUDGED}
    if reward["target_kind"] == "response":
        attributes["gen_ai.response.id"] = reward["target_id"]
    return {
        "timeUnixNano": str(reward["ts_ns"]),
        "eventName": otel_in.EVALUATION,
        "traceId": reward["target_id"] if reward["target_kind"] == "trace" else "",
        "spanId": reward["target_id"] if reward["target_kind"] == "span" else "",
        "attributes": [{"key": key, "value": otel.value(value)} for key, value in attributes.items()],
    }


def looks(found: Mapping[str, Any]) -> bool:
    """Whether a record is an export request."""
    return "resourceSpans" in found or "resourceLogs" in found


def read(found: Mapping[str, Any]) -> Bundle:
    """The rows of a request. Raises BadInput."""
    body = orjson.dumps(found)
    bundle = Bundle()
    if "resourceSpans" in found:
        batch = wire.read(body, wire.JSON, "traces")
        _complain(batch.faults)
        bundle.spans = [_row(span) for span in batch.spans]
        judged, faults = otel_in.rewards(batch.spans)
        _complain(faults)
        bundle.rewards = [_reward(one) for one in judged]
    if "resourceLogs" in found:
        batch = wire.read(body, wire.JSON, "logs")
        _complain(batch.faults)
        bundle.rewards += [_reward(otel_in.evaluation(log)) for log in batch.logs if log.name == otel_in.EVALUATION]
    return bundle


def _complain(faults: list[str]) -> None:
    if faults:
        raise BadInput(faults[0])


def _row(span: wire.Span) -> dict[str, Any]:
    kept = span.attributes.pop(ROW, None)
    made = orjson.loads(orjson.dumps(otel_in.row(span)))
    if isinstance(kept, str):
        made = {**made, "attributes": None, **orjson.loads(kept)}
    if made["source"] != "otlp":
        made["name"] = None
    return span_in(made)


def _reward(reward: Any) -> dict[str, Any]:
    return reward_in(orjson.loads(orjson.dumps(reward)))
