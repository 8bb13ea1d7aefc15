"""Streams relayed in memory: every cut, without a network."""

import asyncio
import gzip
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from proxy.client import Client
from proxy.dialects import KNOWN
from proxy.errors import Broken, UpstreamError
from proxy.identity import Trace
from proxy.paths import Route
from proxy.record import Call, Recorder
from proxy.reply import decoded
from proxy.streaming import Streaming
from proxy.table import Table
from tests.fake_upstream import chat_events, chunk, data, usage_chunk
from tests.unit.proxy.harness import Lines

CHAT = b"".join(chat_events("Pâ😀"))
CRLF = b": ping\r\n\r\n" + CHAT.replace(b"\n", b"\r\n")
MESSAGES = b"".join(
    b"event: %s\ndata: %s\n\n" % (kind, body)
    for kind, body in [
        (b"message_start", b'{"type":"message_start","message":{"id":"msg_1","model":"c","usage":{"input_tokens":3}}}'),
        (b"ping", b'{"type":"ping"}'),
        (b"content_block_start", b'{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}'),
        (b"content_block_delta", b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hi"}}'),
        (b"content_block_stop", b'{"type":"content_block_stop","index":0}'),
        (b"message_delta", b'{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":5}}'),
        (b"message_stop", b'{"type":"message_stop"}'),
    ]
)
RESPONSES = b"".join(
    b"event: %s\ndata: %s\n\n" % (kind, body)
    for kind, body in [
        (
            b"response.created",
            b'{"type":"response.created","response":{"id":"resp_1","model":"m","status":"in_progress"}}',
        ),
        (b"response.output_text.delta", b'{"type":"response.output_text.delta","delta":"Hi"}'),
        (
            b"response.completed",
            b'{"type":"response.completed","response":{"id":"resp_1","model":"m","status":"completed","output":[{"type":'
            b'"message","role":"assistant","content":[{"type":"output_text","text":"Hi"}]}],'
            b'"usage":{"input_tokens":3,"output_tokens":5}}}',
        ),
    ]
)


class Scripted:
    """An upstream's answer out of a list of chunks; an exception in it is raised there."""

    status = 200
    stream = True
    complete = False
    cost_usd = None

    def __init__(self, chunks: list[Any], encoding: str = "identity") -> None:
        self.headers = [(b"content-type", b"text/event-stream")]
        self.encoding = encoding
        self._chunks = chunks

    async def read(self) -> bytes:
        return b"".join(self._chunks)

    async def chunks(self) -> AsyncIterator[bytes]:
        for part in self._chunks:
            if isinstance(part, Exception):
                raise part
            yield part

    def decoded(self, body: bytes) -> bytes | None:
        return decoded(body, self.encoding)

    def close(self) -> None:
        pass


class Released:
    def release(self) -> None:
        pass


class Heard:
    """What a client got: the bytes of each message and how many spans were written by then."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.messages: list[tuple[bytes, int]] = []
        self.ended = False

    async def __call__(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            self.messages.append((message["body"], len(self.lines.spans)))
            self.ended = not message["more_body"]

    @property
    def body(self) -> bytes:
        return b"".join(body for body, _ in self.messages)

    def written_when(self, text: bytes) -> int:
        """The spans written when the message with `text` was sent."""
        return next(count for body, count in self.messages if text in body)


def relay(table: Table, chunks: list[Any], tail: str, stripping: bool = False, encoding: str = "identity") -> Heard:
    return asyncio.run(relayed(table, chunks, tail, stripping, encoding))


def at_every_byte(table: Table, stream: bytes, tail: str, stripping: bool = False) -> list[Heard]:
    """The stream relayed in two pieces, cut at each place; then byte by byte."""

    async def run() -> list[Heard]:
        cuts = [[part for part in (stream[:at], stream[at:]) if part] for at in range(len(stream) + 1)]
        cuts.append([stream[at : at + 1] for at in range(len(stream))])
        return [await relayed(table, chunks, tail, stripping) for chunks in cuts]

    return asyncio.run(run())


async def relayed(
    table: Table, chunks: list[Any], tail: str, stripping: bool = False, encoding: str = "identity"
) -> Heard:
    lines = Lines()
    heard = Heard(lines)
    call = Call(Route(KNOWN[tail], tail, "/v1/" + tail), KNOWN[tail], Trace(), "e", "")
    recorder = Recorder(lines, table, False)  # type: ignore[arg-type]
    streaming = Streaming(Client(heard, call, recorder), call, Scripted(chunks, encoding), stripping)
    await streaming.run(Released())  # type: ignore[arg-type]
    return heard


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Table(Path(tmp_path_factory.mktemp("t")) / "t") as table:
        yield table


@pytest.mark.parametrize(
    ("tail", "stream", "text", "last"),
    [
        ("chat/completions", CHAT, "Pâ😀", b"[DONE]"),
        ("chat/completions", CRLF, "Pâ😀", b"[DONE]"),
        ("messages", MESSAGES, "Hi", b"message_stop"),
        ("responses", RESPONSES, "Hi", b"response.completed"),
    ],
)
def test_a_stream_cut_at_any_byte_arrives_as_it_was_and_is_recorded_before_its_end(
    table: Table, tail: str, stream: bytes, text: str, last: bytes
) -> None:
    for heard in at_every_byte(table, stream, tail):
        assert (heard.body, heard.ended) == (stream, True)
        (span,) = heard.lines.spans
        assert (span["status"], span["response_bytes"]) == ("ok", len(stream))
        assert text in span["output_messages"]
        assert span["output_tokens"] == (3 if tail == "chat/completions" else 5)
        assert heard.written_when(last) == 1


@pytest.mark.parametrize("stream", [CHAT, CRLF])
def test_the_added_usage_chunk_is_stripped_wherever_the_stream_is_cut(table: Table, stream: bytes) -> None:
    event = usage_chunk().replace(b"\n", b"\r\n") if stream is CRLF else usage_chunk()
    assert event in stream
    expected = stream.replace(event, b"")
    for heard in at_every_byte(table, stream, "chat/completions", stripping=True):
        assert heard.body == expected
        assert heard.lines.spans[0]["input_tokens"] == 11


def test_usage_that_comes_with_a_choice_is_not_stripped(table: Table) -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    stream = chunk({"content": "a"}, usage=None) + chunk({}, "stop", usage=usage) + b"data: [DONE]\n\n"
    heard = relay(table, [stream], "chat/completions", stripping=True)
    assert heard.body == stream
    assert heard.lines.spans[0]["output_tokens"] == 2


def test_a_stream_without_done_is_recorded_before_the_body_ends(table: Table) -> None:
    stream = b"".join(chat_events("Paris")[:-1])
    heard = relay(table, [stream], "chat/completions")
    assert heard.body == stream
    assert heard.messages[-1] == (b"", 1)
    assert heard.messages[0] == (stream, 0)
    assert heard.lines.spans[0]["status"] == "ok"


def test_what_an_upstream_says_after_the_end_is_relayed_too(table: Table) -> None:
    stream = CHAT + b": bye\n\n" + b"data: tail"
    for at in range(len(CHAT) - 3, len(stream)):
        heard = relay(table, [stream[:at], stream[at:]], "chat/completions")
        assert heard.body == stream
        assert len(heard.lines.spans) == 1


def test_an_upstream_that_breaks_after_the_end_has_told_everything(table: Table) -> None:
    heard = relay(table, [CHAT, UpstreamError("gone")], "chat/completions")
    assert (heard.body, heard.ended) == (CHAT, True)
    assert heard.lines.spans[0]["status"] == "ok"


def test_a_stream_that_breaks_gives_the_client_what_came_and_no_clean_end(table: Table) -> None:
    lines = Lines()
    heard = Heard(lines)
    call = Call(Route(KNOWN["chat/completions"], "", ""), KNOWN["chat/completions"], Trace(), "e", "")
    cut = CHAT[:-40]
    client = Client(heard, call, Recorder(lines, table, False))  # type: ignore[arg-type]
    with pytest.raises(Broken):
        asyncio.run(Streaming(client, call, Scripted([cut, UpstreamError("gone")]), False).run(Released()))  # type: ignore[arg-type]
    assert (heard.body, heard.ended) == (cut, False)
    assert call.summary.output_messages == [{"role": "assistant", "content": "Pâ😀", "finish_reason": "stop"}]


@pytest.mark.parametrize(
    ("tail", "event", "kind"),
    [
        ("chat/completions", data({"error": {"message": "no", "type": "server_error"}}), "server_error"),
        (
            "messages",
            b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n',
            "overloaded_error",
        ),
        ("responses", b'event: error\ndata: {"type":"error","code":"rate_limit"}\n\n', "rate_limit"),
    ],
)
def test_an_error_told_in_a_stream_is_an_error(table: Table, tail: str, event: bytes, kind: str) -> None:
    heard = relay(table, [event], tail)
    assert heard.body == event
    assert (heard.lines.spans[0]["status"], heard.lines.spans[0]["error_type"]) == ("error", kind)


def test_a_compressed_stream_passes_as_it_is_and_a_copy_is_read(table: Table) -> None:
    packed = gzip.compress(CHAT)
    heard = relay(table, [packed[:50], packed[50:]], "chat/completions", stripping=True, encoding="gzip")
    assert heard.body == packed
    assert "Pâ" in heard.lines.spans[0]["output_messages"]
