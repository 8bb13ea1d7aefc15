"""An SDK's retry that comes while the call it repeats still runs: it joins that call instead of being sent again.

SDKs made by Stainless (OpenAI's and Anthropic's) say `x-stainless-retry-count: 1` when they try again, for instance
after their own timeout. Sent upstream, that would be a second bill for one answer. A retry with the same key, path and
body, byte for byte, gets the running call's answer, headers and all; one upstream call, one span. It can join until the
answer has begun, which is as long as SDKs retry. An SDK hangs up before it tries again, so its calls aren't given up at
once. Calls are known to the worker that runs them, not to the others.
"""

import asyncio
from typing import Any, Protocol

from proxy.record import Call

RETRIES = b"x-stainless-retry-count"


class Answering(Protocol):
    """The client's side of a running call: whether its answer has begun, and where its messages go."""

    started: bool
    send: Any


class Running:
    """One call under way, as retries see it. The first that joins puts itself between the call and its client."""

    __slots__ = ("_client", "_followers", "_left", "_sdk", "_send", "call", "cancel", "over", "raw")

    def __init__(self, call: Call, raw: bytes, client: Answering, sdk: bool) -> None:
        self.over = False  # whether it has been given up
        self._sdk = sdk
        self.call = call
        self.raw = raw
        self.cancel: Any = None  # ends the call, when nobody is left to answer
        self._client = client
        self._send: Any = None
        self._followers: list[asyncio.Queue[Any]] = []
        self._left = False  # the call's own client

    @property
    def open(self) -> bool:
        """Whether its answer has not begun, so that it can be joined."""
        return not self._client.started and not self.over

    @property
    def awaited(self) -> bool:
        """Whether a retry is to be expected: an SDK hung up before it saw anything of the answer."""
        return self._sdk and self.open

    @property
    def joined(self) -> bool:
        """Whether somebody else waits for the answer."""
        return bool(self._followers)

    def leave(self) -> bool:
        """The call's own client has gone; whether the call goes on for others."""
        self._left = True
        return self.joined

    def end(self) -> None:
        """Nothing more comes: an answer that is not complete ends unclean for those who joined, too."""
        for follower in self._followers:
            follower.put_nowait(None)

    async def follow(self, send: Any) -> None:
        """Sends the answer, as it comes, to one who joins."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        if self._send is None:
            self._send, self._client.send = self._client.send, self._pass_on
        self._followers.append(queue)
        self.call.joined += 1
        try:
            while (message := await queue.get()) is not None:
                await send(message)
        finally:
            self._followers.remove(queue)
            if self._left and not self._followers and self.cancel is not None:
                self.cancel()

    async def _pass_on(self, message: Any) -> None:
        for follower in self._followers:
            follower.put_nowait(message)
        if not self._left:
            await self._send(message)


class Joining:
    """The calls under way in this worker."""

    def __init__(self) -> None:
        self.running: set[Any] = set()  # Running, and calls that make one of themselves when they are joined

    def add(self, call: Call, raw: bytes, client: Answering, awaited: bool) -> Running:
        """From now on retries can join the call. `awaited`: its client is an SDK that makes some."""
        running = Running(call, raw, client, awaited)
        self.running.add(running)
        return running

    def remove(self, running: Running) -> None:
        """It is over."""
        self.running.discard(running)
        running.end()

    def find(self, call: Call, raw: bytes) -> Running | None:
        """The running call that this retry repeats: same key, path, episode and body, and no answer yet."""
        for one in self.running:
            same = one.call.route == call.route and one.call.tenant == call.tenant and one.call.named == call.named
            if same and one.raw == raw and one.open:
                return one if isinstance(one, Running) else one.hand_over()
        return None


def is_retry(headers: dict[bytes, bytes]) -> bool:
    """Whether an SDK says that it has sent this before."""
    count = headers.get(RETRIES, b"0")
    return count.isdigit() and int(count) > 0
