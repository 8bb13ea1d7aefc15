"""`responses`: OpenAI's Responses interface. The prompt is `instructions`, or a message of the input."""

from typing import Any

import orjson

from proxy.dialects.base import (
    Json,
    Prompt,
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

_LAST = frozenset((b"response.completed", b"response.failed", b"response.incomplete", b"error"))


class Responses:
    """The dialect. A conversation is a list of items: messages, function calls, and their outputs."""

    operation = "responses"
    service = "openai"
    usage_option = False
    marks: tuple[bytes, ...] = (b"response.completed", b"response.failed", b"response.incomplete", b"error")

    def read(self, body: Json) -> Reading:
        """Prompts are `instructions`, system and developer items, and the first user item."""
        reading = Reading(string(body.get("model")), body.get("stream") is True)
        instructions, given = body.get("instructions"), body.get("input")
        if isinstance(instructions, str):
            reading.prompts.append(Prompt("system", instructions, ("instructions",)))
            reading.turns.append(turn("system", instructions))
        if isinstance(given, str):
            reading.prompts.append(Prompt("user", given, ("input",)))
            reading.turns.append(turn("user", given))
        user = False
        for index, item in enumerate(given if isinstance(given, list) else ()):
            if not isinstance(item, dict):
                continue
            role = item.get("role")
            if role in ("system", "developer") or (role == "user" and not user):
                user = user or role == "user"
                reading.prompts += prompt_at(role, item.get("content"), ("input", index, "content"))
            reading.turns += _turns(item)
        return reading

    def messages(self, body: Json) -> list[Json]:
        """`instructions` as a system message, then the input's items."""
        instructions, given = body.get("instructions"), body.get("input")
        first = [{"role": "system", "content": instructions}] if isinstance(instructions, str) else []
        return first + ([{"role": "user", "content": given}] if isinstance(given, str) else dicts(given))

    def ends(self, event: Event) -> bool:
        """The event that carries the whole response is the last one."""
        return event.name in _LAST if event.name else _kind(event).encode() in _LAST

    def parser(self) -> StreamParser:
        """A parser for one stream."""
        return ResponsesStream()

    def summarise(self, reply: Json) -> Summary:
        """One message with the text and the calls; the items stay as they are in `items`."""
        items = dicts(reply.get("output"))
        calls = [
            {"id": item.get("call_id"), "type": "function", "function": {name: item.get(name) for name in _CALL}}
            for item in items
            if item.get("type") == "function_call"
        ]
        text = "".join(text_of(item.get("content")) for item in items if item.get("type") == "message")
        message: Json = {"role": "assistant", "content": text, "finish_reason": reply.get("status")}
        if calls:
            message["tool_calls"] = calls
        summary = Summary(
            response_id=string(reply.get("id")),
            response_model=string(reply.get("model")),
            finish_reason=_reason(reply),
            output_messages=[message],
            error_type=error_of(reply),
            replies=[[found.canonical for item in items for found in _turns(item)]],
        )
        _usage(summary, reply.get("usage"))
        return summary


_CALL = ("name", "arguments")


class ResponsesStream(StreamParser):
    """Collects text and finished items until the event that holds the whole response replaces them."""

    def __init__(self) -> None:
        self._response: Json = {}
        self._items: list[Json] = []
        self._text: list[str] = []
        self._error: str | None = None
        self._whole = False

    def feed(self, event: Event) -> None:
        """Takes the next event."""
        try:
            body = orjson.loads(event.data)
        except orjson.JSONDecodeError:
            return
        if isinstance(body, dict):
            self.take(body, event.name.decode("utf-8", "replace"))

    def take(self, body: Json, name: str = "") -> None:
        """Takes the next event's JSON; its type goes before the event's name."""
        kind = string(body.get("type")) or name
        if isinstance(body.get("response"), dict):
            self._response = body["response"]
            self._whole = kind.encode() in _LAST
        elif kind == "response.output_text.delta":
            self._text.append(string(body.get("delta")) or "")
        elif kind == "response.output_item.done" and isinstance(body.get("item"), dict):
            self._items.append(body["item"])
        elif kind == "error":
            self._error = error_of(body) or string(body.get("code")) or "error"

    def summary(self) -> Summary:
        """That of the whole response, or of its parts so far."""
        response = self._response
        if not self._whole:
            response = {**response, "output": self._items or [_message("".join(self._text))]}
        summary = Responses().summarise(response)
        summary.error_type = summary.error_type or self._error
        return summary


def _message(text: str) -> Json:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def _kind(event: Event) -> str:
    try:
        body = orjson.loads(event.data)
    except orjson.JSONDecodeError:
        return ""
    return (string(body.get("type")) or "") if isinstance(body, dict) else ""


def _reason(reply: Json) -> str | None:
    details = reply.get("incomplete_details")
    reason = string(details.get("reason")) if isinstance(details, dict) else None
    return reason or string(reply.get("status"))


def _usage(summary: Summary, usage: Any) -> None:
    if isinstance(usage, dict):
        details = usage.get("input_tokens_details")
        summary.input_tokens = integer(usage.get("input_tokens"))
        summary.output_tokens = integer(usage.get("output_tokens"))
        summary.cached_tokens = integer(details.get("cached_tokens")) if isinstance(details, dict) else None


def _turns(item: Json) -> list[Turn]:
    """Reasoning items are left out: clients may drop them on the way back."""
    kind = item.get("type")
    if kind == "function_call":
        return [turn("assistant", "", [(item.get("call_id"), item.get("name"), item.get("arguments") or "")])]
    if kind == "function_call_output":
        return [turn("tool", text_of(item.get("output")), answers=item.get("call_id"))]
    if isinstance(item.get("role"), str):
        return [turn(item["role"], text_of(item.get("content")))]
    return []
