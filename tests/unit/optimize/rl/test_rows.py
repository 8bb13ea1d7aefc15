"""Training rows hold what the engine said, token for token, whatever the calls were."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimize.rl.calls import Call, read_call
from optimize.rl.rows import Report, Row, Rules, build, matching

IDS = st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)
# A conversation: per turn what the model wrote and what it then saw; a turn may lose its history (a new context).
TURNS = st.lists(st.tuples(IDS, IDS, st.booleans()), min_size=1, max_size=6)


def conversation(turns: list[Any], episode: str = "e", version: str = "m") -> list[Call]:
    calls, context = [], (9, 9)
    for number, (wrote, saw, forgets) in enumerate(turns):
        if forgets:
            context = (8, number, 8)
        logprobs = tuple(-0.1 * (number + 1) for _ in wrote)
        calls.append(Call(f"{episode}-{number}", episode, number, version, True, context, wrote, logprobs))
        context = context + wrote + saw
    return calls


def by_span(calls: list[Call]) -> dict[str, float | None]:
    return {call.span_id: float(call.step + 1) for call in calls}


@given(TURNS)
def test_each_written_token_stands_in_one_row_with_its_own_logprob_and_advantage(turns: list[Any]) -> None:
    calls = conversation(turns)
    rows, report = build(calls, by_span(calls), Rules())
    known = {call.span_id: call for call in calls}
    assert sorted(span for row in rows for span in row.spans) == sorted(known)
    for row in rows:
        wrote = [known[span] for span in row.spans]
        found = [
            (token, logprob, advantage)
            for token, logprob, advantage, mask in zip(
                row.completion_ids, row.logprobs or (), row.advantages, row.mask, strict=True
            )
            if mask
        ]
        wanted = [
            (token, logprob, float(call.step + 1))
            for call in wrote
            for token, logprob in zip(call.completion_ids or (), call.logprobs or (), strict=True)
        ]
        assert found == wanted
    assert report.rows + report.counts["merged"] == report.calls == len(calls)


@given(TURNS)
def test_a_merged_row_is_the_last_calls_own_sequence(turns: list[Any]) -> None:
    calls = conversation(turns)
    rows, _ = build(calls, by_span(calls), Rules())
    known = {call.span_id: call for call in calls}
    for row in rows:
        last = known[row.spans[-1]]
        assert row.prompt_ids + row.completion_ids == (last.prompt_ids or ()) + (last.completion_ids or ())
        outside = [at for at, mask in enumerate(row.mask) if not mask]
        assert all(row.advantages[at] == 0 and (row.logprobs or ())[at] == 0 for at in outside)


@given(TURNS)
def test_unmerged_and_merged_rows_hold_the_same_written_tokens(turns: list[Any]) -> None:
    calls = conversation(turns)
    merged, _ = build(calls, by_span(calls), Rules())
    single, _ = build(calls, by_span(calls), Rules(merge=False))
    assert len(single) == len(calls)
    assert sum(row.tokens for row in merged) <= sum(row.tokens for row in single)
    assert sum(map(sum, (row.mask for row in merged))) == sum(map(sum, (row.mask for row in single)))


@given(TURNS, st.randoms())
def test_the_order_of_the_calls_does_not_matter(turns: list[Any], random: Any) -> None:
    calls = conversation(turns)
    mixed = calls[:]
    random.shuffle(mixed)
    assert build(mixed, by_span(calls), Rules())[0] == build(calls, by_span(calls), Rules())[0]


def test_eight_turns_in_one_row_need_a_fraction_of_the_tokens() -> None:
    turns = [((1,) * 30, (2,) * 30, False)] * 8
    calls = conversation(turns)
    merged, report = build(calls, by_span(calls), Rules())
    single, _ = build(calls, by_span(calls), Rules(merge=False))
    assert len(merged) == 1 and report.counts["merged"] == 7
    assert merged[0].tokens <= 0.4 * sum(row.tokens for row in single)


def test_calls_of_interleaved_agents_each_continue_their_own() -> None:
    one = conversation([((1,), (2,), False), ((3,), (4,), False)])
    other = [replace(call, span_id=f"b{call.step}", prompt_ids=(7, *call.prompt_ids)) for call in one]  # type: ignore[misc]
    mixed = [replace(call, step=at) for at, call in enumerate([one[0], other[0], one[1], other[1]])]
    rows, report = build(mixed, by_span(mixed), Rules())
    assert [row.spans for row in rows] == [("e-0", "e-1"), ("b0", "b1")]
    assert report.counts["merged"] == 2


def test_an_answer_that_was_tokenised_anew_is_drift_and_a_row_of_its_own() -> None:
    ask: Any = {"role": "user", "content": "hi"}
    said: Any = {"role": "assistant", "content": "there"}
    first = Call("a", "e", 0, "m", True, (1, 2), (3, 4), (-1.0, -1.0), (ask,), "there")
    again = Call("b", "e", 1, "m", True, (1, 2, 34, 5), (6,), (-1.0,), (ask, said, ask), "x")
    rows, report = build([first, again], by_span([first, again]), Rules())
    assert len(rows) == 2 and report.counts["drift"] == 1
    rows, report = build([first, replace(again, messages=(ask,))], by_span([first, again]), Rules())
    assert len(rows) == 2 and report.counts["broken"] == 1


GOOD = Call("a", "e", 0, "m", True, (1, 2), (3,), (-1.0,), ({"role": "user", "content": "q"},), "three")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ok": False}, "failed"),
        ({"single": False}, "choices"),
        ({"version": "other"}, "foreign"),
        ({"version": "old"}, "stale"),
        ({"completion_ids": None}, "no_ids"),
        ({"logprobs": None}, "no_logprobs"),
        ({"sampled": False}, "reshaped"),
    ],
)
def test_what_cannot_be_learned_from_is_left_out_and_counted(change: dict[str, Any], reason: str) -> None:
    rules = Rules(ages={"m": 0, "old": 2}, max_age=1)
    rows, report = build([replace(GOOD, **change)], {"a": 1.0}, rules)
    assert rows == [] and report.as_dict() == {"calls": 1, "rows": 0, reason: 1}


def test_a_call_without_credit_is_left_out() -> None:
    assert build([GOOD], {"a": None}, Rules())[1].counts == {"uncredited": 1}
    assert build([GOOD], {}, Rules())[1].counts == {"uncredited": 1}


def test_text_without_ids_serves_methods_that_need_none() -> None:
    rules = Rules(logprobs=False, tokenise=lambda call: ([5], [6, 7]))
    rows, report = build([replace(GOOD, prompt_ids=None, logprobs=None)], {"a": 1.0}, rules)
    assert (rows[0].prompt_ids, rows[0].completion_ids, rows[0].logprobs) == ((5,), (6, 7), None)
    assert report.counts["from_text"] == 1


def test_ids_of_the_engine_are_never_made_anew() -> None:
    def tokenise(call: Call) -> Any:
        raise AssertionError("called")

    rows, _ = build([GOOD], {"a": 1.0}, Rules(logprobs=False, tokenise=tokenise))
    assert rows[0].completion_ids == (3,)


def test_a_row_beyond_the_longest_is_left_out_whole() -> None:
    rows, report = build([GOOD], {"a": 1.0}, Rules(longest=2))
    assert rows == [] and report.counts["long"] == 1


def test_rows_that_their_version_would_not_have_written_are_dropped() -> None:
    row = Row("e", ("a", "b"), "m", (1,), (2, 3, 4), (1, 0, 1), (1.0, 0.0, 1.0), (-1.0, 0.0, -2.0))
    report = Report()
    assert matching([row], [[-1.01, -9.0, -2.01]], report) == [row]
    assert matching([row], [[-1.0, 0.0, -3.6]], report) == []
    assert report.counts["mismatch"] == 2
    assert matching([replace(row, logprobs=None)], [[0.0, 0.0, 0.0]], report) == [replace(row, logprobs=None)]


SPAN: dict[str, Any] = {
    "span_id": "s",
    "episode_id": "e",
    "step": 0,
    "status": "ok",
    "request_model": "m",
    "response_model": None,
    "temperature": 1.0,
    "top_p": None,
    "input_messages": json.dumps([{"role": "user", "content": "q"}]),
    "output_messages": json.dumps([{"role": "assistant", "content": "three"}]),
    "token_ids": json.dumps({"prompt": [1, 2], "completion": [[3, 4]]}),
    "logprobs": json.dumps([{"content": [{"logprob": -0.5}, {"logprob": -1.5}]}]),
}


def test_a_stored_span_is_read_with_what_the_engine_told() -> None:
    call = read_call(SPAN)
    assert (call.prompt_ids, call.completion_ids, call.logprobs) == ((1, 2), (3, 4), (-0.5, -1.5))
    assert call.sampled and call.version == "m" and call.answer == "three"
    text = json.dumps([{"token_logprobs": [-0.5, -1.5]}])
    assert read_call({**SPAN, "logprobs": text}).logprobs == (-0.5, -1.5)
    assert read_call({**SPAN, "adapter_slot": "q", "adapter_version": 3}).version == "q@3"
    assert not read_call({**SPAN, "temperature": 0.0}).sampled


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        "[]",
        "[null]",
        "nonsense",
        json.dumps([{"content": [{"logprob": -0.5}]}]),
        json.dumps([{"content": [{"logprob": -0.5}, {"logprob": None}]}]),
        json.dumps([{"content": [{"logprob": -0.5}, {}]}]),
        '[{"token_logprobs": [-0.5, NaN]}]',
        json.dumps([{"token_logprobs": [-0.5, 3.0]}]),
    ],
)
def test_logprobs_that_are_missing_or_broken_are_none_never_a_number(logprobs: str | None) -> None:
    call = read_call({**SPAN, "logprobs": logprobs})
    assert call.completion_ids == (3, 4) and call.logprobs is None


NAMES = st.sampled_from(["prompt", "completion", "content", "logprob", "token_logprobs"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@given(st.text(max_size=30) | VALUES.map(json.dumps))
def test_no_stored_text_breaks_the_reading(text: str) -> None:
    call = read_call({**SPAN, "token_ids": text, "logprobs": text, "input_messages": text, "output_messages": text})
    assert (call.prompt_ids is None) == (call.completion_ids is None)
    assert all(type(one) is int and one >= 0 for one in (*(call.prompt_ids or ()), *(call.completion_ids or ())))
    if call.logprobs is not None:
        assert len(call.logprobs) == len(call.completion_ids or ()) and all(map(math.isfinite, call.logprobs))
    assert all(isinstance(message, dict) for message in call.messages)
    assert call.answer is None or call.single
    assert (call.span_id, call.step, call.ok) == (SPAN["span_id"], SPAN["step"], True), "the rest is as it was"
