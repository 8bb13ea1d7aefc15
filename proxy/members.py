"""The top-level members of a JSON object as bytes: found, taken out or put in, with every other byte left alone.

Like `inject.py`, a splice is believed only after the result was parsed and compared.
"""

import json
import re
from typing import Any, NamedTuple

import orjson

from proxy.dialects.base import Json

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class Member(NamedTuple):
    """Where a member stands in the text: from its key's quote, its value from `value` to `end`."""

    start: int
    value: int
    end: int


def find(text: str) -> dict[str, Member]:
    """The members of the object in `text`; of a repeated name the last. Raises ValueError where it is no object."""
    found: dict[str, Member] = {}
    at = _skip(text, 0)
    if text[at : at + 1] != "{":
        raise ValueError("not an object")
    at = _skip(text, at + 1)
    while text[at : at + 1] == '"':
        name, colon = _DECODER.raw_decode(text, at)
        value = _skip(text, _skip(text, colon) + 1)
        _, end = _DECODER.raw_decode(text, value)
        found[name] = Member(at, value, end)
        at = _skip(text, end)
        if text[at : at + 1] != ",":
            break
        at = _skip(text, at + 1)
    return found


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at


def without(raw: bytes, body: Json, *names: str) -> bytes:
    """`raw` without these members, and `body` (the same, parsed) changed to match."""
    given = [name for name in dict.fromkeys(names) if name in body]
    for name in given:
        del body[name]
    if not given:
        return raw
    try:
        text = raw.decode()
        for name in given:
            text = _cut(text, find(text)[name])
    except (ValueError, KeyError, RecursionError):
        return orjson.dumps(body)
    return _believed(text.encode(), body)


def _cut(text: str, member: Member) -> str:
    """With the comma behind it, else with the one before it."""
    behind = _skip(text, member.end)
    if text[behind : behind + 1] == ",":
        return text[: member.start] + text[_skip(text, behind + 1) :]
    before = text[: member.start].rstrip(" \t\n\r")
    return before.removesuffix(",") + text[member.end :]


def put(raw: bytes, body: Json, name: str, value: Any) -> bytes:
    """`raw` with the member set to `value`, and `body` changed to match."""
    known = name in body
    body[name] = value
    dumped = orjson.dumps(value).decode()
    try:
        text = raw.decode()
        if known:
            member = find(text)[name]
            text = text[: member.value] + dumped + text[member.end :]
        else:
            at = text.index("{") + 1
            comma = "," if len(body) > 1 else ""
            text = f"{text[:at]}{orjson.dumps(name).decode()}:{dumped}{comma}{text[at:]}"
    except (ValueError, KeyError, RecursionError):
        return orjson.dumps(body)
    return _believed(text.encode(), body)


def put_first(raw: bytes, body: Json, name: str, item: Any) -> bytes:
    """`raw` with `item` as the first of the list `name`, and `body` changed to match."""
    items = body[name]
    items.insert(0, item)
    dumped = orjson.dumps(item).decode()
    try:
        text = raw.decode()
        at = find(text)[name].value + 1
        text = f"{text[:at]}{dumped}{',' if len(items) > 1 else ''}{text[at:]}"
    except (ValueError, KeyError, RecursionError):
        return orjson.dumps(body)
    return _believed(text.encode(), body)


def _believed(raw: bytes, body: Json) -> bytes:
    try:
        if orjson.loads(raw) == body:
            return raw
    except orjson.JSONDecodeError:
        pass
    return orjson.dumps(body)
