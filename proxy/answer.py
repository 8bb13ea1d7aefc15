"""An upstream's answer, whichever way it came, and how it went."""

from typing import Any, Protocol

from proxy.dialects.base import Summary
from proxy.errors import Header
from proxy.record import Call


class Answer(Protocol):
    """An upstream's answer, relayed raw or translated."""

    status: int
    headers: list[Header]
    stream: bool
    encoding: str
    length: int | None
    complete: bool
    cost_usd: float | None

    async def read(self) -> bytes:
        """The whole body."""

    def chunks(self) -> Any:
        """The body as it arrives (an async iterator of bytes)."""

    def decoded(self, body: bytes) -> bytes | None:
        """A readable copy."""

    def close(self) -> None:
        """Lets go of it, finished or not."""


def judge(call: Call, status: int) -> None:
    """An answer of 400 or more is an error, and so is one that tells of an error in a stream."""
    summary: Summary = call.summary
    if status >= 400:
        call.end("error", summary.error_type or f"http_{status}")
    elif summary.error_type is not None:
        call.end("error", summary.error_type)
    else:
        call.end("ok")
