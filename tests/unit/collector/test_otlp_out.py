"""Spans and rewards arrive at an OpenTelemetry backend, at least once, whatever happens in between."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from collector.otlp_out import Done, Exporter, Unsent
from collector.service import Collector
from tests.otlp_receiver import Receiver
from tests.unit.collector import rows
from tests.unit.collector.formats.world import RICH, reward
from tests.unit.collector.rows import call, write


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.01)


def collector(data_dir: Path, receiver: Receiver, *, background: bool = False, **otlp: Any) -> Collector:
    section = {"otlp": {"endpoint": receiver.url, "timeout": 2, **otlp}}
    return Collector(rows.settings(data_dir, export=section), background=background)


def exporter(made: Collector) -> Exporter:
    assert made._otlp is not None
    made.flush()
    return made._otlp


def test_spans_and_rewards_arrive_with_both_families_of_names(tmp_path: Path) -> None:
    write(tmp_path, *RICH)
    with Receiver() as receiver:
        made = collector(tmp_path, receiver, headers={"authorization": "Bearer backend-key"})
        out = exporter(made)
        assert out.send_once() == 1
        assert out.send_once() == 0
        stats = made.stats()["otlp"]
        made.close()
    assert (stats["spans"], stats["rewards"], stats["pending"], stats["failures"]) == (12, 4, 0, 0)
    assert {header["authorization"] for header in receiver.headers} == {"Bearer backend-key"}
    spans = {span.span_id.hex(): span for span in receiver.spans}
    assert len(spans) == 12, "the echo of a recorded call is not sent"
    found = receiver.attributes(spans[f"{11:016x}"])
    assert (found["gen_ai.request.model"], found["ratchet.episode.id"], found["session.id"]) == ("m", "ep-t", "ep-t")
    assert (found["openinference.span.kind"], found["llm.model_name"]) == ("LLM", "m")
    assert found["llm.input_messages.3.message.tool_call_id"] == "c1"
    assert found["llm.input_messages.2.message.tool_calls.0.tool_call.function.name"] == "add"
    assert (found["llm.output_messages.0.message.content"], found["output.value"]) == ("2", "2")
    assert spans[f"a{2:015x}"].parent_span_id.hex() == f"a{0:015x}"
    assert receiver.attributes(spans[f"a{2:015x}"])["ratchet.episode.id"] == "ep-x"
    assert spans[f"{13:016x}"].status.code == 2
    logs = {receiver.attributes(log)["ratchet.reward.id"]: log for log in receiver.logs}
    judged = receiver.attributes(logs["rw-1"])
    assert (logs["rw-1"].event_name, judged["gen_ai.evaluation.name"]) == ("gen_ai.evaluation.result", "reward")
    assert (judged["gen_ai.evaluation.score.value"], judged["gen_ai.evaluation.explanation"]) == (0.5, "of the echo")
    assert logs["rw-3"].span_id.hex() == f"{11:016x}"
    assert receiver.attributes(logs["rw-3"])["gen_ai.response.id"] == "chatcmpl-11"
    assert (logs["rw-2"].span_id, receiver.attributes(logs["rw-2"])["ratchet.episode.id"]) == (b"", "ep-t")


def test_without_content_no_message_leaves(tmp_path: Path) -> None:
    write(tmp_path, call(1, input_tokens=5, attributes='{"metadata":{"x":"private"}}'))
    with Receiver() as receiver:
        made = collector(tmp_path, receiver, content="none")
        exporter(made).send_once()
        made.close()
    (span,) = receiver.spans
    assert receiver.attributes(span)["gen_ai.usage.input_tokens"] == 5
    assert b"question" not in span.SerializeToString()
    assert b"private" not in span.SerializeToString()


def test_an_outage_costs_nothing_and_a_new_start_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    status = 200
    with Receiver(lambda _path, _request: status) as receiver:
        write(tmp_path, call(1), role="a")
        made = collector(tmp_path, receiver)
        exporter(made).send_once()
        status = 500
        write(tmp_path, call(2), call(3), reward(1, "span", f"{2:016x}"), role="b")
        out = exporter(made)
        with pytest.raises(Unsent, match="answered 500"):
            out.send_once()
        assert (len(receiver.spans), out.counters.spans) == (1, 1)
        made.close()
        status = 200
        again = collector(tmp_path, receiver)
        assert exporter(again).send_once() == 1
        again.close()
    assert sorted(span.span_id.hex() for span in receiver.spans) == [f"{number:016x}" for number in (1, 2, 3)]
    assert len(receiver.logs) == 1


def test_a_backend_that_is_not_there_is_waited_for(tmp_path: Path) -> None:
    write(tmp_path, call(1))
    with Receiver() as receiver:
        url = receiver.url
    made = Collector(rows.settings(tmp_path, export={"otlp": {"endpoint": url, "timeout": 0.2}}), background=False)
    with pytest.raises(Unsent, match="did not answer"):
        exporter(made).send_once()
    made.close()


def test_what_a_backend_refuses_is_left_out_alone_and_counted(tmp_path: Path) -> None:
    def picky(_path: str, request: Any) -> int:
        ids = [span.span_id.hex() for res in request.resource_spans for sc in res.scope_spans for span in sc.spans]
        return 400 if f"{5:016x}" in ids else 200

    write(tmp_path, *(call(number) for number in range(1, 9)))
    with Receiver(picky) as receiver:
        made = collector(tmp_path, receiver)
        out = exporter(made)
        out.send_once()
        assert (out.counters.spans, out.counters.refused) == (7, 1)
        assert out.send_once() == 0
        made.close()
    assert len(receiver.spans) == 7


def test_a_backend_without_logs_gets_rewards_as_spans(tmp_path: Path) -> None:
    write(tmp_path, call(1), reward(1, "span", f"{1:016x}", 0.5, label="fair"), reward(2, "episode", "nowhere"))
    with Receiver(lambda path, _request: 404 if path == "/v1/logs" else 200) as receiver:
        made = collector(tmp_path, receiver)
        exporter(made).send_once()
        made.close()
    judged, lost = [span for span in receiver.spans if span.name == "evaluate reward"]
    assert judged.parent_span_id.hex() == f"{1:016x}"
    found = receiver.attributes(judged)
    assert (found["openinference.span.kind"], found["evaluation.score"], found["evaluation.label"]) == (
        "EVALUATOR",
        0.5,
        "fair",
    )
    assert judged.events[0].name == "gen_ai.evaluation.result"
    assert (lost.parent_span_id, receiver.attributes(lost)["ratchet.episode.id"]) == (b"", "nowhere")


def test_a_running_collector_sends_by_itself(tmp_path: Path) -> None:
    with Receiver() as receiver:
        made = collector(tmp_path, receiver, background=True)
        write(tmp_path, call(1), reward(1, "span", f"{1:016x}"))
        wait_for(lambda: len(receiver.spans) == len(receiver.logs) == 1)
        wait_for(lambda: made.stats()["otlp"]["pending"] == 0)
        made.close()


def test_what_was_sent_is_known_after_a_crash_and_a_torn_line_is_not(tmp_path: Path) -> None:
    path = tmp_path / "export" / "done"
    done = Done(path)
    done.add("first")
    done.close()
    with path.open("a") as file:
        file.write("secon")
    again = Done(path)
    assert ("first" in again, "secon" in again) == (True, False)
    again.add("second")
    again.close()
    assert path.read_text() == "first\nsecond\n"


def test_a_segment_that_vanishes_before_it_is_sent_is_counted(tmp_path: Path) -> None:
    with Receiver(lambda _path, _request: 503) as receiver:
        made = collector(tmp_path, receiver, timeout=0.2)
        write(tmp_path, call(1))
        out = exporter(made)
        with pytest.raises(Unsent):
            out.send_once()
        next((tmp_path / "journal").glob("*.ndjson")).unlink()
        receiver.answer = lambda _path, _request: 200
        out.send_once()
        assert out.counters.missed == 1
        made.close()


def test_the_configuration_takes_a_url_only(tmp_path: Path) -> None:
    made = rows.settings(tmp_path, export={"otlp": {"endpoint": "http://127.0.0.1:6006/v1/traces"}})
    assert made.export.otlp.endpoint == "http://127.0.0.1:6006"
    with pytest.raises(ValueError, match="http://"):
        rows.settings(tmp_path, export={"otlp": {"endpoint": "localhost:4317"}})
    assert json.loads(made.model_dump_json())["export"]["otlp"]["content"] == "full"
