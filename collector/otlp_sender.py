"""Rows to an OpenTelemetry backend: spans by the official exporter, rewards as records, spans or annotations.

A span carries both families of names, OTel's `gen_ai.*` and OpenInference's, so that each backend shows its messages.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import orjson
import requests
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from collector import otel, otel_in
from collector.formats.bundle import digest
from collector.formats.otlp import JUDGED
from collector.model import CALLS
from collector.openinference import attributes as inferred
from collector.otlp_out import Refused, Unsent
from collector.settings import OtlpOut

_RESOURCE = Resource({"service.name": "ratchet"})
_SCOPE = InstrumentationScope(otel.SCOPE)
_CONTENT = ("input_messages", "output_messages", "tools", "attributes")
# A person has to mend these, or time does: nothing is wrong with what was sent.
_WAIT = (401, 403, 404, 407, 408, 425, 429)
_NO_LOGS = (404, 405, 415, 501)

log = logging.getLogger(__name__)


class Sender:
    """One backend. Used by one thread; `close` may come from another."""

    def __init__(self, settings: OtlpOut, transport: httpx.BaseTransport | None = None) -> None:
        if settings.endpoint is None:
            raise ValueError("no endpoint")
        self._settings = settings
        self._base = settings.endpoint
        self._way = settings.rewards
        self._status: int | None = None
        session = requests.Session()
        session.trust_env = False
        session.hooks["response"].append(self._answered)
        self._exporter = OTLPSpanExporter(
            endpoint=f"{self._base}/v1/traces",
            headers=settings.headers,
            timeout=settings.timeout,
            compression=Compression.Gzip,
            session=session,
        )
        # Repetitions are ours to report, once and in our words.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
        self._http = httpx.Client(
            headers=settings.headers, timeout=settings.timeout, trust_env=False, transport=transport
        )

    def close(self) -> None:
        """Give up what is under way."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]
        self._http.close()

    def _answered(self, response: Any, *_args: Any, **_kwargs: Any) -> None:
        self._status = response.status_code

    def spans(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send rows of spans. Raises Unsent, Refused."""
        self._export([self._span(row) for row in rows])

    def _export(self, spans: Sequence[ReadableSpan]) -> None:
        self._status = None
        if self._exporter.export(spans) is not SpanExportResult.SUCCESS:
            self._fail("/v1/traces", self._status)

    def _fail(self, path: str, status: int | None) -> None:
        if status is not None and 400 <= status < 500 and status not in _WAIT:
            raise Refused(f"{self._base}{path} answered {status}")
        told = "did not answer" if status is None else f"answered {status}"
        raise Unsent(f"{self._base}{path} {told}")

    def _span(self, row: Mapping[str, Any]) -> ReadableSpan:
        shown = row if self._settings.content == "full" else {**row, **dict.fromkeys(_CONTENT)}
        failed = row["status"] != "ok"
        parent = row.get("parent_span_id")
        found = {**inferred(shown), **otel.attributes(shown)}
        return ReadableSpan(
            name=otel.name(row),
            context=_context(row["trace_id"], row["span_id"]),
            parent=None if parent is None else _context(row["trace_id"], parent),
            resource=_RESOURCE,
            attributes={name: _plain(value) for name, value in found.items()},
            kind=SpanKind.CLIENT if row.get("operation", "chat") in CALLS else SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR, row.get("error_type")) if failed else Status(StatusCode.OK),
            start_time=row["start_ns"],
            end_time=row["end_ns"],
            instrumentation_scope=_SCOPE,
        )

    def rewards(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send rewards; each has under `span` the row of the span that it belongs to, None while that isn't known.

        Raises Unsent, Refused.
        """
        if self._way == "logs":
            status = self._post("/v1/logs", _logs(rows), "application/x-protobuf")
            if status in _NO_LOGS:
                log.warning("%s takes no logs (%d): rewards are sent to it as spans", self._base, status)
                self._way = "spans"
            elif status >= 300:
                self._fail("/v1/logs", status)
        if self._way == "phoenix":
            if any(row["span"] is None for row in rows):
                raise Refused("a reward whose span isn't known cannot be an annotation")
            self._annotate(rows)
        if self._way == "spans":
            self._export([_evaluation_span(row) for row in rows])

    def _annotate(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Phoenix's own annotations: of spans, and of traces for what judges the whole."""
        for path, kind in (("span", "span_id"), ("trace", "trace_id")):
            whole = path == "trace"
            chosen = [row for row in rows if (row["target_kind"] in ("trace", "episode")) == whole]
            if not chosen:
                continue
            body = {"data": [_annotation(row, kind) for row in chosen]}
            status = self._post(f"/v1/{path}_annotations?sync=true", orjson.dumps(body), "application/json")
            if status == 404:  # Phoenix hasn't stored the span yet
                raise Unsent(f"{self._base}/v1/{path}_annotations doesn't know the span yet")
            if status >= 300:
                self._fail(f"/v1/{path}_annotations", status)

    def _post(self, path: str, body: bytes, kind: str) -> int:
        try:
            return self._http.post(self._base + path, content=body, headers={"content-type": kind}).status_code
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: closed meanwhile
            raise Unsent(f"{self._base}{path} did not answer ({type(error).__name__})") from None


def _context(trace_id: str, span_id: str) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=TraceFlags(1))


def _plain(value: Any) -> Any:
    """A value as OTel's attributes may hold it: what is nested becomes JSON."""
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return value
    return orjson.dumps(value, default=str).decode()


def _judged(row: Mapping[str, Any]) -> dict[str, Any]:
    """A reward's attributes, by the conventions' names and ours."""
    found = {name: row[column] for column, name in JUDGED.items() if row.get(column) is not None}
    if row["target_kind"] == "response":
        found["gen_ai.response.id"] = row["target_id"]
    span = row["span"]
    episode = row["target_id"] if row["target_kind"] == "episode" else span and span["episode_id"]
    return found | ({"ratchet.episode.id": episode} if episode else {})


def _logs(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """`gen_ai.evaluation.result` records, parented to the judged span where it is one span."""
    request = ExportLogsServiceRequest()
    resource = request.resource_logs.add()
    resource.resource.attributes.add(key="service.name").value.string_value = "ratchet"
    scope = resource.scope_logs.add()
    scope.scope.name = otel.SCOPE
    for row in rows:
        record = scope.log_records.add(
            time_unix_nano=row["ts_ns"], observed_time_unix_nano=row["ts_ns"], event_name=otel_in.EVALUATION
        )
        if row["span"] is not None:
            record.trace_id = bytes.fromhex(row["span"]["trace_id"])
            if row["target_kind"] in ("span", "response"):
                record.span_id = bytes.fromhex(row["span"]["span_id"])
        for name, value in _judged(row).items():
            pair = record.attributes.add(key=name).value
            if isinstance(value, float):
                pair.double_value = value
            else:
                pair.string_value = str(value)
    return bytes(request.SerializeToString())


def _evaluation_span(row: Mapping[str, Any]) -> ReadableSpan:
    """A reward as a span under what it judges, with the evaluation as its event."""
    judged, span = _judged(row), row["span"]
    known = {
        "openinference.span.kind": "EVALUATOR",
        "evaluation.name": row["name"],
        "evaluation.score": row["value"],
        "evaluation.label": row.get("label"),
        "evaluation.explanation": row.get("explanation"),
        "output.value": str(row["value"]),
    }
    trace = span["trace_id"] if span else digest(["reward", row["target_id"]], 32)
    return ReadableSpan(
        name=f"evaluate {row['name']}",
        context=_context(trace, digest(["reward", row["reward_id"]], 16)),
        parent=_context(trace, span["span_id"]) if span else None,
        resource=_RESOURCE,
        attributes={name: value for name, value in {**known, **judged}.items() if value is not None},
        events=[Event(otel_in.EVALUATION, judged, row["ts_ns"])],
        status=Status(StatusCode.OK),
        start_time=row["ts_ns"],
        end_time=row["ts_ns"],
        instrumentation_scope=_SCOPE,
    )


def _annotation(row: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {
        kind: row["span"][kind],
        "name": row["name"],
        "annotator_kind": {"human": "HUMAN", "llm": "LLM"}.get(row["source"], "CODE"),
        "identifier": row["reward_id"],
        "result": {"score": row["value"], "label": row.get("label"), "explanation": row.get("explanation")},
        "metadata": {"target_kind": row["target_kind"], "target_id": row["target_id"]},
    }
