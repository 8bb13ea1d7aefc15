"""Agents' own spans in the store: joined to the proxy's episodes, each call counted once, in whatever order."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collector import otel_in
from collector.client import Local
from collector.maintenance import rebuild, verify
from tests.unit.collector import rows
from tests.unit.collector.rows import call, write
from tests.unit.collector.test_otel_in import span

TRACE = f"{7:032x}"


def own(number: int, parent: int | None = None, operation: str = "chat", **fields: Any) -> tuple[str, Any]:
    """The journal line of an agent's own span, of trace TRACE unless told otherwise."""
    attributes = {"gen_ai.operation.name": operation, **fields.pop("attributes", {})}
    seen = span(
        attributes,
        trace_id=fields.pop("trace_id", TRACE),
        span_id=f"a{number:015x}",
        parent_span_id=None if parent is None else f"a{parent:015x}",
        start_ns=1_000 + number,
        end_ns=3_000 + number,
    )
    return "otlp", replace(otel_in.row(seen), **fields)


AGENT = own(0, None, "invoke_agent", attributes={"gen_ai.agent.name": "solver"})
ECHO = own(1, 0, response_id="chatcmpl-1", input_tokens=5)
TOOL = own(2, 0, "execute_tool", attributes={"gen_ai.tool.name": "add"})
# The same call as the proxy recorded it: the agent sent no traceparent, so it is an episode of its own.
RECORDED = call(1, response_id="chatcmpl-1", input_tokens=5, episode_id="ep-x")


def content(data_dir: Path) -> Any:
    """Everything that a reader may see of episodes."""
    local = Local(data_dir, rows.settings(data_dir))
    try:
        found = local.query("SELECT span_id, episode_id, step, operation FROM spans_v ORDER BY 1")["rows"]
        echoes = local.query("SELECT span_id, echo_of, trace_id FROM echoes ORDER BY 1")["rows"]
        episodes = local.query("SELECT episode_id, steps, input_tokens, reward FROM episodes_v ORDER BY 1")["rows"]
        judged = local.query("SELECT reward_id, episode_id, span_id FROM rewards_v ORDER BY 1")["rows"]
        payloads = local.query("SELECT span_id, episode_id FROM spans JOIN payloads USING (span_id, episode_id)")[
            "rows"
        ]
        assert len(payloads) == len(found), "a payload stands with another episode than its span"
        report = verify(data_dir / "journal", local)
        assert report.ok, report
        return found, echoes, episodes, judged
    finally:
        local.close()


def test_a_call_that_both_sides_recorded_counts_once_and_the_trace_joins_its_episode(tmp_path: Path) -> None:
    write(tmp_path, RECORDED, AGENT, ECHO, TOOL)
    spans, echoes, episodes, _ = content(tmp_path)
    assert spans == [
        [f"{1:016x}", "ep-x", 0, "chat"],
        [f"a{0:015x}", "ep-x", None, "invoke_agent"],
        [f"a{2:015x}", "ep-x", None, "execute_tool"],
    ]
    assert echoes == [[f"a{1:015x}", f"{1:016x}", TRACE]]
    assert episodes == [["ep-x", 1, 5, None]]


def test_the_recorded_call_takes_its_echos_place_in_the_tree(tmp_path: Path) -> None:
    write(tmp_path, RECORDED, AGENT, ECHO, TOOL)
    local = Local(tmp_path, rows.settings(tmp_path))
    episode = local.episode("ep-x")
    local.close()
    assert [(node["depth"], node["operation"], node["role"], node["step"]) for node in episode["tree"]] == [
        (0, "invoke_agent", "solver", None),
        (1, "chat", "solver", 0),
        (1, "execute_tool", "solver", None),
    ]


def test_a_trace_that_the_proxy_saw_under_an_explicit_episode_belongs_there(tmp_path: Path) -> None:
    write(tmp_path, TOOL, role="early")
    assert content(tmp_path)[0][0][1] == TRACE
    write(tmp_path, call(1, trace_id=TRACE, episode_id="mine"), role="late")
    assert {row[1] for row in content(tmp_path)[0]} == {"mine"}


def test_a_span_that_names_its_episode_stays_there(tmp_path: Path) -> None:
    named = own(3, None, "execute_tool", attributes={"ratchet.episode.id": "elsewhere"})
    write(tmp_path, RECORDED, ECHO, named)
    assert [row[1] for row in content(tmp_path)[0]] == ["ep-x", "elsewhere"]


def test_a_response_id_that_every_answer_has_marries_no_calls_hours_apart(tmp_path: Path) -> None:
    later = 10**18
    write(tmp_path, RECORDED, own(1, response_id="chatcmpl-1", start_ns=later, end_ns=later + 1))
    spans, echoes, episodes, _ = content(tmp_path)
    assert (len(spans), echoes, len(episodes)) == (2, [], 2)


def test_what_an_exporter_sends_again_counts_once(tmp_path: Path) -> None:
    write(tmp_path, RECORDED, AGENT, ECHO, TOOL, AGENT, role="one")
    once = content(tmp_path)
    write(tmp_path, AGENT, ECHO, TOOL, role="two")
    assert content(tmp_path) == once


@pytest.mark.parametrize(("kind", "target"), [("span", f"a{1:015x}"), ("trace", TRACE), ("response", "chatcmpl-1")])
def test_a_reward_of_an_echo_is_the_recorded_calls(tmp_path: Path, kind: str, target: str) -> None:
    body = {"reward_id": "r", "target_kind": kind, "target_id": target, "value": 0.5, "ts_ns": 1, "name": "reward"}
    write(tmp_path, RECORDED, ECHO, ("reward", body))
    _, _, episodes, judged = content(tmp_path)
    assert judged == [["r", "ep-x", None if kind == "trace" else f"{1:016x}"]]
    assert episodes == [["ep-x", 1, 5, 0.5]]


EVERYTHING = [
    RECORDED,
    AGENT,
    ECHO,
    TOOL,
    call(2, response_id="chatcmpl-2", trace_id=TRACE, episode_id="ep-y", start_ns=1_001),
    own(4, 0, response_id="chatcmpl-2"),
    own(5, None, trace_id=f"{8:032x}"),
    (
        "reward",
        {"reward_id": "r", "target_kind": "trace", "target_id": TRACE, "value": 1, "ts_ns": 1, "name": "reward"},
    ),
]


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.permutations(range(len(EVERYTHING))), st.sets(st.integers(1, len(EVERYTHING) - 1), max_size=2))
def test_the_order_in_which_things_arrive_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], cuts: set[int]
) -> None:
    expected_dir, data_dir = tmp_path_factory.mktemp("expected"), tmp_path_factory.mktemp("permuted")
    write(expected_dir, *EVERYTHING)
    bounds = [0, *sorted(cuts), len(order)]
    for start, end in itertools.pairwise(bounds):
        write(data_dir, *(EVERYTHING[index] for index in order[start:end]), role=f"w{start}")
        content(data_dir)  # loads what there is so far
    assert content(data_dir) == content(expected_dir)


def test_a_rebuilt_store_has_the_same_rows(tmp_path: Path) -> None:
    for number, event in enumerate(reversed(EVERYTHING)):
        write(tmp_path, event, role=f"w{number}")
        before = content(tmp_path)
    config = rows.settings(tmp_path)
    first = rebuild(config)
    assert content(tmp_path) == before
    assert {name: count for name, (count, _) in first.items() if name in ("span", "echo", "reward")} == {
        "span": 5,
        "echo": 2,
        "reward": 1,
    }
    assert json.dumps(sorted(first)) == json.dumps(sorted(rebuild(config)))
