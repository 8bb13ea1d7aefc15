"""A call's line: every field that is never unknown is in it, and all of it fits the record's type."""

import dataclasses
from typing import Any

import orjson
import pytest

from collector.model import Exchange
from proxy.dialects import KNOWN
from proxy.dialects.base import Summary
from proxy.identity import Identity, Trace
from proxy.paths import Route
from proxy.record import Applied, Call, exchange


def call(**known: Any) -> Call:
    made = Call(
        Route(KNOWN["chat/completions"], "", "/v1/chat/completions"), KNOWN["chat/completions"], Trace(), "", ""
    )
    made.identity = Identity("ep-1", "new")
    for name, value in known.items():
        setattr(made, name, value)
    return made


def test_a_line_is_an_exchange_and_leaves_out_only_what_is_unknown() -> None:
    line = exchange(call(), 0.5)
    recorded = Exchange(**line)
    assert recorded.end_ns - recorded.start_ns == 500_000_000
    for one in dataclasses.fields(Exchange):
        assert one.name in line or one.default is None, one.name


def test_two_slots_have_the_product_of_their_propensities() -> None:
    prompt, adapter = Applied("p", 2, None, 0.5, {}), Applied("a", 3, None, 0.25, {}, "served")
    assert exchange(call(applied=[prompt], adapter=adapter), 0)["propensity"] == 0.125
    assert exchange(call(adapter=adapter), 0)["propensity"] == 0.25
    assert "propensity" not in exchange(call(), 0)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"max_tokens": 1, "max_completion_tokens": 2}, {"max_tokens": 2}),
        ({"max_output_tokens": 3}, {"max_tokens": 3}),
        ({"temperature": 1, "top_p": True, "seed": 7.5}, {"temperature": 1.0, "top_p": None, "seed": None}),
    ],
)
def test_parameters_are_recorded_where_they_are_numbers(body: dict[str, Any], found: dict[str, Any]) -> None:
    line = exchange(call(body=body), 0)
    assert {name: line.get(name) for name in found} == found


def test_calls_do_not_share_what_they_learn() -> None:
    one, other = call(), call()
    one.applied.append(Applied("p", 1, None, 1.0, {}))
    one.summary = Summary(response_id="x")
    assert (other.applied, other.summary.response_id, Call.summary) == ([], None, Summary())


def test_an_answer_that_was_not_kept_whole_says_so() -> None:
    assert orjson.loads(exchange(call(truncated=True), 0)["attributes"]) == {"truncated": True}
