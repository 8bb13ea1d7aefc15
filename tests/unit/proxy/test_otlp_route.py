"""`POST /v1/traces` and `/v1/logs` of one worker, over ASGI: encodings, answers, rights, limits, journal lines."""

import asyncio
import gzip
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from collector import intake
from collector.journal import Journal, decode
from collector.settings import Server, Settings
from proxy.routes import otlp
from proxy.routes.base import Context
from tests.unit.proxy.test_routes import KEYS, Collector, talk

PROTOBUF = {"content-type": "application/x-protobuf"}
TRACE, SPAN = b"t" * 16, b"s" * 8


def traces(*span_ids: bytes, score: float | None = None, result: str = "42") -> bytes:
    request = ExportTraceServiceRequest()
    scope = request.resource_spans.add().scope_spans.add()
    for ident in span_ids:
        span = scope.spans.add(trace_id=TRACE, span_id=ident, name="tool", start_time_unix_nano=5, end_time_unix_nano=9)
        span.attributes.add(key="gen_ai.tool.name").value.string_value = "add"
        span.attributes.add(key="gen_ai.tool.call.result").value.string_value = result
        if score is not None:
            event = span.events.add(name="gen_ai.evaluation.result", time_unix_nano=7)
            event.attributes.add(key="gen_ai.evaluation.score.value").value.double_value = score
    return request.SerializeToString()


def logs(*scores: float, name: str = "gen_ai.evaluation.result") -> bytes:
    request = ExportLogsServiceRequest()
    scope = request.resource_logs.add().scope_logs.add()
    for score in scores:
        record = scope.log_records.add(trace_id=TRACE, span_id=SPAN, event_name=name, time_unix_nano=7)
        record.attributes.add(key="gen_ai.evaluation.score.value").value.double_value = score
    return request.SerializeToString()


def lines(directory: Path) -> list[dict[str, Any]]:
    """What is in the journal now, sealed or not."""
    texts = [path.read_bytes() for path in sorted((directory / "journal").iterdir())]
    return [decode(line) for text in texts for line in text.splitlines()]


def test_an_export_is_in_the_journal_before_it_is_answered(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, _context: Context, _fake: Collector) -> None:
        answer = await client.post("/v1/traces", content=traces(b"a" * 8, b"b" * 8, score=0.5), headers=PROTOBUF)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-type"] == "application/x-protobuf"
        found = lines(tmp_path)
        assert [line["event"] for line in found] == ["otlp", "otlp", "reward", "reward"]
        assert (found[0]["span_id"], found[0]["operation"], found[0]["tool_name"]) == ("61" * 8, "span", "add")
        assert (found[2]["target_kind"], found[2]["target_id"], found[2]["value"]) == ("span", "61" * 8, 0.5)

    talk(act, tmp_path, collector=False)


def test_gzip_and_json_are_read_and_answered_in_kind(tmp_path: Path) -> None:
    ids = {"traceId": TRACE.hex(), "spanId": SPAN.hex(), "startTimeUnixNano": "5", "endTimeUnixNano": "9"}
    body = orjson.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [ids, {**ids, "traceId": "no"}]}]}]})

    async def act(client: httpx.AsyncClient, _context: Context, _fake: Collector) -> None:
        zipped = {**PROTOBUF, "content-encoding": "gzip"}
        assert (await client.post("/v1/traces", content=gzip.compress(traces(SPAN)), headers=zipped)).status_code == 200
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        answer = await client.post("/v1/traces", content=gzip.compress(body), headers=headers)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        partial = answer.json()["partialSuccess"]
        assert partial["rejectedSpans"] == "1"
        assert partial["errorMessage"].startswith("resourceSpans[0].scopeSpans[0].spans[1].traceId")
        assert len(lines(tmp_path)) == 2

    talk(act, tmp_path)


@pytest.mark.parametrize(
    ("body", "headers", "status", "named"),
    [
        (b"\xff\xff", PROTOBUF, 400, "body"),
        (logs(1.0), PROTOBUF, 400, "body"),
        (b"{", {"content-type": "application/json"}, 400, "body"),
        (b"", {"content-type": "text/plain"}, 400, "content-type"),
        (b"", {**PROTOBUF, "content-encoding": "lzma"}, 400, "content-encoding"),
        (b"no gzip", {**PROTOBUF, "content-encoding": "gzip"}, 400, "gzip"),
        (b"x" * 2000, PROTOBUF, 413, "max_body_mb"),
        (gzip.compress(b"x" * 2000), {**PROTOBUF, "content-encoding": "gzip"}, 413, "max_body_mb"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name_and_not_sent_again(
    tmp_path: Path, body: bytes, headers: dict[str, str], status: int, named: str
) -> None:
    async def act(client: httpx.AsyncClient, _context: Context, _fake: Collector) -> None:
        answer = await client.post("/v1/traces", content=body, headers=headers)
        assert answer.status_code == status
        message = (
            answer.json()["message"] if "json" in headers["content-type"] else Status.FromString(answer.content).message
        )
        assert named in message
        assert "retry-after" not in answer.headers
        assert lines(tmp_path) == []

    talk(act, tmp_path, Settings(server=Server(max_body_mb=0.001)))


def test_a_journal_that_takes_nothing_is_503_to_be_tried_again(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, context: Context, _fake: Collector) -> None:
        context.journal.close()
        answer = await client.post("/v1/traces", content=traces(SPAN), headers=PROTOBUF)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "journal" in Status.FromString(answer.content).message

    talk(act, tmp_path)


def test_more_bytes_than_may_wait_are_503_to_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body, go = traces(SPAN), threading.Event()
    taken = intake.take

    def slow(*args: Any, **options: Any) -> intake.Taken:
        assert go.wait(20)
        return taken(*args, **options)

    monkeypatch.setattr(otlp, "take", slow)
    monkeypatch.setattr(otlp, "MAX_WAITING_BYTES", len(body) + 1)

    async def act(client: httpx.AsyncClient, context: Context, _fake: Collector) -> None:
        first = asyncio.create_task(client.post("/v1/traces", content=body, headers=PROTOBUF))
        second = asyncio.create_task(client.post("/v1/traces", content=body, headers=PROTOBUF))
        done, _ = await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
        (refused,) = done
        assert (refused.result().status_code, refused.result().headers["retry-after"]) == (503, "1")
        go.set()
        answers = await asyncio.gather(first, second)
        assert sorted(answer.status_code for answer in answers) == [200, 503]
        assert (await client.post("/v1/traces", content=body, headers=PROTOBUF)).status_code == 200

    talk(act, tmp_path)


def test_evaluations_in_logs_are_rewards_and_other_records_are_no_fault(tmp_path: Path) -> None:
    async def act(client: httpx.AsyncClient, _context: Context, _fake: Collector) -> None:
        for body in (logs(0.25, 0.5), logs(1.0, name="gen_ai.choice")):
            answer = await client.post("/v1/logs", content=body, headers=PROTOBUF)
            assert (answer.status_code, answer.content) == (200, b"")
        assert [(line["event"], line["value"]) for line in lines(tmp_path)] == [("reward", 0.25), ("reward", 0.5)]

    talk(act, tmp_path)


def posted(tmp_path: Path, key: str, requests: Sequence[tuple[str, bytes]]) -> list[httpx.Response]:
    answers: list[httpx.Response] = []

    async def act(client: httpx.AsyncClient, _context: Context, _fake: Collector) -> None:
        headers = {**PROTOBUF, "authorization": f"Bearer {key}"}
        answers.extend([await client.post(path, content=body, headers=headers) for path, body in requests])

    talk(act, tmp_path, Settings(server=Server(keys=KEYS)))
    return answers


BOTH = [("/v1/traces", traces(SPAN, score=1.0)), ("/v1/logs", logs(1.0))]


@pytest.mark.parametrize(
    ("key", "statuses", "events"),
    [
        ("agent-key", [200, 200], ["otlp"]),
        ("reward-key", [403, 200], ["reward"]),
        ("admin-key", [200, 200], ["otlp", "reward", "reward"]),
        ("wrong", [401, 401], []),
    ],
)
def test_spans_need_the_scope_agent_and_evaluations_the_scope_reward(
    tmp_path: Path, key: str, statuses: list[int], events: list[str]
) -> None:
    answers = posted(tmp_path, key, BOTH)
    assert [answer.status_code for answer in answers] == statuses
    assert [line["event"] for line in lines(tmp_path)] == events
    if key == "agent-key":
        partial = ExportTraceServiceResponse.FromString(answers[0].content).partial_success
        assert (partial.rejected_spans, "scope `reward`" in partial.error_message) == (0, True)


def test_secrets_in_a_span_are_masked_before_the_line_is_written(tmp_path: Path) -> None:
    secret = "sk-abcdefghijklmnop1234567890"

    async def act(client: httpx.AsyncClient, _context: Context, _fake: Collector) -> None:
        await client.post("/v1/traces", content=traces(SPAN, result=secret), headers=PROTOBUF)
        text = b"".join(path.read_bytes() for path in (tmp_path / "journal").iterdir())
        assert secret.encode() not in text
        assert b"[redacted]" in text

    talk(act, tmp_path)


@pytest.mark.parametrize("mode", ["none", "hash"])
def test_what_may_not_be_kept_of_a_span_is_not(tmp_path: Path, mode: str) -> None:
    async def act(client: httpx.AsyncClient, _context: Context, _fake: Collector) -> None:
        await client.post("/v1/traces", content=traces(SPAN, result="a private answer"), headers=PROTOBUF)
        (line,) = lines(tmp_path)
        assert "private" not in str(line)
        assert line["tool_name"] == "add"

    talk(act, tmp_path, Settings.model_validate({"store": {"redaction": {"mode": mode}}}))


def test_the_same_bytes_are_taken_without_a_server(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", "test")
    taken = intake.take(journal, traces(SPAN, score=1.0), "application/x-protobuf", "traces")
    assert (taken.spans, taken.rewards, taken.rejected, taken.message) == (1, 1, 0, "")
    assert [line["event"] for line in lines(tmp_path)] == ["otlp", "reward"]
    journal.close()
