from dataclasses import asdict

import orjson

from collector import otel
from tests.unit.collector.rows import call


def test_a_span_carries_the_names_of_the_conventions() -> None:
    row = asdict(
        call(1, input_tokens=5, ttft_ms=250.0, finish_reason="stop", prompt_slot="s", prompt_version=2, stream=True)
    )
    span = otel.span(row)
    assert (span["name"], span["kind"], span["status"]) == ("chat m", 3, {"code": 1})
    assert (span["startTimeUnixNano"], span["traceId"], span["parentSpanId"]) == ("1001", f"{1:032x}", "")
    found = {item["key"]: item["value"] for item in span["attributes"]}
    assert found["gen_ai.operation.name"] == {"stringValue": "chat"}
    assert found["gen_ai.usage.input_tokens"] == {"intValue": "5"}
    assert found["gen_ai.request.stream"] == {"boolValue": True}
    assert found["gen_ai.response.finish_reasons"] == {"arrayValue": {"values": [{"stringValue": "stop"}]}}
    assert found["gen_ai.response.time_to_first_chunk"] == {"doubleValue": 0.25}
    assert found["gen_ai.input.messages"]["stringValue"].startswith('[{"role"')
    assert found["ratchet.prompt.version"] == {"intValue": "2"}
    assert "gen_ai.usage.output_tokens" not in found


def test_a_failed_call_is_a_failed_span() -> None:
    span = otel.span(asdict(call(1, status="error", error_type="timeout", request_model=None)))
    assert (span["name"], span["status"]) == ("chat", {"code": 2, "message": "timeout"})


def test_every_column_that_is_mapped_exists() -> None:
    assert set(otel.ATTRIBUTES) <= set(call(1).__slots__)


def test_an_export_is_json() -> None:
    body = otel.request([asdict(call(1)), asdict(call(2))])
    (resource,) = orjson.loads(orjson.dumps(body))["resourceSpans"]
    assert [span["spanId"] for span in resource["scopeSpans"][0]["spans"]] == [f"{n:016x}" for n in (1, 2)]
