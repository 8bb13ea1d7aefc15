from datetime import date
from decimal import Decimal
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from collector.results import parsed, safe

LEAVES: Any = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary()
ODD = LEAVES | st.decimals() | st.dates() | st.uuids()
VALUES = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.integers(), inner, max_size=3)
)


@given(VALUES)
def test_whatever_comes_becomes_json(value: Any) -> None:
    assert orjson.loads(orjson.dumps(safe(value))) == safe(value)


def test_examples() -> None:
    assert safe([float("nan"), float("-inf"), 1.5, b"\x01", Decimal("1.50"), date(2026, 1, 2), {1: (2,)}]) == [
        None,
        None,
        1.5,
        "01",
        "1.50",
        "2026-01-02",
        {"1": [2]},
    ]


def test_named_columns_are_parsed() -> None:
    assert parsed({"a": '{"x":1}', "b": "[1]", "c": None}, ("a", "c", "d")) == {"a": {"x": 1}, "b": "[1]", "c": None}
