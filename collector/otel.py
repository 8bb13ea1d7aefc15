"""Rows as OpenTelemetry spans: names of the GenAI semantic conventions, and `ratchet.*` where those have none.

Source: open-telemetry/semantic-conventions-genai (development status), attribute registry `gen_ai.*`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson

# column -> attribute
ATTRIBUTES = {
    "operation": "gen_ai.operation.name",
    "provider": "gen_ai.provider.name",
    "request_model": "gen_ai.request.model",
    "response_model": "gen_ai.response.model",
    "response_id": "gen_ai.response.id",
    "stream": "gen_ai.request.stream",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "max_tokens": "gen_ai.request.max_tokens",
    "seed": "gen_ai.request.seed",
    "input_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "input_messages": "gen_ai.input.messages",
    "output_messages": "gen_ai.output.messages",
    "tools": "gen_ai.tool.definitions",
    "prompt_slot": "gen_ai.prompt.name",
    "error_type": "error.type",
    "http_status": "http.response.status_code",
    "episode_id": "ratchet.episode.id",
    "episode_source": "ratchet.episode.source",
    "prompt_version": "ratchet.prompt.version",
    "prompt_candidate": "ratchet.prompt.candidate",
    "adapter_slot": "ratchet.adapter.name",
    "adapter_version": "ratchet.adapter.version",
    "propensity": "ratchet.propensity",
    "cost_usd": "ratchet.cost.usd",
    "attempts": "ratchet.attempts",
}


def attributes(row: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of one span; columns that are not known are left out."""
    found = {name: row[column] for column, name in ATTRIBUTES.items() if row.get(column) is not None}
    if row.get("finish_reason") is not None:
        found["gen_ai.response.finish_reasons"] = [row["finish_reason"]]
    if row.get("ttft_ms") is not None:
        found["gen_ai.response.time_to_first_chunk"] = row["ttft_ms"] / 1000
    return found


def span(row: Mapping[str, Any]) -> dict[str, Any]:
    """One row of `spans_v` as a span in OTLP's JSON encoding: hex ids, int64 as strings."""
    operation, model = row.get("operation") or "chat", row.get("request_model")
    failed = row.get("status") != "ok"
    return {
        "traceId": row["trace_id"],
        "spanId": row["span_id"],
        "parentSpanId": row.get("parent_span_id") or "",
        "name": f"{operation} {model}" if model else operation,
        "kind": 3,  # CLIENT
        "startTimeUnixNano": str(row["start_ns"]),
        "endTimeUnixNano": str(row["end_ns"]),
        "attributes": [{"key": key, "value": _value(value)} for key, value in attributes(row).items()],
        "status": {"code": 2, "message": row.get("error_type") or ""} if failed else {"code": 1},
    }


def request(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of `spans_v` as the body of an OTLP/HTTP export in JSON."""
    scope = {"scope": {"name": "ratchet"}, "spans": [span(row) for row in rows]}
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "ratchet"}}]}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]}


def _value(value: Any) -> dict[str, Any]:
    for kind, encode in _ENCODERS:
        if isinstance(value, kind):
            return encode(value)
    return {"stringValue": orjson.dumps(value).decode()}


_ENCODERS: tuple[tuple[type, Callable[[Any], dict[str, Any]]], ...] = (
    (bool, lambda value: {"boolValue": value}),
    (int, lambda value: {"intValue": str(value)}),
    (float, lambda value: {"doubleValue": value}),
    (str, lambda value: {"stringValue": value}),
    (list, lambda value: {"arrayValue": {"values": [_value(item) for item in value]}}),
)
