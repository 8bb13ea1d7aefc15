import base64
from typing import Any

import orjson
import pytest
from google.rpc.status_pb2 import Status
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

from collector import otlp

IDS = {"traceId": "5b8efff798038103d269b633813fc60c", "spanId": "eee19b7ec3c1b174"}
SPAN = {**IDS, "name": "chat m", "startTimeUnixNano": "1544712660000000000", "endTimeUnixNano": "1544712661000000000"}


def export(*spans: Any, resource: Any = None) -> bytes:
    scope = {"scope": {"name": "lib"}, "spans": list(spans)}
    return orjson.dumps({"resourceSpans": [{"resource": resource or {}, "scopeSpans": [scope]}]})


def read_one(span: dict[str, Any]) -> otlp.Span:
    (found,) = otlp.read(export(span), otlp.JSON, "traces").spans
    return found


def test_a_span_in_json_has_hex_ids_and_integers_as_text() -> None:
    pairs = [{"key": "n", "value": {"intValue": "7"}}, {"key": "d", "value": {"doubleValue": 0.5}}]
    event = {"name": "e", "timeUnixNano": "5", "attributes": pairs[:1]}
    found = read_one(
        {
            **SPAN,
            "parentSpanId": "EEE19B7EC3C1B173",
            "attributes": pairs,
            "events": [event],
            "status": {"code": 2, "message": "no"},
        }
    )
    assert (found.trace_id, found.span_id, found.parent_span_id) == (*IDS.values(), "eee19b7ec3c1b173")
    assert (found.start_ns, found.end_ns) == (1544712660000000000, 1544712661000000000)
    assert (found.attributes, found.scope, found.failed, found.message) == ({"n": 7, "d": 0.5}, "lib", True, "no")
    assert found.events == [otlp.Event("e", 5, {"n": 7})]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"traceId": base64.b64encode(bytes.fromhex(IDS["traceId"])).decode()}, "traceId"),
        ({"traceId": "0" * 32}, "traceId"),
        ({"spanId": None}, "spanId"),
        ({"spanId": 7}, "spanId"),
        ({"startTimeUnixNano": "soon"}, "startTimeUnixNano"),
        ({"endTimeUnixNano": str(1 << 63)}, "endTimeUnixNano"),
        ({"attributes": {"a": 1}}, "attributes"),
        ({"attributes": [{"key": "a", "value": {"intValue": "x"}}]}, "intValue"),
        ({"status": "OK"}, "status"),
    ],
)
def test_a_bad_span_is_named_and_the_good_one_beside_it_is_read(change: dict[str, Any], named: str) -> None:
    bad = {**SPAN, **change}
    batch = otlp.read(export(SPAN, bad), otlp.JSON, "traces")
    assert (len(batch.spans), len(batch.faults)) == (1, 1)
    assert batch.faults[0].startswith("resourceSpans[0].scopeSpans[0].spans[1]")
    assert named in batch.faults[0]
    with pytest.raises(otlp.BadPayload, match=named) as caught:
        otlp.read(export(bad), otlp.JSON, "traces")
    assert caught.value.status == 400


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"resourceSpans": {}}', b'{"resourceSpans": [1]}'])
def test_what_is_no_export_is_refused_by_name(body: bytes) -> None:
    with pytest.raises(otlp.BadPayload, match=r"body|resourceSpans"):
        otlp.read(body, otlp.JSON, "traces")


def test_bytes_that_are_no_protobuf_are_refused() -> None:
    with pytest.raises(otlp.BadPayload, match="protobuf"):
        otlp.read(b"\xff\xff{}", otlp.PROTOBUF, "traces")
    assert otlp.read(b"", otlp.PROTOBUF, "traces") == otlp.Batch()


def test_a_content_type_that_is_not_known_is_refused() -> None:
    assert otlp.media_type("application/json; charset=utf-8") == otlp.JSON
    for wrong in (None, "text/plain", "application/grpc"):
        with pytest.raises(otlp.BadPayload, match="content-type"):
            otlp.media_type(wrong)


def test_logs_sent_as_traces_are_refused_not_stored_without_ids() -> None:
    logs = ExportLogsServiceRequest()
    record = logs.resource_logs.add().scope_logs.add().log_records.add(time_unix_nano=5, event_name="e")
    record.body.string_value = "text"
    with pytest.raises(otlp.BadPayload):
        otlp.read(logs.SerializeToString(), otlp.PROTOBUF, "traces")
    (log,) = otlp.read(logs.SerializeToString(), otlp.PROTOBUF, "logs").logs
    assert log == otlp.Event("e", 5, {}, None, None, "text")


def test_answers_are_the_official_ones() -> None:
    assert otlp.answer(otlp.PROTOBUF, "traces") == otlp.answer(otlp.PROTOBUF, "logs") == b""
    assert otlp.answer(otlp.JSON, "traces") == b"{}"
    spans = ExportTraceServiceResponse.FromString(otlp.answer(otlp.PROTOBUF, "traces", 2, "why"))
    assert (spans.partial_success.rejected_spans, spans.partial_success.error_message) == (2, "why")
    logs = ExportLogsServiceResponse.FromString(otlp.answer(otlp.PROTOBUF, "logs", 3))
    assert logs.partial_success.rejected_log_records == 3
    told = {"partialSuccess": {"rejectedSpans": "2", "errorMessage": "why"}}
    assert orjson.loads(otlp.answer(otlp.JSON, "traces", 2, "why")) == told


def test_a_failure_is_a_status_in_the_senders_own_encoding() -> None:
    status = Status.FromString(otlp.failure(otlp.PROTOBUF, "no", {}, retry=True))
    assert (status.code, status.message) == (14, "no")
    body = orjson.loads(otlp.failure(otlp.JSON, "no", {"error": {"message": "no"}}, retry=False))
    assert body == {"code": 3, "message": "no", "error": {"message": "no"}}


values = st.recursive(
    st.text(max_size=8) | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def any_value(value: Any, into: AnyValue) -> None:
    if isinstance(value, bool):
        into.bool_value = value
    elif isinstance(value, int):
        into.int_value = value
    elif isinstance(value, float):
        into.double_value = value
    elif isinstance(value, str):
        into.string_value = value
    elif isinstance(value, list):
        into.array_value.SetInParent()
        for item in value:
            any_value(item, into.array_value.values.add())
    else:
        into.kvlist_value.SetInParent()
        for name, item in value.items():
            any_value(item, into.kvlist_value.values.add(key=name).value)


def as_json(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value if abs(value) != float("inf") else str(value)}
    if isinstance(value, str):
        return {"stringValue": value}
    if isinstance(value, list):
        return {"arrayValue": {"values": [as_json(item) for item in value]}}
    return {"kvlistValue": {"values": [{"key": name, "value": as_json(item)} for name, item in value.items()]}}


@given(st.dictionaries(st.text(max_size=6), values, max_size=4), st.binary(min_size=16, max_size=16).filter(any))
def test_both_encodings_of_a_span_read_the_same(attributes: dict[str, Any], trace: bytes) -> None:
    request = ExportTraceServiceRequest()
    scoped = request.resource_spans.add().scope_spans.add()
    scoped.scope.name = "lib"
    span = scoped.spans.add(trace_id=trace, span_id=b"12345678", name="n", start_time_unix_nano=5, end_time_unix_nano=9)
    for name, value in attributes.items():
        any_value(value, span.attributes.add(key=name).value)
    pairs = [{"key": name, "value": as_json(value)} for name, value in attributes.items()]
    same = {
        "traceId": trace.hex(),
        "spanId": b"12345678".hex(),
        "name": "n",
        "startTimeUnixNano": "5",
        "endTimeUnixNano": 9,
    }
    binary = otlp.read(request.SerializeToString(), otlp.PROTOBUF, "traces")
    text = otlp.read(export({**same, "attributes": pairs}), otlp.JSON, "traces")
    assert binary == text
    assert binary.spans[0].attributes == attributes


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(body: bytes) -> None:
    for kind in (otlp.PROTOBUF, otlp.JSON):
        for signal in ("traces", "logs"):
            try:
                otlp.read(body, kind, signal)  # type: ignore[arg-type]
            except otlp.BadPayload as error:
                assert error.message
