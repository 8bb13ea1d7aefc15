"""A run of chunks that differ in their text only: read at once or one by one, it comes to the same."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy import sse
from proxy.dialects import runs
from proxy.dialects.chat import ChatStream
from tests.fake_upstream import chat_events, chunk

texts = st.lists(st.text(max_size=6), min_size=1, max_size=8)
odd = st.sampled_from(
    [
        chunk({"content": "x", "role": "assistant"}),
        chunk({}, finish="stop"),
        chunk({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]}),
        chunk({"content": "second choice"}).replace(b'"index":0', b'"index":1').replace(b'"index": 0', b'"index": 1'),
        b'data: {"error":{"type":"server_error"}}\n\n',
        b": a comment\n\n",
        b"data: [DONE]\n\n",
        b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"a","content":"b"}}]}\n\n',
    ]
)
pieces = st.one_of(texts.map(lambda some: b"".join(chunk({"content": text}) for text in some)), odd)


def one_by_one(stream: bytes) -> Any:
    parser = ChatStream()
    for event in sse.events(stream):
        parser.feed(event)
    return parser.summary()


def at_once(stream: bytes) -> Any:
    parser = ChatStream()
    parser.read(stream)
    return parser.summary()


@given(st.lists(pieces, max_size=6), st.integers(min_value=0, max_value=80))
def test_read_at_once_or_one_by_one_a_stream_says_the_same(parts: list[bytes], lost: int) -> None:
    stream = b"".join(parts)
    stream = stream[: max(0, len(stream) - lost)]
    assert at_once(stream) == one_by_one(stream)


def test_a_usual_stream_has_a_run_of_all_texts_but_the_first() -> None:
    events = chat_events("Paris is the capital", usage=True)
    found = runs.find(b"".join(events))
    assert found is not None
    assert found.before == b"".join(events[:2])
    told = [json.loads(event[6:])["choices"][0]["delta"]["content"] for event in events[2 : 2 + len(found.texts)]]
    assert found.texts == told
    assert found.after == b"".join(events[2 + len(found.texts) :])
    assert len(found.texts) > 1


def test_texts_that_look_like_the_end_of_a_chunk_stay_texts() -> None:
    hard = ['"}}]}', "\n\ndata: ", '","content":"', "\\", "\u2028", "é😀"]
    stream = b"".join([chunk({"role": "assistant"}), *(chunk({"content": text}) for text in ["a", *hard])])
    found = runs.find(stream)
    assert found is not None and found.texts == hard
    assert at_once(stream) == one_by_one(stream)
