"""The client's side of a call: what is said to it, and that the record comes first."""

from typing import Any

from proxy.errors import Header
from proxy.joining import Running
from proxy.record import Call, Recorder

LENGTH = b"content-length"


class Client:
    """The client's side of one call. What ends an answer is sent after the call was recorded."""

    def __init__(self, send: Any, call: Call, recorder: Recorder) -> None:
        self.send = send
        self._call = call
        self._recorder = recorder
        self.started = False
        self.running: Running | None = None

    async def start(self, status: int, headers: list[Header]) -> None:
        """The head of the answer; the call's own headers are added."""
        self.started = True
        self._call.http_status = status
        await self.send({"type": "http.response.start", "status": status, "headers": headers + self._call.headers()})

    async def body(self, chunk: bytes) -> None:
        """A piece of the body that more follows."""
        self._call.response_bytes += len(chunk)
        await self.send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def last(self, chunk: bytes, more: bool = False) -> None:
        """The piece with which the answer is complete for a client; records first. `more`: the connection isn't."""
        self._call.response_bytes += len(chunk)
        self._recorder.write(self._call)
        await self.send({"type": "http.response.body", "body": chunk, "more_body": more})

    async def whole(self, status: int, headers: list[Header], body: bytes, more: bool = False) -> None:
        """A whole answer; records first."""
        self._call.http_status, self._call.response_bytes = status, len(body)
        self._recorder.write(self._call)
        length = (LENGTH, b"%d" % len(body))
        await self.start(status, headers if length in headers else [*without_length(headers), length])
        await self.send({"type": "http.response.body", "body": body, "more_body": more})


def without_length(headers: list[Header]) -> list[Header]:
    """The headers of a body whose length is to be told anew, or not at all."""
    return [pair for pair in headers if pair[0] != LENGTH]
