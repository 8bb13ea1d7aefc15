import json
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from collector import episodes

WEIGHTS = {"reward": 1.0}


def span(number: int, start_ns: int | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "span_id": f"s{number}",
        "start_ns": number if start_ns is None else start_ns,
        "end_ns": number + 10,
        "status": "ok",
        "request_model": "asked",
        "response_model": None,
        "input_messages": json.dumps([{"role": "user", "content": str(number)}]),
        "output_messages": json.dumps([{"role": "assistant", "content": "x", "finish_reason": "stop"}]),
        **fields,
    }


def reward(number: int, span_id: str | None = None, value: float = 1.0) -> dict[str, Any]:
    return {
        "reward_id": f"rw-{number}",
        "target_kind": "span" if span_id else "episode",
        "target_id": span_id or "ep",
        "span_id": span_id,
        "name": "reward",
        "value": value,
        "ts_ns": number,
    }


def test_the_answer_has_the_keys_of_the_contract() -> None:
    rows = [span(1, prompt_slot="capital", prompt_version=3, adapter_slot="qwen", adapter_version=7, input_tokens=5)]
    answer = episodes.to_json(episodes.build("ep", rows, [reward(1, "s1"), reward(2)], WEIGHTS))
    assert set(answer) == {"episode_id", "reward", "status", "start_ns", "end_ns", "ended", "steps", "tree", "rewards"}
    (step,) = answer["steps"]
    contract = {
        "span_id": "s1",
        "step": 0,
        "role": "capital",
        "model": "asked",
        "versions": {"capital": "3", "qwen": "7"},
        "input_messages": [{"role": "user", "content": "1"}],
        "output_messages": [{"role": "assistant", "content": "x", "finish_reason": "stop"}],
        "input_tokens": 5,
        "output_tokens": None,
        "credit": None,
    }
    assert {key: step[key] for key in contract} == contract
    assert [one["reward_id"] for one in step["rewards"]] == ["rw-1"]
    assert [one["reward_id"] for one in answer["rewards"]] == ["rw-1", "rw-2"]
    assert answer["reward"] == 2.0
    assert orjson.dumps(answer)


def test_a_missing_reward_is_missing() -> None:
    answer = episodes.to_json(episodes.build("ep", [span(1)], [], WEIGHTS))
    assert answer["reward"] is None
    assert answer["rewards"] == answer["steps"][0]["rewards"] == []


def test_an_episode_with_rewards_only_has_no_steps() -> None:
    answer = episodes.to_json(episodes.build("ep", [], [reward(1)], WEIGHTS))
    assert (answer["steps"], answer["reward"], answer["start_ns"], answer["status"]) == ([], 1.0, None, "ok")


def test_a_failed_call_makes_the_episode_one_with_an_error() -> None:
    failed = span(2, status="error", error_type="timeout", http_status=504)
    answer = episodes.to_json(episodes.build("ep", [span(1), failed], [], WEIGHTS))
    assert answer["status"] == "error"
    assert (answer["steps"][1]["error_type"], answer["steps"][1]["http_status"]) == ("timeout", 504)


def test_a_candidate_shows_by_its_id_and_no_version_shows_nothing() -> None:
    assert episodes.versions({"prompt_slot": "s", "prompt_candidate": "c-1"}) == {"s": "c-1"}
    assert episodes.versions({"prompt_slot": "s"}) == {}


def test_payloads_that_are_not_lists_of_messages_are_shown() -> None:
    odd = span(1, input_messages='{"role":"user"}', output_messages='["a"', tools="[]", attributes='{"a":1}')
    (step,) = episodes.build("ep", [odd], [], WEIGHTS).steps
    assert step.input_messages == [{"role": "user"}]
    assert step.output_messages == [{"role": "unknown", "content": '["a"'}]
    assert (step.tools, step.attributes) == (None, {"a": 1})
    (step,) = episodes.build("ep", [span(1, input_messages=None, attributes="[1]")], [], WEIGHTS).steps
    assert (step.input_messages, step.attributes) == ([], {"raw": [1]})
    (step,) = episodes.build("ep", [span(1, input_messages='"hi"', attributes="{")], [], WEIGHTS).steps
    assert (step.input_messages, step.attributes) == ([{"role": "unknown", "content": "hi"}], {"raw": "{"})


@given(st.lists(st.integers(0, 5), max_size=8), st.lists(st.integers(0, 8), max_size=6), st.randoms())
def test_the_order_of_arrival_does_not_matter(starts: list[int], targets: list[int], random: Any) -> None:
    spans = [span(number, start) for number, start in enumerate(starts)]
    rewards = [reward(number, f"s{target}" if target < 8 else None) for number, target in enumerate(targets)]
    first = episodes.build("ep", spans, rewards, WEIGHTS)
    random.shuffle(spans)
    random.shuffle(rewards)
    assert episodes.build("ep", spans, rewards, WEIGHTS) == first
    assert [step.step for step in first.steps] == list(range(len(starts)))
    assert [(step.start_ns, step.span_id) for step in first.steps] == sorted(
        (step.start_ns, step.span_id) for step in first.steps
    )
    assert (first.reward is None) == (not targets)


def own(number: int, parent: str | None = None, operation: str = "execute_tool", **fields: Any) -> dict[str, Any]:
    return span(number, parent_span_id=parent, operation=operation, source="otlp", **fields)


def shape(episode: Any) -> list[tuple[str, int, str | None]]:
    return [(node.span_id, node.depth, node.role) for node in episode.tree]


def test_spans_stand_in_a_tree_and_take_the_role_of_the_agent_above_them() -> None:
    rows = [
        own(1, None, "invoke_agent", agent_name="boss"),
        span(2, parent_span_id="s1", operation="chat"),
        own(3, "s1", "invoke_agent", agent_name="helper"),
        span(4, parent_span_id="s3", operation="chat"),
        own(5, "s4", tool_name="add"),
        span(6, parent_span_id="gone", operation="chat", prompt_slot="planner"),
    ]
    episode = episodes.build("ep", rows, [], WEIGHTS)
    assert shape(episode) == [
        ("s1", 0, "boss"),
        ("s2", 1, "boss"),
        ("s3", 1, "helper"),
        ("s4", 2, "helper"),
        ("s5", 3, "helper"),
        ("s6", 0, "planner"),
    ]
    assert [(step.span_id, step.step, step.role) for step in episode.steps] == [
        ("s2", 0, "boss"),
        ("s4", 1, "helper"),
        ("s6", 2, "planner"),
    ]
    assert [node.step for node in episode.tree] == [None, 0, None, 1, None, 2]


def test_an_echo_gives_the_recorded_call_its_place() -> None:
    rows = [own(1, None, "invoke_agent"), span(2, operation="chat"), span(3, parent_span_id="e3", operation="chat")]
    echoes = [
        {"span_id": "e2", "parent_span_id": "s1", "echo_of": "s2"},
        {"span_id": "e3", "parent_span_id": "e9", "echo_of": "s3"},
        {"span_id": "e9", "parent_span_id": "s1", "echo_of": "gone"},
    ]
    assert episodes.parents(rows, echoes) == {"s1": None, "s2": "s1", "s3": "s1"}


def test_how_an_episode_ended() -> None:
    call = span(1, source="proxy")
    whole = reward(1)
    assert episodes.ending([call], [], 100) is None
    assert episodes.ending([call], [reward(1, "s1")], 100) is None
    assert episodes.ending([call], [whole], 100) == "reward"
    assert episodes.ending([call, own(2)], [], 100) == "closed"
    assert episodes.ending([call, own(2, "s1")], [], 100) is None
    assert episodes.ending([call], [], 12 + episodes.IDLE_NS) == "idle"
    assert episodes.ending([], [], 12 + episodes.IDLE_NS) is None


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), max_size=20))
def test_no_two_calls_of_a_branch_overlap_and_there_are_no_more_branches_than_calls_at_once(times: Any) -> None:
    calls = [span(number, start_ns=start) | {"end_ns": start + length} for number, (start, length) in enumerate(times)]
    calls.sort(key=lambda row: (row["start_ns"], row["span_id"]))
    found = episodes.branches(calls)
    ends = [max(row["end_ns"], row["start_ns"] + 1) for row in calls]
    for later, branch in enumerate(found):
        for earlier in range(later):
            assert found[earlier] != branch or ends[earlier] <= calls[later]["start_ns"]
    most = max(
        (sum(row["start_ns"] <= at < end for row, end in zip(calls, ends, strict=True)) for at in range(45)), default=0
    )
    assert len(set(found)) == most
    assert set(found) == set(range(most))


@given(st.dictionaries(st.integers(0, 8), st.integers(0, 10), max_size=9), st.randoms())
def test_whatever_parents_rows_name_every_span_stands_in_the_tree_once(links: dict[int, int], random: Any) -> None:
    rows = [own(number, f"s{parent}") for number, parent in links.items()]
    first = episodes.build("ep", rows, [], WEIGHTS)
    random.shuffle(rows)
    above = {node.span_id: node.parent_span_id for node in first.tree}
    assert sorted(above) == sorted(row["span_id"] for row in rows)
    seen: set[str] = set()
    for node in first.tree:
        assert node.parent_span_id is None or node.parent_span_id in seen
        seen.add(node.span_id)
    assert sorted(node.span_id for node in episodes.build("ep", rows, [], WEIGHTS).tree) == sorted(above)
    for number, parent in links.items():
        if parent not in links:
            assert above[f"s{number}"] is None
