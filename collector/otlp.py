"""OTLP/HTTP bodies, protobuf or JSON, as plain values; and the official answers to them.

Source: opentelemetry-proto `collector/{trace,logs}/v1`, and the OTLP specification for its JSON (hex ids, 64-bit
integers as text, lowerCamelCase names). Protobuf's own JSON mapping is not used: it takes hex ids for base64.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from collector.errors import BadInput

PROTOBUF = "application/x-protobuf"
JSON = "application/json"
Signal = Literal["traces", "logs"]
LARGEST = (1 << 63) - 1
_DEPTH = 32
_HEX = {size: re.compile(f"[0-9a-fA-F]{{{size}}}") for size in (16, 32)}
_INVALID_ARGUMENT, _UNAVAILABLE = 3, 14  # google.rpc.Code


class BadPayload(BadInput):
    """400: the body is no OTLP of the said kind; senders must not send it again."""

    status = 400
    code = "invalid_otlp"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened during a span, or a log record. Ids are hex; None where the record names no span."""

    name: str
    ts_ns: int
    attributes: dict[str, Any]
    trace_id: str | None = None
    span_id: str | None = None
    body: Any = None


@dataclass(frozen=True, slots=True)
class Span:
    """One span as it came. `failed`: its status is an error."""

    trace_id: str
    span_id: str
    parent_span_id: str | None
    name: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: list[Event]
    failed: bool
    message: str
    resource: dict[str, Any]
    scope: str


@dataclass(slots=True)
class Batch:
    """What a body held: whole items, and for each that was refused why."""

    spans: list[Span] = field(default_factory=list)
    logs: list[Event] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def media_type(content_type: str | None) -> str:
    """PROTOBUF or JSON. Raises BadPayload for anything else."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind not in (PROTOBUF, JSON):
        shown = kind[:100] or "nothing"
        raise BadPayload(f"content-type: must be {PROTOBUF} or {JSON}, not {shown}", param="content-type")
    return kind


def read(body: bytes, kind: str, signal: Signal) -> Batch:
    """The spans or log records of an export. Raises BadPayload where it is none; a single bad item is a fault."""
    tree = _json(body) if kind == JSON else _protobuf(body, signal)
    batch = Batch()
    if signal == "traces":
        _each(tree, ("resourceSpans", "scopeSpans", "spans"), batch, _span, batch.spans)
    else:
        _each(tree, ("resourceLogs", "scopeLogs", "logRecords"), batch, _log, batch.logs)
    if batch.faults and not batch.spans and not batch.logs:
        raise BadPayload(batch.faults[0], param=batch.faults[0].partition(":")[0])
    return batch


def answer(kind: str, signal: Signal, rejected: int = 0, message: str = "") -> bytes:
    """The official response: empty, or with a partial success that counts what was rejected and says why."""
    name = "rejectedSpans" if signal == "traces" else "rejectedLogRecords"
    if kind == JSON:
        partial = {name: str(rejected), "errorMessage": message} if rejected or message else {}
        return orjson.dumps({"partialSuccess": partial} if partial else {})
    from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as logs
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as traces

    if signal == "traces":
        told = traces.ExportTraceServiceResponse()
        if rejected or message:
            told.partial_success.rejected_spans = rejected
            told.partial_success.error_message = message
        return bytes(told.SerializeToString())
    said = logs.ExportLogsServiceResponse()
    if rejected or message:
        said.partial_success.rejected_log_records = rejected
        said.partial_success.error_message = message
    return bytes(said.SerializeToString())


def failure(kind: str, message: str, envelope: Mapping[str, Any], *, retry: bool) -> bytes:
    """The body of an error: a google.rpc.Status, in JSON beside our own envelope."""
    code = _UNAVAILABLE if retry else _INVALID_ARGUMENT
    if kind != PROTOBUF:
        return orjson.dumps({"code": code, "message": message, **envelope})
    from google.rpc.status_pb2 import Status

    return bytes(Status(code=code, message=message).SerializeToString())


def _json(body: bytes) -> Any:
    try:
        tree = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadPayload(f"body: is not JSON: {error}", param="body") from None
    if not isinstance(tree, dict):
        raise BadPayload("body: must be a JSON object", param="body")
    return tree


def _protobuf(body: bytes, signal: Signal) -> Any:
    """The message in the shape of OTLP's JSON, with ids in hex and values decoded."""
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as logs
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as traces

    request = traces.ExportTraceServiceRequest() if signal == "traces" else logs.ExportLogsServiceRequest()
    try:
        request.ParseFromString(body)
    except DecodeError as error:
        raise BadPayload(f"body: is no protobuf Export request of {signal}: {error}", param="body") from None
    outer = request.resource_spans if signal == "traces" else request.resource_logs
    names = ("resourceSpans", "scopeSpans", "spans") if signal == "traces" else _LOGS
    convert = _proto_span if signal == "traces" else _proto_log
    return {
        names[0]: [
            {
                "resource": {"attributes": list(_pairs(one.resource.attributes))},
                names[1]: [
                    {"scope": {"name": scoped.scope.name}, names[2]: [convert(item) for item in items]}
                    for scoped, items in _scoped(one, signal)
                ],
            }
            for one in outer
        ]
    }


_LOGS = ("resourceLogs", "scopeLogs", "logRecords")


def _scoped(one: Any, signal: Signal) -> Iterator[tuple[Any, Any]]:
    for scoped in one.scope_spans if signal == "traces" else one.scope_logs:
        yield scoped, scoped.spans if signal == "traces" else scoped.log_records


def _proto_span(span: Any) -> dict[str, Any]:
    return {
        "traceId": span.trace_id.hex(),
        "spanId": span.span_id.hex(),
        "parentSpanId": span.parent_span_id.hex(),
        "name": span.name,
        "startTimeUnixNano": span.start_time_unix_nano,
        "endTimeUnixNano": span.end_time_unix_nano,
        "attributes": list(_pairs(span.attributes)),
        "events": [
            {"name": event.name, "timeUnixNano": event.time_unix_nano, "attributes": list(_pairs(event.attributes))}
            for event in span.events
        ],
        "status": {"code": span.status.code, "message": span.status.message},
    }


def _proto_log(log: Any) -> dict[str, Any]:
    return {
        "traceId": log.trace_id.hex(),
        "spanId": log.span_id.hex(),
        "eventName": log.event_name,
        "timeUnixNano": log.time_unix_nano or log.observed_time_unix_nano,
        "attributes": list(_pairs(log.attributes)),
        "body": _Decoded(_proto_value(log.body)),
    }


class _Decoded:
    """A value that needs no further decoding."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def _pairs(attributes: Any) -> Iterator[dict[str, Any]]:
    for pair in attributes:
        yield {"key": pair.key, "value": _Decoded(_proto_value(pair.value))}


def _proto_value(value: Any, depth: int = 0) -> Any:
    kind = value.WhichOneof("value")
    if kind is None or depth > _DEPTH:
        return None
    if kind == "array_value":
        return [_proto_value(item, depth + 1) for item in value.array_value.values]
    if kind == "kvlist_value":
        return {pair.key: _proto_value(pair.value, depth + 1) for pair in value.kvlist_value.values}
    plain = getattr(value, kind)
    return plain.hex() if kind == "bytes_value" else plain


def _each(tree: Mapping[str, Any], names: tuple[str, str, str], batch: Batch, convert: Any, into: list[Any]) -> None:
    """`convert` every item; what cannot be becomes a fault. Raises BadPayload where the shell around them is wrong."""
    for i, one in enumerate(_list(tree, names[0], "")):
        here = f"{names[0]}[{i}]"
        resource = _attributes(_object(one.get("resource") or {}, f"{here}.resource"), f"{here}.resource")
        for j, scoped in enumerate(_list(one, names[1], f"{here}.")):
            within = f"{here}.{names[1]}[{j}]"
            scope = str(_object(scoped.get("scope") or {}, f"{within}.scope").get("name") or "")
            for k, item in enumerate(_list(scoped, names[2], f"{within}.")):
                try:
                    into.append(convert(item, f"{within}.{names[2]}[{k}]", resource, scope))
                except BadPayload as error:
                    batch.faults.append(error.message)


def _list(tree: Mapping[str, Any], name: str, where: str) -> Sequence[dict[str, Any]]:
    items = tree.get(name)
    if items is None:
        return ()
    if not isinstance(items, list):
        raise BadPayload(f"{where}{name}: must be an array", param=where + name)
    return [_object(item, f"{where}{name}[{index}]") for index, item in enumerate(items)]


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadPayload(f"{where}: must be an object", param=where)
    return value


def _span(item: Mapping[str, Any], where: str, resource: dict[str, Any], scope: str) -> Span:
    status = _object(item.get("status") or {}, f"{where}.status")
    start = _time(item, "startTimeUnixNano", where)
    return Span(
        trace_id=_id(item, "traceId", 32, where) or "",
        span_id=_id(item, "spanId", 16, where) or "",
        parent_span_id=_id(item, "parentSpanId", 16, where, optional=True),
        name=str(item.get("name") or ""),
        start_ns=start,
        end_ns=max(start, _time(item, "endTimeUnixNano", where)),
        attributes=_attributes(item, where),
        events=[
            Event(str(one.get("name") or ""), _time(one, "timeUnixNano", f"{where}.events"), _attributes(one, where))
            for one in _list(item, "events", f"{where}.")
        ],
        failed=status.get("code") in (2, "STATUS_CODE_ERROR"),
        message=str(status.get("message") or ""),
        resource=resource,
        scope=scope,
    )


def _log(item: Mapping[str, Any], where: str, resource: dict[str, Any], scope: str) -> Event:
    attributes = _attributes(item, where)
    name = item.get("eventName") or attributes.get("event.name") or ""
    field_name = "timeUnixNano" if item.get("timeUnixNano") not in (None, "0", 0) else "observedTimeUnixNano"
    return Event(
        name=str(name),
        ts_ns=_time(item, field_name, where),
        attributes=attributes,
        trace_id=_id(item, "traceId", 32, where, optional=True),
        span_id=_id(item, "spanId", 16, where, optional=True),
        body=_value(item.get("body"), where),
    )


def _id(item: Mapping[str, Any], name: str, size: int, where: str, *, optional: bool = False) -> str | None:
    """An id in lower-case hex. One of zeros is none."""
    value = item.get(name)
    if optional and (value is None or value == "" or value == "0" * size):
        return None
    if not isinstance(value, str) or _HEX[size].fullmatch(value) is None or not value.strip("0"):
        raise BadPayload(f"{where}.{name}: must be {size} hex digits, not all 0", param=f"{where}.{name}")
    return value.lower()


def _time(item: Mapping[str, Any], name: str, where: str) -> int:
    """Nanoseconds since the epoch, as an integer or as text."""
    value = item.get(name, 0)
    with contextlib.suppress(ValueError):
        number = int(value) if isinstance(value, int | str) and not isinstance(value, bool) else -1
        if 0 <= number <= LARGEST:
            return number
    raise BadPayload(f"{where}.{name}: must be nanoseconds since 1970", param=f"{where}.{name}")


def _attributes(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {str(pair.get("key")): _value(pair.get("value"), where) for pair in _list(item, "attributes", f"{where}.")}


def _value(value: Any, where: str, depth: int = 0) -> Any:
    """An AnyValue. What a later version of the format may add is left out."""
    if isinstance(value, _Decoded):
        return value.value
    if value is None or depth > _DEPTH:
        return None
    held = _object(value, f"{where}: a value")
    for name, plain in held.items():
        if name in ("stringValue", "boolValue", "bytesValue"):
            return plain if isinstance(plain, str | bool) else str(plain)
        if name in _NUMBERS:
            return _number(name, plain, where)
        if name == "arrayValue":
            return [_value(one, where, depth + 1) for one in _list(_object(plain, where), "values", f"{where}.")]
        if name == "kvlistValue":
            pairs = _list(_object(plain, where), "values", f"{where}.")
            return {str(pair.get("key")): _value(pair.get("value"), where, depth + 1) for pair in pairs}
    return None


_NUMBERS = {"intValue": int, "doubleValue": float}


def _number(name: str, plain: Any, where: str) -> int | float:
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        number: int | float = _NUMBERS[name](plain)
        if isinstance(number, float) or -LARGEST - 1 <= number <= LARGEST:
            return number
    raise BadPayload(f"{where}: {name} {str(plain)[:40]!r} is none", param=where)
