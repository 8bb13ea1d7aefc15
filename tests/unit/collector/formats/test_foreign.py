"""Exports of other products, as their documentation describes them, become episodes of ours."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collector.errors import BadInput
from collector.formats.bundle import Bundle, nanoseconds
from collector.formats.reader import Outcome, read
from tests.unit.collector.formats.world import opened

FILES = Path(__file__).parents[3] / "fixtures" / "imports"


def rows(name: str, kind: str | None = None) -> tuple[Bundle, Outcome]:
    return rows_of(FILES / name, kind)


def rows_of(path: Path, kind: str | None = None) -> tuple[Bundle, Outcome]:
    whole, outcome = Bundle(), Outcome()
    for bundle in read(path, outcome, kind):
        whole.add(bundle)
    return whole, outcome


def loaded(value: str) -> Any:
    return json.loads(value)


def test_langfuse_observations_are_spans_with_their_tree() -> None:
    bundle, outcome = rows("langfuse-observations.jsonl")
    agent, call, tool = bundle.spans
    assert outcome.records == {"langfuse": 3}
    assert [one["operation"] for one in bundle.spans] == ["invoke_agent", "chat", "execute_tool"]
    assert call["parent_span_id"] == tool["parent_span_id"] == agent["span_id"] == "b7ad6b7169203331"
    assert (agent["agent_name"], tool["tool_name"]) == ("support-agent", "lookup")
    assert (tool["status"], tool["error_type"]) == ("error", "TimeoutError: no answer")
    assert (call["request_model"], call["input_tokens"], call["output_tokens"]) == ("gpt-4o-mini", 41, 12)
    assert (call["temperature"], call["max_tokens"], call["cost_usd"], call["ttft_ms"]) == (0.2, 200, 0.00021, 400.0)
    assert [one["role"] for one in loaded(call["input_messages"])] == ["system", "user"]
    assert loaded(call["output_messages"])[0]["tool_calls"][0]["function"]["name"] == "lookup"
    assert call["start_ns"] == nanoseconds("2026-05-29T13:46:20+00:00", "")


def test_langfuse_scores_are_rewards_and_words_are_none() -> None:
    bundle, outcome = rows("langfuse-scores.jsonl")
    found = [(one["target_kind"], one["name"], one["value"], one["source"]) for one in bundle.rewards]
    assert found == [("trace", "helpful", 0.8, "human"), ("span", "correct", 1.0, "llm")]
    assert bundle.rewards[0]["explanation"] == "polite"
    assert (outcome.bad, outcome.faults[0][:8]) == (1, "line 3: ")


def test_a_langfuse_trace_downloaded_from_the_ui_is_read_whole() -> None:
    bundle, outcome = rows("langfuse-trace.json")
    (span,), (reward,) = bundle.spans, bundle.rewards
    assert (span["request_model"], span["input_tokens"], span["cost_usd"]) == ("gpt-4o-mini", 3, 0.0001)
    assert span["episode_id"] == "1d3c2a0e-0000-4000-8000-000000000001"
    assert loaded(span["output_messages"]) == [{"role": "assistant", "content": "Hello"}]
    assert (reward["target_id"], reward["value"]) == (span["span_id"], 0.5)
    assert not outcome.bad


def test_phoenix_spans_and_annotations_are_read() -> None:
    bundle, outcome = rows("phoenix-spans.json")
    agent, call = bundle.spans
    assert outcome.records == {"phoenix": 2}
    assert (agent["operation"], agent["agent_name"], call["operation"]) == ("invoke_agent", "planner", "chat")
    assert (call["request_model"], call["response_model"], call["temperature"]) == (
        "gpt-4o-mini",
        "gpt-4o-mini-2024-07-18",
        0.1,
    )
    assert loaded(call["input_messages"]) == [{"role": "user", "content": "Plan a trip"}]
    (reward,) = rows("phoenix-annotations.jsonl")[0].rewards
    assert (reward["target_id"], reward["name"], reward["value"], reward["source"]) == (
        call["span_id"],
        "quality",
        0.9,
        "llm",
    )
    assert (reward["label"], reward["explanation"]) == ("good", "complete")


def test_a_phoenix_dataframe_is_read_from_lines_and_from_parquet(tmp_path: Path) -> None:
    (span,) = rows("phoenix-dataframe.jsonl")[0].spans
    assert (span["status"], span["error_type"], span["input_tokens"]) == ("error", "rate limit", 4)
    assert loaded(span["input_messages"]) == [{"role": "user", "content": "Hi"}]
    records = [json.loads(line) for line in (FILES / "phoenix-dataframe.jsonl").read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "spans.parquet")
    assert rows_of(tmp_path / "spans.parquet")[0].spans == [span]


def test_langsmith_runs_and_feedback_are_read() -> None:
    bundle, outcome = rows("langsmith-runs.jsonl")
    chain, call, tool = bundle.spans
    assert outcome.records == {"langsmith": 3}
    assert [one["operation"] for one in bundle.spans] == ["chain", "chat", "execute_tool"]
    assert call["parent_span_id"] == tool["parent_span_id"] == chain["span_id"]
    assert (call["provider"], call["input_tokens"], call["cost_usd"], call["ttft_ms"]) == ("openai", 30, 0.0004, 250.0)
    assert [(one["role"], one["content"]) for one in loaded(call["input_messages"])] == [
        ("system", "Use tools."),
        ("user", "2+2?"),
    ]
    (answer,) = loaded(call["output_messages"])
    assert (answer["finish_reason"], answer["tool_calls"][0]["function"]) == (
        "tool_calls",
        {"name": "add", "arguments": '{"a":2,"b":2}'},
    )
    assert (tool["status"], tool["error_type"]) == ("error", "ValueError('no')")
    assert [(one["target_id"], one["name"], one["value"]) for one in bundle.rewards] == [
        (chain["span_id"], "correctness", 1.0)
    ]
    feedback, told = rows("langsmith-feedback.jsonl")
    (judged,) = feedback.rewards
    assert (judged["target_id"], judged["value"], judged["source"], judged["explanation"]) == (
        call["span_id"],
        0.75,
        "human",
        "nearly",
    )
    assert told.bad == 1


def test_openai_logs_are_read_and_bad_lines_named() -> None:
    bundle, outcome = rows("openai-log.jsonl")
    chat, response, batch, tuned, twin, failed = bundle.spans
    assert outcome.records == {"openai": 6}
    assert [fault.split(":")[0] for fault in outcome.faults] == ["line 7", "line 8"]
    assert (chat["episode_id"], chat["response_id"], chat["finish_reason"], chat["input_tokens"]) == (
        "geo-1",
        "chatcmpl-log-1",
        "stop",
        12,
    )
    assert (response["operation"], loaded(response["output_messages"])) == (
        "responses",
        [{"role": "assistant", "content": "Lima"}],
    )
    assert loaded(response["input_messages"])[0] == {"role": "system", "content": "Be terse."}
    assert (batch["response_id"], loaded(batch["output_messages"])[0]["content"]) == ("chatcmpl-log-2", "Rome")
    assert loaded(tuned["input_messages"]) == [{"role": "user", "content": "Say hi"}]
    assert tuned["span_id"] != twin["span_id"], "two equal lines are two calls"
    assert (failed["status"], failed["error_type"]) == ("error", "rate_limit_exceeded")


def test_every_file_twice_is_in_once_and_its_episodes_can_be_read(tmp_path: Path) -> None:
    local, added = opened(tmp_path), []
    for _ in range(2):
        totals = {"spans": 0, "rewards": 0, "known": 0}
        for bundle in read(FILES, Outcome()):
            done = local.import_rows(bundle.spans, bundle.rewards)
            totals = {name: totals[name] + done[name] for name in totals}
        added.append(totals)
    assert added == [{"spans": 16, "rewards": 6, "known": 0}, {"spans": 0, "rewards": 0, "known": 22}]
    local.flush()
    episode = local.episode("5b8efff798038103d269b633813fc60c")
    assert {node["role"] for node in episode["tree"]} == {"support-agent", "planner"}
    assert local.stats()["unmatched_rewards"] == 0
    local.close()


def test_a_gzipped_file_and_an_array_are_read_alike(tmp_path: Path) -> None:
    text = (FILES / "langsmith-runs.jsonl").read_bytes()
    (tmp_path / "runs.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "runs.json").write_text(json.dumps([json.loads(line) for line in text.splitlines()], indent=1))
    plain = rows("langsmith-runs.jsonl")[0].spans
    assert rows_of(tmp_path / "runs.jsonl.gz")[0].spans == plain
    assert rows_of(tmp_path / "runs.json")[0].spans == plain
    (tmp_path / "torn.gz").write_bytes(gzip.compress(text)[:-20])
    spans, outcome = rows_of(tmp_path / "torn.gz")
    assert outcome.bad == 1 and "cannot be read" in outcome.faults[0]
    assert len(spans.spans) < 4


def test_a_format_that_is_named_counts_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    assert rows("langfuse-observations.jsonl", "langfuse")[0].spans
    bundle, outcome = rows("langfuse-observations.jsonl", "langsmith")
    assert (not bundle, outcome.bad) == (True, 3)
    with pytest.raises(BadInput, match="--format"):
        rows("langfuse-observations.jsonl", "csv")
    with pytest.raises(BadInput, match="there is no"):
        rows_of(tmp_path / "missing")


@pytest.mark.parametrize("name", sorted(path.name for path in FILES.iterdir()))
def test_no_record_breaks_the_reading_of_the_others(tmp_path: Path, name: str) -> None:
    """Every value of every record is replaced by one of a wrong type: named and counted, never a crash."""
    records = [record for record in _records(FILES / name) if isinstance(record, dict)]
    lines = []
    for record in records:
        for key in record:
            for wrong in (None, 7, "x", [], {}, [1], {"a": 1}, True):
                lines.append(json.dumps({**record, key: wrong}))
    (tmp_path / "wrong.jsonl").write_text("\n".join(lines))
    _, outcome = rows_of(tmp_path / "wrong.jsonl")
    assert sum(outcome.records.values()) + outcome.bad >= len(lines)


def _records(path: Path) -> list[Any]:
    text = path.read_text()
    try:
        whole = json.loads(text)
        return list(whole["data"]) if "data" in whole else [whole]
    except json.JSONDecodeError:
        found = []
        for line in text.splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1_700_000_000, 1_700_000_000_000_000_000),
        (1_700_000_000_000, 1_700_000_000_000_000_000),
        (1_700_000_000_000_000, 1_700_000_000_000_000_000),
        (1_700_000_000_000_000_000, 1_700_000_000_000_000_000),
        ("2023-11-14T22:13:20Z", 1_700_000_000_000_000_000),
        ("2023-11-14 22:13:20.000000", 1_700_000_000_000_000_000),
        ("2023-11-14T23:13:20+01:00", 1_700_000_000_000_000_000),
    ],
)
def test_times_in_any_unit_are_nanoseconds(given: Any, expected: int) -> None:
    assert nanoseconds(given, "t") == expected
