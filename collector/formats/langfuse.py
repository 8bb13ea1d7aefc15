"""Langfuse: observations and scores, one a record (API, blob storage), or a trace with both inside (the UI's download).

Names are camelCase in the API and the UI's files and snake_case in blob storage; both are read.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from collector.errors import BadInput
from collector.formats.bundle import Bundle, nanoseconds
from collector.formats.foreign import OPERATIONS, executed, first, messages, number, reward, row, times, whole
from collector.otel_messages import parsed

_TYPES = ("GENERATION", "SPAN", "EVENT", "AGENT", "TOOL", "CHAIN", "RETRIEVER", "EVALUATOR", "EMBEDDING", "GUARDRAIL")


def looks(found: Mapping[str, Any]) -> bool:
    """Whether a record is an observation, a score, or a trace with its observations."""
    if isinstance(found.get("observations"), list):
        return True
    if str(found.get("type", "")).upper() in _TYPES and first(found, "traceId", "trace_id") is not None:
        return "run_type" not in found
    return "value" in found and bool({"dataType", "data_type", "observationId", "observation_id"} & set(found))


def read(found: Mapping[str, Any]) -> Bundle:
    """The rows of a record. Raises BadInput."""
    bundle = Bundle()
    for one in _parts(found):
        if "value" in one and "startTime" not in one and "start_time" not in one:
            bundle.add(_score(one))
        elif first(one, "startTime", "start_time") is not None:
            bundle.spans.append(_observation(one))
    if not bundle:
        raise BadInput("holds neither an observation nor a numeric score")
    return bundle


def _parts(found: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    trace = found["trace"] if isinstance(found.get("trace"), Mapping) else found
    if not isinstance(found.get("observations"), list):
        yield found
        return
    for name in ("observations", "scores"):
        for one in found.get(name) or trace.get(name) or ():
            if isinstance(one, Mapping):
                yield {"traceId": trace.get("id"), **one}


def _observation(one: Mapping[str, Any]) -> dict[str, Any]:
    kind = str(one.get("type") or "span").lower()
    name, trace = first(one, "name"), first(one, "traceId", "trace_id")
    if trace is None or first(one, "id") is None:
        raise BadInput("an observation needs id and traceId")
    call = kind in ("generation", "embedding")
    given, gave = one.get("input"), one.get("output")
    inputs, outputs = (
        (messages(given, "user"), messages(gave, "assistant")) if call else _around(kind, name, given, gave)
    )
    parameters = parsed(first(one, "modelParameters", "model_parameters"))
    parameters = parameters if isinstance(parameters, Mapping) else {}
    failed = str(one.get("level") or "").upper() == "ERROR"
    model = first(one, "model", "providedModelName", "provided_model_name") if call else None
    start, end = times(first(one, "startTime", "start_time"), first(one, "endTime", "end_time"))
    began = first(one, "completionStartTime", "completion_start_time")
    return row(
        "langfuse",
        trace,
        one["id"],
        first(one, "parentObservationId", "parent_observation_id"),
        start_ns=start,
        end_ns=end,
        operation=OPERATIONS.get(kind, "span"),
        status="error" if failed else "ok",
        error_type=(str(first(one, "statusMessage", "status_message") or "error")[:256]) if failed else None,
        request_model=model,
        response_model=model,
        ttft_ms=None if began is None else max(0, nanoseconds(began, "completionStartTime") - start) / 1e6,
        temperature=number(parameters.get("temperature")),
        max_tokens=whole(parameters.get("max_tokens")),
        finish_reason=outputs[0].get("finish_reason") if call and outputs else None,
        cost_usd=number(first(one, "calculatedTotalCost", "totalCost", "total_cost")) if call else None,
        name=name,
        agent_name=name if kind == "agent" else None,
        tool_name=name if kind == "tool" else None,
        input_messages=inputs or None,
        output_messages=outputs or None,
        attributes=_rest(one) or None,
        **(_usage(one) if call else {}),
    )


def _around(kind: str, name: Any, given: Any, gave: Any) -> tuple[list[Any], list[Any]]:
    return executed(name, given, gave) if kind == "tool" else ([], [])


def _usage(one: Mapping[str, Any]) -> dict[str, Any]:
    usage = parsed(first(one, "usageDetails", "usage_details", "usage"))
    usage = usage if isinstance(usage, Mapping) else {}
    return {
        "input_tokens": whole(first(usage, "input", "prompt_tokens", "promptTokens")),
        "output_tokens": whole(first(usage, "output", "completion_tokens", "completionTokens")),
        "cached_tokens": whole(first(usage, "input_cached_tokens", "cache_read_input_tokens")),
    }


_KEPT = ("metadata", "version", "userId", "user_id", "sessionId", "session_id", "tags", "promptName", "promptVersion")


def _rest(one: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: parsed(one[name]) for name in _KEPT if one.get(name) not in (None, "", [], {})}
    if str(one.get("type") or "").upper() not in ("GENERATION", "TOOL", "EMBEDDING"):
        kept |= {name: parsed(one[name]) for name in ("input", "output") if one.get(name) is not None}
    return kept


def _score(one: Mapping[str, Any]) -> Bundle:
    value = one["value"]
    value = float(value) if isinstance(value, bool) else number(value)
    span, trace = first(one, "observationId", "observation_id"), first(one, "traceId", "trace_id")
    if value is None or (span is None and trace is None):
        raise BadInput("a score needs a number as value, and a traceId or an observationId")
    return reward(
        one.get("source"),
        "trace" if span is None else "span",
        trace if span is None else span,
        value=value,
        name=str(first(one, "name") or "reward"),
        label=first(one, "stringValue", "string_value"),
        explanation=first(one, "comment"),
        ts_ns=nanoseconds(first(one, "timestamp", "createdAt", "created_at") or 0, "timestamp"),
        idempotency_key=None if one.get("id") is None else f"langfuse:{one['id']}"[:256],
    )
