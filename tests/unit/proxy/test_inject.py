import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import inject

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
dumps = st.sampled_from(
    (
        orjson.dumps,
        lambda body: json.dumps(body).encode(),
        lambda body: json.dumps(body, ensure_ascii=False, indent=2).encode(),
    )
)


def messages(system: str, user: str) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}]}


@given(text, text, text, dumps)
def test_only_the_text_at_the_path_changes(system: str, user: str, new: str, dump: Any) -> None:
    body = messages(system, user)
    raw = dump(body)
    after = inject.replace(raw, body, ("messages", 0, "content"), new)
    assert orjson.loads(after) == messages(new, user) == body


def test_numbers_and_white_space_survive() -> None:
    raw = (
        b'{ "seed" : 123456789012345678901234567890, "t":1e2,"messages":[{"content":"old","role":"system"}] , "x":1.0}'
    )
    after = inject.replace(raw, orjson.loads(raw), ("messages", 0, "content"), "new")
    assert after == raw.replace(b'"old"', b'"new"')


def test_the_same_text_elsewhere_is_left_alone() -> None:
    raw = b'{"a":"hi","messages":[{"content":"hi"},{"content":"hi"}],"n":1e2}'
    after = inject.replace(raw, orjson.loads(raw), ("messages", 1, "content"), "yo")
    assert after == b'{"a":"hi","messages":[{"content":"hi"},{"content":"yo"}],"n":1e2}'


def test_a_text_in_an_unusual_escape_is_still_replaced() -> None:
    raw = rb'{"messages":[{"content":"h\u0069"}],"a":"hi"}'
    after = inject.replace(raw, orjson.loads(raw), ("messages", 0, "content"), "yo")
    assert orjson.loads(after) == {"messages": [{"content": "yo"}], "a": "hi"}


def test_the_same_text_again_gives_the_same_bytes_object() -> None:
    raw = b'{"model":"m"}'
    assert inject.replace(raw, orjson.loads(raw), ("model",), "m") is raw


@pytest.mark.parametrize("path", [("messages", 3, "content"), ("nothing",), ("n",)])
def test_a_path_to_no_string_is_refused(path: tuple[str | int, ...]) -> None:
    raw = b'{"messages":[],"n":1}'
    with pytest.raises((KeyError, IndexError, TypeError)):
        inject.replace(raw, orjson.loads(raw), path, "x")


@pytest.mark.parametrize(
    ("raw", "after"),
    [
        (b'{"stream":true,"n":1e2}', b'{"stream_options":{"include_usage":true},"stream":true,"n":1e2}'),
        (b'{"stream_options":null,"n":1e2}', b'{"stream_options":{"include_usage":true},"n":1e2}'),
        (b'{"stream_options":{}}', b'{"stream_options":{"include_usage":true}}'),
        (b'{"stream_options" : {"x":1}}', b'{"stream_options" : {"include_usage":true,"x":1}}'),
        (b'{"stream_options":{"include_usage": false}}', b'{"stream_options":{"include_usage": true}}'),
        (
            b'{"a":"\\"stream_options\\":{}","stream_options":{}}',
            b'{"a":"\\"stream_options\\":{}","stream_options":{"include_usage":true}}',
        ),
    ],
)
def test_usage_is_asked_for_without_touching_other_bytes(raw: bytes, after: bytes) -> None:
    body = orjson.loads(raw)
    assert inject.ask_for_usage(raw, body) == after
    assert body == orjson.loads(after)


def test_usage_that_is_asked_for_already_needs_nothing() -> None:
    raw = b'{"stream_options":{"include_usage":true}}'
    assert inject.ask_for_usage(raw, orjson.loads(raw)) is None


def test_options_of_a_wrong_type_are_left_for_the_upstream_to_refuse() -> None:
    raw = b'{"stream_options":7}'
    body = orjson.loads(raw)
    assert inject.ask_for_usage(raw, body) is None
    assert body == {"stream_options": 7}
