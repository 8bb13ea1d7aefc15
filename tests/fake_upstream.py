"""A scripted upstream: a raw HTTP/1.1 server in a thread that says what a test tells it to, and remembers what it got.

    with FakeUpstream() as upstream:
        upstream.reply(chat("Paris"))                    # the next answer; without one, `default` answers
        ... call upstream.url + "/chat/completions" ...
        assert upstream.requests[0].body == b"..."       # the exact bytes

An answer is a `Reply`: status, headers, and `parts`: bytes to write one by one, numbers to sleep that many seconds.
`end` says how it finishes: "clean", "close" (the connection closes early: a cut body), "reset" (RST), "hang" (silence
until the client leaves). `upstream.default` may be a Reply or a function of the Received request.
Nothing here knows Ratchet.
"""

import asyncio
import json
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass
class Received:
    """One request as it arrived. `headers`: names in lower case, the last of a name wins. `gone` is set when the
    client closed the connection before the answer was complete; `answered` when the answer was written whole."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    gone: threading.Event = field(default_factory=threading.Event)
    answered: threading.Event = field(default_factory=threading.Event)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


@dataclass(frozen=True)
class Reply:
    """What to answer. With `chunked` the body is sent in chunked encoding (one chunk a part), else with its length."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)
    parts: tuple[bytes | float, ...] = ()
    chunked: bool = False
    end: str = "clean"  # clean | close | reset | hang
    raw: bool = False  # the parts are all that is written, head included

    @property
    def body(self) -> bytes:
        return b"".join(part for part in self.parts if isinstance(part, bytes))


Script = Reply | Callable[[Received], Reply]


def json_reply(value: Any, status: int = 200, headers: Iterable[tuple[str, str]] = (), **more: Any) -> Reply:
    """A JSON answer; `value` may be bytes, which are sent as they are."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Reply(status, (("content-type", "application/json"), *headers), (body,), **more)


def sse_reply(events: Iterable[bytes | float], headers: Iterable[tuple[str, str]] = (), **more: Any) -> Reply:
    """A stream: raw event bytes (with their blank line), numbers are pauses in seconds."""
    return Reply(200, (("content-type", "text/event-stream"), *headers), tuple(events), chunked=True, **more)


def data(value: Any) -> bytes:
    """One SSE event."""
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def error_reply(status: int, message: str = "no", kind: str = "server_error", **more: Any) -> Reply:
    return json_reply({"error": {"message": message, "type": kind, "param": None, "code": None}}, status, **more)


def completion(
    text: str | None = "Paris", *, model: str = "fake-model", ident: str = "chatcmpl-1", **message: Any
) -> Any:
    """The body of a chat completion; `message` adds fields such as tool_calls to the assistant's message."""
    reason = "tool_calls" if message.get("tool_calls") else "stop"
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": reason}
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    return {"id": ident, "object": "chat.completion", "created": 1, "model": model, "choices": [choice], "usage": usage}


def chat(text: str | None = "Paris", **more: Any) -> Reply:
    return json_reply(completion(text, **more))


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    """One event of a chat stream."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "fake-model"}
    return data({**base, "choices": [choice], **more})


def usage_chunk() -> bytes:
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "fake-model"}
    return data({**base, "choices": [], "usage": usage})


def chat_events(text: str = "Paris", *, usage: bool = True) -> list[bytes]:
    """The events of a streamed answer, one a character."""
    events = [chunk({"role": "assistant", "content": ""}), *(chunk({"content": letter}) for letter in text)]
    return [*events, chunk({}, "stop"), *([usage_chunk()] if usage else []), b"data: [DONE]\n\n"]


def like_openai(request: Received) -> Reply:
    """Answers any chat request with "Paris", streamed when asked, with usage as OpenAI gives it; lists one model."""
    if request.method == "GET":
        return json_reply({"object": "list", "data": [{"id": "fake-model", "object": "model", "owned_by": "fake"}]})
    try:
        body = request.json
    except ValueError:
        return error_reply(400, "We could not parse the JSON body of your request.", "invalid_request_error")
    if body.get("stream"):
        wanted = bool((body.get("stream_options") or {}).get("include_usage"))
        return sse_reply(chat_events(usage=wanted))
    return chat(model=body.get("model", "fake-model"))


class FakeUpstream:
    """The server. `url` ends in /v1; `requests` holds each request whose body arrived; `connections` counts accepts."""

    def __init__(self, default: Script = like_openai) -> None:
        self.default = default
        self.requests: list[Received] = []
        self.connections = 0
        self._next: deque[Script] = deque()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.port = 0

    def reply(self, *replies: Script) -> Self:
        """Queues answers, used up one a request, before `default` speaks again."""
        self._next.extend(replies)
        return self

    def forget(self) -> None:
        """Drops what was received and what was queued, so that tests can share a server."""
        self.requests.clear()
        self._next.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(60):
            raise TimeoutError("the fake upstream did not start")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    def _run(self) -> None:
        self._loop.run_until_complete(self._main())
        self._loop.close()

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        await asyncio.sleep(0)  # who has just connected is known by now
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the connections that they aborted end

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            early = b""  # of the next request, read while listening for the client to leave
            while (request := await _read(reader, writer, early)) is not None:
                self.requests.append(request)
                script = self._next.popleft() if self._next else self.default
                reply = script(request) if callable(script) else script
                keep, early = await _watched(reader, writer, request, reply)
                if not keep:
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()
            if self._stop is not None and self._stop.is_set():  # what a client does not read any more is not waited for
                writer.transport.abort()


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, early: bytes) -> Received | None:
    head = early + await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("expect") == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")
    else:
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Received(method, target, headers, body)


async def _watched(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Received, reply: Reply
) -> tuple[bool, bytes]:
    """Writes the reply while listening for the client to leave: whether the connection can serve another request, and
    what of that request was read already."""
    writing = asyncio.ensure_future(_write(writer, reply))
    leaving = asyncio.ensure_future(reader.read(1))
    try:
        await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not writing.done() and _got(leaving):
            await asyncio.wait({writing})  # no leave, but the next request, sent ahead
        if not writing.done() or isinstance(writing.exception(), ConnectionError):
            request.gone.set()
            return False, b""
        keep = writing.result()
        request.answered.set()
    finally:
        for task in (writing, leaving):
            task.cancel()
        await asyncio.gather(writing, leaving, return_exceptions=True)
    return keep, _got(leaving)


def _got(leaving: "asyncio.Future[bytes]") -> bytes:
    """What was read; nothing where the client left, cleanly or not, or has said nothing."""
    return leaving.result() if leaving.done() and not leaving.cancelled() and not leaving.exception() else b""


async def _write(writer: asyncio.StreamWriter, reply: Reply) -> bool:
    head = [f"HTTP/1.1 {reply.status} Scripted", *(f"{name}: {value}" for name, value in reply.headers)]
    head.append("transfer-encoding: chunked" if reply.chunked else f"content-length: {_length(reply)}")
    if (reply.parts or reply.end == "clean") and not reply.raw:
        writer.write("\r\n".join(head).encode("latin-1") + b"\r\n\r\n")
    for part in reply.parts:
        if isinstance(part, bytes):
            writer.write(b"%x\r\n%s\r\n" % (len(part), part) if reply.chunked else part)
            await writer.drain()
            await asyncio.sleep(0)
        else:
            await asyncio.sleep(part)
    if reply.end == "clean":
        writer.write(b"0\r\n\r\n" if reply.chunked else b"")
        await writer.drain()
        return not reply.raw
    if reply.end == "hang":
        await asyncio.Event().wait()
    if reply.end == "reset":
        await asyncio.sleep(0.02)  # what was written must leave before the RST discards it
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    return False


def _length(reply: Reply) -> int:
    """The declared length; an answer that is to be cut promises more than it sends."""
    return len(reply.body) + (0 if reply.end == "clean" else 1000)
