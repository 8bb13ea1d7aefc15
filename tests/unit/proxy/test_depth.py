"""How deep JSON may be nested: sixty-four levels, wherever the brackets stand."""

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.depth import MAX_DEPTH, _deep_text, check
from proxy.errors import BadRequest
from proxy.prepare import parse


def nested(depth: int, opening: str = '{"a":', closing: str = "}") -> bytes:
    return (opening * depth + "1" + closing * depth).encode()


@pytest.mark.parametrize(("opening", "closing"), [('{"a":', "}"), ('{"a":[', "]}")])
def test_the_limit_is_exact(opening: str, closing: str) -> None:
    levels = MAX_DEPTH // opening.replace("[", "{").count("{")
    good, bad = nested(levels, opening, closing), nested(levels + 1, opening, closing)
    check(good, parse(good))
    with pytest.raises(BadRequest, match="deeper than 64"):
        check(bad, parse(bad))


def test_what_is_too_deep_for_the_parser_is_refused_too() -> None:
    bad = nested(100_000)
    assert parse(bad) is None
    with pytest.raises(BadRequest):
        check(bad, None)


def test_brackets_in_texts_and_side_by_side_are_no_depth() -> None:
    for body in ({"a": "[" * 1000}, {"a": [{}] * 1000}, {"a": '"[' * 1000}, {"a": "\\[" * 1000}):
        raw = orjson.dumps(body)
        check(raw, parse(raw))
        check(raw, None)


def test_what_is_no_json_is_not_looked_at() -> None:
    check(b"--boundary [[[[" + b"[" * 1000, None)


JSON = st.recursive(st.none() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
    st.text(max_size=2), inner, max_size=2), max_leaves=8)  # fmt: skip


@settings(deadline=None)
@given(JSON, st.integers(60, 70))
def test_both_ways_of_measuring_agree(inner: Any, wraps: int) -> None:
    body: dict[str, Any] = {"x": inner}
    for _ in range(wraps):
        body = {"x": body}
    raw = orjson.dumps(body)
    try:
        check(raw, body)
        deep = False
    except BadRequest:
        deep = True
    assert deep == _deep_text(raw)
