"""What every dialect gives the relay: how to read a request, follow a stream and sum up an answer.

A dialect never touches bytes on their way; it only reads copies. Bodies are plain JSON values as `orjson.loads` gives
them, of any shape: a reader takes what has the expected type and ignores the rest.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import orjson

from proxy import sse
from proxy.sse import Event

Json = dict[str, Any]
Path = tuple[str | int, ...]
_DICTS = {dict}


class Prompt(NamedTuple):
    """A text that may be a slot's prompt: whose message it is, the text, and where it stands in the body."""

    role: str  # system | developer | user
    text: str
    path: Path


class Turn(NamedTuple):
    """A message, or some in a row of one side, in a form that survives a round trip through a client: `reply` tells the
    model's from the agent's; `canonical` is a JSON list, so that a row of them reads in one way only."""

    reply: bool
    canonical: bytes


@dataclass(slots=True)
class Reading:
    """What the proxy has to know of a request. `turns` is empty where a dialect has no conversation; `digest` is what
    hashing all of them has come to, once somebody has done it."""

    model: str | None = None
    stream: bool = False
    prompts: list[Prompt] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    digest: Any = None


@dataclass(init=False)
class Summary:
    """What an answer says about itself. None: it didn't say. The defaults are the class's: most answers say little."""

    response_id: str | None = None
    response_model: str | None = None
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    output_messages: list[Json] | None = None
    token_ids: Json | None = None
    logprobs: Any = None
    error_type: str | None = None  # an error told inside a stream or a 200
    replies: Sequence[list[bytes]] = ()  # per choice, the canonical turns of the reply

    def __init__(self, **told: Any) -> None:
        if told:
            self.__dict__.update(told)


class StreamParser(Protocol):
    """Follows one stream."""

    def read(self, stream: bytes) -> None:
        """Takes a whole stream, or what there is of it."""
        values = sse.values(stream)
        if values is None:
            for event in sse.events(stream):
                self.feed(event)
        else:
            for value in values:
                self.take(value)

    def feed(self, event: Event) -> None:
        """Takes the next event; what isn't a JSON object tells nothing."""

    def take(self, value: Json) -> None:
        """Takes the JSON of the next event, in a stream whose events have no names."""

    def summary(self) -> Summary:
        """What is known so far; also of a stream that was cut."""


class Dialect(Protocol):
    """One wire format."""

    operation: str  # gen_ai.operation.name
    service: str  # which default upstream speaks it: openai | anthropic
    usage_option: bool  # whether a stream tells its usage only when `stream_options` asks for it
    marks: tuple[bytes, ...]  # one of these is in the raw bytes of a stream's last event

    def read(self, body: Json) -> Reading:
        """What identity, slots and routing need."""

    def messages(self, body: Json) -> list[Json]:
        """The input as a list of messages, for the record."""

    def ends(self, event: Event) -> bool:
        """Whether a client may take this event for the end of the stream."""

    def parser(self) -> StreamParser:
        """A parser for one stream."""

    def summarise(self, reply: Json) -> Summary:
        """The summary of a whole JSON answer."""


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or the text parts of a list, other parts by their JSON."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(part) for part in content)
    return ""


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    return canonical_json(part)


def canonical_json(value: Any) -> str:
    """The same text for equal JSON values; a string is parsed, since clients re-dump arguments in their own way."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value or "{}")
        except orjson.JSONDecodeError:
            return str(value)
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def turn(role: str, text: str, calls: Iterable[tuple[Any, Any, Any]] = (), answers: Any = None) -> Turn:
    """The turn of one message; see `told`."""
    return Turn(role == "assistant", orjson.dumps(told(role, text, calls, answers)))


def told(role: str, text: str, calls: Iterable[tuple[Any, Any, Any]] = (), answers: Any = None) -> tuple[Any, ...]:
    """A message as it is compared; `calls` are (id, name, arguments) and `answers` is the id of the call that a tool's
    result answers.

    What clients drop or normalise on the way back (nulls, annotations, white space around a reply) isn't part of it.
    """
    listed = [(ident, name, canonical_json(arguments)) for ident, name, arguments in calls]
    return role, text.strip() if role == "assistant" else text, listed, answers


def prompt_at(role: str, content: Any, path: Path) -> list[Prompt]:
    """The prompts in a message's content: the string, or each text part of a list."""
    if isinstance(content, str):
        return [Prompt(role, content, path)]
    if not isinstance(content, list):
        return []
    return [
        Prompt(role, part["text"], (*path, index, "text"))
        for index, part in enumerate(content)
        if isinstance(part, dict) and isinstance(part.get("text"), str)
    ]


def dicts(value: Any) -> list[Json]:
    """The dicts of a list, itself where it holds nothing else; of anything else none."""
    if type(value) is not list:
        return []
    return value if set(map(type, value)) == _DICTS else [item for item in value if type(item) is dict]


def string(value: Any) -> str | None:
    """The value if it is a string."""
    return value if isinstance(value, str) else None


def integer(value: Any) -> int | None:
    """The value if it is a whole number."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def error_of(reply: Json) -> str | None:
    """The type of the error in an envelope, OpenAI's or Anthropic's; None where there is none."""
    error = reply.get("error")
    if isinstance(error, dict):
        return string(error.get("type")) or string(error.get("code")) or "error"
    return "error" if error else None


def as_users(given: Any) -> list[Json]:
    """One user message a text; a list of token ids is one text."""
    if given is None:
        return []
    if isinstance(given, list) and not all(isinstance(item, int) for item in given):
        return [{"role": "user", "content": item} for item in given]
    return [{"role": "user", "content": given}]
