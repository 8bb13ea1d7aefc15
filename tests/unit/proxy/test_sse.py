import itertools
import json
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import sse
from proxy.sse import Event

ENDS = (b"\n", b"\r\n", b"\r")
lines = st.sampled_from(
    (
        b"data: a",
        b"data:b",
        b"data:  c",
        b"data",
        b"event: x",
        b": comment",
        b"id: 1",
        b"",
        "data: ü€😀".encode(),
        b"junk",
    )
)
streams = st.lists(st.tuples(lines, st.sampled_from(ENDS)), max_size=14).map(
    lambda pairs: b"".join(line + end for line, end in pairs)
)


def cut(stream: bytes, at: Iterable[int]) -> list[bytes]:
    places = [0, *sorted(place % (len(stream) + 1) for place in at), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(places)]


def run(chunks: Iterable[bytes]) -> tuple[list[bytes], bytes]:
    splitter = sse.Splitter()
    return [splitter.feed(chunk) for chunk in chunks], splitter.rest


def whatwg(stream: bytes) -> list[Event]:
    """The standard's algorithm, line by line."""
    found, data, name = [], [], b""
    for line in stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            if data:
                found.append(Event(name, b"\n".join(data)))
            data, name = [], b""
        elif field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
    return found


@given(streams, st.lists(st.integers(0, 200), max_size=6))
def test_no_byte_is_lost_added_or_moved_however_a_stream_is_cut(stream: bytes, at: list[int]) -> None:
    runs, rest = run(cut(stream, at))
    assert b"".join(runs) + rest == stream


@given(streams, st.lists(st.integers(0, 200), max_size=6))
def test_any_cut_gives_the_events_of_the_standard(stream: bytes, at: list[int]) -> None:
    runs, rest = run(cut(stream, at))
    if rest.endswith(b"\n\r"):
        runs.append(rest)  # whole only if nothing follows: an LF would belong to it
    assert [event for whole in runs for event in sse.events(whole)] == whatwg(stream)


@given(streams)
def test_blocks_join_to_the_run_and_hold_one_event_each(stream: bytes) -> None:
    runs, _ = run([stream])
    blocks = list(sse.blocks(runs[0]))
    assert b"".join(blocks) == runs[0]
    assert [event for block in blocks if (event := sse.read(block))] == list(sse.events(runs[0]))


@given(streams, st.integers(0, 200))
def test_a_run_holds_only_whole_events(stream: bytes, at: int) -> None:
    for whole in run(cut(stream, [at]))[0]:
        assert not whole or whole.endswith((b"\n", b"\r"))


def test_a_byte_order_mark_belongs_to_no_field() -> None:
    assert list(sse.events(b"\xef\xbb\xbfdata: a\n\n")) == [Event(b"", b"a")]


def test_a_line_end_cut_in_two_belongs_to_its_event() -> None:
    splitter = sse.Splitter()
    assert splitter.feed(b"data: a\r\n\r") == b""
    assert splitter.feed(b"\ndata: b") == b"data: a\r\n\r\n"


def test_an_event_of_bare_carriage_returns_is_not_held_back() -> None:
    assert sse.Splitter().feed(b"data: a\r\r") == b"data: a\r\r"


def test_an_event_is_forwarded_as_soon_as_it_is_whole() -> None:
    splitter = sse.Splitter()
    assert splitter.feed(b"data: a\n") == b""
    assert splitter.feed(b"\ndata: b") == b"data: a\n\n"
    assert splitter.feed(b"\n\n") == b"data: b\n\n"


def test_an_event_without_end_is_let_through_at_some_size() -> None:
    splitter = sse.Splitter()
    assert splitter.feed(b"x" * sse.MAX_EVENT) == b""
    assert len(splitter.feed(b"yz")) == sse.MAX_EVENT + 2


def test_the_last_event_of_a_broken_stream_still_tells() -> None:
    assert list(sse.events(b"data: a\n\ndata: b")) == [Event(b"", b"a"), Event(b"", b"b")]


plain = st.sampled_from(
    (
        b'data: {"a":1}\n\n',
        b'data: {"b":[1,"x"]}\n\n',
        'data: {"c":"\\u00e9€"}\n\n'.encode(),
        b"data: [DONE]\n\n",
        b"data: 1,2\n\n",
        b'data: {"a":1},{"b":2}\n\n',
        b"data: [1\n\n",
        b"data: 2]\n\n",
        b'data: "x"\n\n',
        b": ping\n\n",
        b'event: e\ndata: {"a":1}\n\n',
        b'data: {"a":\ndata: 1}\n\n',
        b'data: {"a":1}\r\n\r\n',
        b'data: {"a":1}',
        b"\n",
        b"data: \n\n",
    )
)


@settings(deadline=None)
@given(st.lists(plain, max_size=8).map(b"".join))
def test_one_parse_of_a_plain_stream_finds_what_its_events_hold(stream: bytes) -> None:
    found = sse.values(stream)
    if found is not None:
        events = [event.data for event in sse.events(stream) if event.data != b"[DONE]"]
        assert found == [json.loads(event) for event in events]


def test_the_streams_of_chat_completions_are_plain() -> None:
    assert sse.values(b'data: {"a":1}\n\ndata: {"b":2}\n\ndata: [DONE]\n\n') == [{"a": 1}, {"b": 2}]
    assert sse.values(b'data: {"a":1}\n\n') == [{"a": 1}]
