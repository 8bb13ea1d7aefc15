"""`messages`: Anthropic's. The prompt is `system`, a string or a list of text blocks."""

from typing import Any

import orjson

from proxy.dialects.base import (
    Json,
    Reading,
    StreamParser,
    Summary,
    Turn,
    dicts,
    error_of,
    integer,
    prompt_at,
    string,
    text_of,
    turn,
)
from proxy.sse import Event


class Messages:
    """The dialect."""

    operation = "messages"
    service = "anthropic"
    usage_option = False
    marks: tuple[bytes, ...] = (b"message_stop", b"error")

    def read(self, body: Json) -> Reading:
        """Prompts are `system` and the first user message."""
        reading = Reading(string(body.get("model")), body.get("stream") is True)
        system = body.get("system")
        if system:
            reading.prompts += prompt_at("system", system, ("system",))
            reading.turns.append(turn("system", text_of(system)))
        user = False
        messages = body.get("messages")
        for index, message in enumerate(messages if isinstance(messages, list) else ()):
            if not isinstance(message, dict):
                continue
            if message.get("role") == "user" and not user:
                user = True
                reading.prompts += prompt_at("user", message.get("content"), ("messages", index, "content"))
            reading.turns.append(_turn(message))
        return reading

    def messages(self, body: Json) -> list[Json]:
        """`system` as a message, then the messages."""
        system = body.get("system")
        return ([{"role": "system", "content": system}] if system else []) + dicts(body.get("messages"))

    def ends(self, event: Event) -> bool:
        """`message_stop`, or an error, is the last event."""
        return event.name in (b"message_stop", b"error")

    def parser(self) -> StreamParser:
        """A parser for one stream."""
        return MessagesStream()

    def summarise(self, reply: Json) -> Summary:
        """One message; its blocks as they are."""
        blocks = dicts(reply.get("content"))
        reason = string(reply.get("stop_reason"))
        summary = Summary(
            response_id=string(reply.get("id")),
            response_model=string(reply.get("model")),
            finish_reason=reason,
            error_type=error_of(reply),
        )
        if "content" in reply:
            summary.output_messages = [{"role": "assistant", "content": blocks, "finish_reason": reason}]
            summary.replies = [[_turn({"role": "assistant", "content": blocks}).canonical]]
        _usage(summary, reply.get("usage"))
        return summary


class MessagesStream(StreamParser):
    """Builds the message from its block events."""

    def __init__(self) -> None:
        self._message: Json = {"content": []}
        self._usage: Json = {}
        self._blocks: dict[int, Json] = {}
        self._partial: dict[int, list[str]] = {}
        self._error: str | None = None

    def feed(self, event: Event) -> None:
        """Takes the next event."""
        try:
            body = orjson.loads(event.data)
        except orjson.JSONDecodeError:
            return
        if isinstance(body, dict):
            self.take(body)

    def take(self, body: Json) -> None:
        """Takes the next event's JSON, which has the event's name in it."""
        self._error = error_of(body) or self._error
        kind = body.get("type")
        if kind == "message_start" and isinstance(body.get("message"), dict):
            self._message.update(body["message"])
        elif kind == "content_block_start" and isinstance(body.get("content_block"), dict):
            self._blocks[integer(body.get("index")) or 0] = dict(body["content_block"])
        elif kind == "content_block_delta" and isinstance(body.get("delta"), dict):
            self._delta(integer(body.get("index")) or 0, body["delta"])
        elif kind == "message_delta" and isinstance(body.get("delta"), dict):
            self._message.update(body["delta"])
        for holder in (body.get("message"), body):
            usage = holder.get("usage") if isinstance(holder, dict) else None
            if isinstance(usage, dict):
                self._usage.update({name: value for name, value in usage.items() if value is not None})

    def _delta(self, index: int, delta: Json) -> None:
        block = self._blocks.setdefault(index, {"type": "text"})
        for name in ("text", "thinking", "signature"):
            if isinstance(delta.get(name), str):
                block[name] = (string(block.get(name)) or "") + delta[name]
        if isinstance(delta.get("partial_json"), str):
            self._partial.setdefault(index, []).append(delta["partial_json"])

    def summary(self) -> Summary:
        """What is known so far; arguments that are cut stay text."""
        blocks = []
        for index in sorted(self._blocks):
            block = self._blocks[index]
            partial = "".join(self._partial.get(index, ()))
            blocks.append({**block, "input": _arguments(partial)} if partial else block)
        summary = Messages().summarise({**self._message, "content": blocks, "usage": self._usage})
        summary.error_type = summary.error_type or self._error
        return summary


def _arguments(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _usage(summary: Summary, usage: Any) -> None:
    """Anthropic counts cached tokens apart from `input_tokens`; the record's input is all of them."""
    if not isinstance(usage, dict):
        return
    read = integer(usage.get("cache_read_input_tokens"))
    fresh = integer(usage.get("input_tokens"))
    written = integer(usage.get("cache_creation_input_tokens")) or 0
    summary.input_tokens = None if fresh is None else fresh + (read or 0) + written
    summary.output_tokens = integer(usage.get("output_tokens"))
    summary.cached_tokens = read


def _turn(message: Json) -> Turn:
    """Thinking is left out: clients may drop it on the way back."""
    role, content = string(message.get("role")) or "", message.get("content")
    if not isinstance(content, list):
        return turn(role, text_of(content))
    blocks = dicts(content)
    calls = [(b.get("id"), b.get("name"), b.get("input")) for b in blocks if b.get("type") == "tool_use"]
    results = [[b.get("tool_use_id"), text_of(b.get("content"))] for b in blocks if b.get("type") == "tool_result"]
    silent = ("tool_use", "tool_result", "thinking", "redacted_thinking")
    return turn(role, text_of([b for b in blocks if b.get("type") not in silent]), calls, results or None)
