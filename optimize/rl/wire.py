"""Requests of the OpenAI dialects, read: what is asked is in a `Call`, what is wrong names its field."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collector.errors import BadInput

ROLES = ("system", "developer", "user", "assistant")
# Fields that would change the answer and that this engine does not apply: refused unless they ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "suffix": (None, ""),
    "echo": (None, False),
    "audio": (None,),
}
MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS = 128, 16, 20


class BadRequest(BadInput):
    """A field is wrong; the OpenAI dialects answer 400."""

    status = 400
    code = "invalid_value"


@dataclass(frozen=True)
class Call:
    """One request: `messages` for chat, else `prompts` (texts or token ids). `max_tokens`, `stop` None: the default."""

    model: str
    chat: bool
    messages: tuple[dict[str, Any], ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    n: int = 1
    logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False
    token_ids: bool = False


class Fields:
    """Typed reading of a body's fields; a wrong one raises BadRequest with its name. Null counts as not given."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body

    def has(self, name: str) -> bool:
        """Whether the field is given."""
        return self._body.get(name) is not None

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A finite number in [low, high]."""
        value = self._body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadRequest(f"`{name}` must be a number", param=name)
        if not low <= value <= high:
            raise BadRequest(f"`{name}` must be between {low:g} and {high:g}, not {value:g}", param=name)
        return float(value)

    def whole(self, name: str, low: int, high: int) -> int | None:
        """An integer in [low, high], or None."""
        value = self._body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise BadRequest(f"`{name}` must be a whole number between {low} and {high}", param=name)
        return value

    def flag(self, name: str) -> bool:
        """A boolean, false when not given."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, bool):
            raise BadRequest(f"`{name}` must be true or false", param=name)
        return bool(value)

    def string(self, name: str) -> str:
        """A string that must be given."""
        value = self._body.get(name)
        if not isinstance(value, str) or not value:
            raise BadRequest(f"`{name}` must be given, as a string", param=name)
        return value

    def stops(self) -> tuple[str, ...] | None:
        """`stop`: a string or a list of strings."""
        value = self._body.get("stop")
        if value is None:
            return None
        stops = (value,) if isinstance(value, str) else value
        if not isinstance(stops, list | tuple) or len(stops) > MOST_STOPS:
            raise BadRequest(f"`stop` must be a string or a list of at most {MOST_STOPS} strings", param="stop")
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise BadRequest("`stop` must hold strings that are not empty", param="stop")
        return tuple(stops)


def read_chat(body: Any) -> Call:
    """A `/v1/chat/completions` body. Raises BadRequest."""
    fields = _fields(body)
    top = fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    wanted = fields.flag("logprobs")
    if top is not None and not wanted:
        raise BadRequest("`top_logprobs` needs `logprobs`: true", param="top_logprobs")
    most = fields.whole("max_completion_tokens", 1, 1 << 31)
    return Call(
        chat=True,
        messages=_messages(body.get("messages")),
        max_tokens=most if most is not None else fields.whole("max_tokens", 1, 1 << 31),
        logprobs=(top or 0) if wanted else None,
        **_common(body, fields),
    )


def read_completion(body: Any) -> Call:
    """A `/v1/completions` body. Raises BadRequest."""
    fields = _fields(body)
    best_of = fields.whole("best_of", 1, MOST_CHOICES)
    if best_of is not None and best_of != (fields.whole("n", 1, MOST_CHOICES) or 1):
        raise BadRequest("`best_of` is not supported beyond `n`", param="best_of")
    most = fields.whole("max_tokens", 1, 1 << 31)
    return Call(
        chat=False,
        prompts=_prompts(body.get("prompt")),
        max_tokens=16 if most is None else most,
        logprobs=fields.whole("logprobs", 0, MOST_LOGPROBS),
        **_common(body, fields),
    )


def _fields(body: Any) -> Fields:
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    for name, harmless in UNSUPPORTED.items():
        if body.get(name) not in harmless:
            raise BadRequest(f"`{name}` is not supported by this engine", param=name, code="unsupported_parameter")
    return Fields(body)


def _common(body: dict[str, Any], fields: Fields) -> dict[str, Any]:
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise BadRequest("`stream_options` must be an object", param="stream_options")
    return {
        "model": fields.string("model"),
        "temperature": fields.number("temperature", 1.0, 0.0, 2.0),
        "top_p": fields.number("top_p", 1.0, 0.0, 1.0),
        "seed": fields.whole("seed", -(1 << 63), (1 << 63) - 1),
        "stop": fields.stops(),
        "n": fields.whole("n", 1, MOST_CHOICES) or 1,
        "stream": fields.flag("stream"),
        "include_usage": Fields(options or {}).flag("include_usage"),
        "token_ids": fields.flag("return_token_ids"),
    }


def _messages(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise BadRequest("`messages` must be a list of at least one message", param="messages")
    return tuple(_message(message, f"messages.{index}") for index, message in enumerate(value))


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise BadRequest(f"`{where}.role` must be one of {', '.join(ROLES)}", param=f"{where}.role")
    content = message.get("content")
    if isinstance(content, list):
        content = _text_parts(content, f"{where}.content")
    if not isinstance(content, str):
        raise BadRequest(f"`{where}.content` must be text", param=f"{where}.content")
    return {"role": message["role"], "content": content}


def _text_parts(parts: Sequence[Any], where: str) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRequest(f"`{where}` may hold text parts only", param=where)
    return "".join(part["text"] for part in parts)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str) or _is_ids(value):
        value = [value]
    if not isinstance(value, list) or not value or len(value) > MOST_CHOICES:
        raise BadRequest("`prompt` must be text, token ids, or a list of either", param="prompt")
    if all(isinstance(prompt, str) for prompt in value):
        return tuple(value)
    if all(_is_ids(prompt) for prompt in value):
        return tuple(tuple(prompt) for prompt in value)
    raise BadRequest("`prompt` must be text, token ids, or a list of either", param="prompt")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)
