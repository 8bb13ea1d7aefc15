"""Rows as OpenTelemetry spans: names of the GenAI semantic conventions, and `ratchet.*` where those have none.

Source: open-telemetry/semantic-conventions-genai (development status), attribute registry `gen_ai.*`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson

from collector.model import CALLS
from collector.otel_messages import of_parts, parsed, to_parts

SCOPE = "ratchet"
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
# Of an agent's own spans only.
_OBSERVED = {"agent_name": "gen_ai.agent.name", "tool_name": "gen_ai.tool.name"}
# Wire formats that the conventions know as `chat`.
_CHATS = ("responses", "messages")
EXTRA = frozenset(
    (
        "gen_ai.response.finish_reasons",
        "gen_ai.response.time_to_first_chunk",
        "gen_ai.system_instructions",
        "ratchet.operation",
        "ratchet.status",
    )
)


def attributes(row: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of one span; columns that are not known are left out."""
    found = {name: row[column] for column, name in ATTRIBUTES.items() if row.get(column) is not None}
    for column in ("input_messages", "output_messages"):
        if row.get(column) is not None:
            found[ATTRIBUTES[column]] = messages(row[column])
    found |= {name: row[column] for column, name in _OBSERVED.items() if row.get(column) is not None}
    if row.get("operation") in _CHATS:
        found |= {"gen_ai.operation.name": "chat", "ratchet.operation": row["operation"]}
    if row.get("finish_reason") is not None:
        found["gen_ai.response.finish_reasons"] = [row["finish_reason"]]
    if row.get("ttft_ms") is not None:
        found["gen_ai.response.time_to_first_chunk"] = row["ttft_ms"] / 1000
    if row.get("status") == "cancelled":
        found["ratchet.status"] = "cancelled"
    return _own(row.get("attributes")) | found


def _own(text: str | None) -> dict[str, Any]:
    """What an agent's own span carried goes back to its names; what the proxy noted goes into one attribute."""
    kept = parsed(text)
    if not isinstance(kept, dict):
        return {}
    seen = kept.get("otel")
    found = dict(seen) if isinstance(seen, dict) else {}
    ours = {name: value for name, value in kept.items() if name not in ("otel", "events", "resource", "scope")}
    return found | ({"ratchet.attributes": orjson.dumps(ours).decode()} if ours else {})


def messages(text: str) -> str:
    """OpenAI's messages as messages of parts; as they are where they would not come back the same."""
    held = parsed(text)
    if not isinstance(held, list) or not all(isinstance(one, dict) for one in held):
        return text
    made = orjson.dumps([to_parts(one) for one in held]).decode()
    return made if of_parts(made) == held else text


def name(row: Mapping[str, Any]) -> str:
    """The span's name: its own where it has one, else operation and model, as the conventions ask."""
    if row.get("name"):
        return str(row["name"])
    operation, model = row.get("operation") or "chat", row.get("request_model")
    operation = "chat" if operation in _CHATS else operation
    return f"{operation} {model}" if model else operation


def span(row: Mapping[str, Any]) -> dict[str, Any]:
    """One row of `spans_v` as a span in OTLP's JSON encoding: hex ids, int64 as strings."""
    failed = row.get("status") != "ok"
    return {
        "traceId": row["trace_id"],
        "spanId": row["span_id"],
        "parentSpanId": row.get("parent_span_id") or "",
        "name": name(row),
        "kind": 3 if row.get("operation", "chat") in CALLS else 1,  # CLIENT, INTERNAL
        "startTimeUnixNano": str(row["start_ns"]),
        "endTimeUnixNano": str(row["end_ns"]),
        "attributes": [{"key": key, "value": value(held)} for key, held in attributes(row).items()],
        "status": {"code": 2, "message": row.get("error_type") or ""} if failed else {"code": 1},
    }


def request(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of `spans_v` as the body of an OTLP/HTTP export in JSON."""
    scope = {"scope": {"name": SCOPE}, "spans": [span(row) for row in rows]}
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "ratchet"}}]}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]}


def value(given: Any) -> dict[str, Any]:
    """An AnyValue in OTLP's JSON."""
    for kind, encode in _ENCODERS:
        if isinstance(given, kind):
            return encode(given)
    return {"stringValue": orjson.dumps(given).decode()}


_ENCODERS: tuple[tuple[type, Callable[[Any], dict[str, Any]]], ...] = (
    (bool, lambda given: {"boolValue": given}),
    (int, lambda given: {"intValue": str(given)}),
    (float, lambda given: {"doubleValue": given}),
    (str, lambda given: {"stringValue": given}),
    (list, lambda given: {"arrayValue": {"values": [value(item) for item in given]}}),
)
