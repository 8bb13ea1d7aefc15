"""Top-level members of a body: what is taken out or put in, and that nothing else moves."""

import json

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import members

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=4) | st.sampled_from(["prompt_id", "a", "b"]), VALUES, max_size=5)
SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (" ,\n ", " : ")])


def dump(value: object, separators: tuple[str, str] = (",", ":")) -> bytes:
    return json.dumps(value, separators=separators, ensure_ascii=False).encode()


@settings(deadline=None)
@given(OBJECTS, SEPARATORS)
def test_every_member_is_found_where_it_stands(body: dict[str, object], separators: tuple[str, str]) -> None:
    text = dump(body, separators).decode()
    found = members.find(text)
    assert {name: json.loads(text[one.value : one.end]) for name, one in found.items()} == body


@settings(deadline=None)
@given(OBJECTS, SEPARATORS, st.lists(st.sampled_from(["prompt_id", "a", "b"]), max_size=3))
def test_what_is_taken_out_is_gone_and_the_rest_is_as_it_was(
    body: dict[str, object], separators: tuple[str, str], names: list[str]
) -> None:
    raw = dump(body, separators)
    left = {name: value for name, value in body.items() if name not in names}
    assert json.loads(members.without(raw, body, *names)) == left == body


@settings(deadline=None)
@given(OBJECTS, SEPARATORS, st.sampled_from(["prompt_id", "new"]), VALUES)
def test_what_is_put_in_is_there_and_the_rest_is_as_it_was(
    body: dict[str, object], separators: tuple[str, str], name: str, value: object
) -> None:
    wanted = {**body, name: value}
    assert json.loads(members.put(dump(body, separators), body, name, value)) == wanted == body


@pytest.mark.parametrize(
    ("raw", "left"),
    [
        (b'{"prompt_id":"s", "n" : 12345678901234567890123}', b'{"n" : 12345678901234567890123}'),
        (b'{"n" : 1e2 , "prompt_id":"s"}', b'{"n" : 1e2 }'),
        (b'{ "prompt_id":"s" }', b"{ }"),
        ('{"é":"\\u00e9","prompt_id":"}","x":0.10}'.encode(), '{"é":"\\u00e9","x":0.10}'.encode()),
    ],
)
def test_numbers_escapes_and_spaces_of_the_others_survive(raw: bytes, left: bytes) -> None:
    assert members.without(raw, orjson.loads(raw), "prompt_id") == left


def test_a_message_is_put_before_the_others() -> None:
    raw = b'{"messages": [ {"role":"user","content":"1e2"}], "seed": 12345678901234567890123}'
    body = orjson.loads(raw)
    put = members.put_first(raw, body, "messages", {"role": "system", "content": "x"})
    assert put == raw.replace(b"[ {", b'[{"role":"system","content":"x"}, {', 1)
    assert body["messages"][0]["role"] == "system"
