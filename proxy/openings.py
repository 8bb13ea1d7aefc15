"""Beginnings of bodies that were seen before: an agent sends the same first message, its prompt, with every call.

Whether that is a slot's prompt, which version of it is in force and what goes upstream in its place is found out by
the functions that any call goes through, and kept under the bytes from the body's first to the end of that message.
A body with the same beginning has the same first message, whatever follows, unless a later member repeats the name
`messages`: such a body is left to the usual way.
"""

from typing import Any, NamedTuple

import orjson

from proxy import inject, slots
from proxy.dialects.base import Dialect, Json, Prompt, Reading
from proxy.dialects.chat import Begun
from proxy.record import Applied
from proxy.versions import Snapshot

MOST = 4  # beginnings that are kept for each head
PATH = ("messages", 0, "content")  # of the prompt that an opening is about
_AGAIN = b'"messages"'
_ESCAPED = b"\\u00"  # of a letter of ASCII


class Opening(NamedTuple):
    """The bytes that came, those that go upstream in their place, what they are served, and the first message after
    that. `model`: of the body, since slots may be for one model only."""

    came: bytes
    goes: bytes
    model: str | None
    applied: tuple[Applied, ...]
    message: Json
    begun: Begun | None = None  # that message, as it came, read

    def begins(self, raw: bytes, model: str | None) -> bool:
        """Whether a body for `model` begins like this."""
        return raw.startswith(self.came) and self.model == model

    def fits(self, raw: bytes, model: str | None) -> bool:
        """The same, and whether it names no messages a second time, in plain or escaped."""
        if not raw.startswith(self.came) or self.model != model:
            return False
        at = len(self.came)
        return raw.find(_AGAIN, at) < 0 and (raw.find(b"\\", at) < 0 or raw.find(_ESCAPED, at) < 0)

    def read(self, body: Json) -> Reading | None:
        """The reading of a body that begins like this; None where its dialect has to read it."""
        return None if self.begun is None else self.begun.read(body, self.model)


class Openings:
    """Those of one client, under one state of deployments."""

    __slots__ = ("_last", "_refused", "known")

    def __init__(self) -> None:
        self.known: list[Opening] = []
        self._last: str | None = None  # the first message of the call before
        self._refused: str | None = None  # one that nothing can be kept of

    def find(self, raw: bytes, model: str | None) -> Opening | None:
        """The opening of a body, if it is known."""
        for opening in self.known:
            if opening.fits(raw, model):
                return opening
        return None

    def learn(self, raw: bytes, reading: Reading, dialect: Dialect, now: Snapshot) -> None:
        """A body went the usual way: whether the next one like it need not. `reading`: of the body as it came."""
        first = reading.prompts[0] if reading.prompts else None
        if first is None or first.path != PATH:
            return
        if self._last != first.text:  # most that differ once will differ again
            self._last = first.text
            return
        if first.text == self._refused or any(one.begins(raw, reading.model) for one in self.known):
            return  # or it is known, and what follows kept it from fitting
        opening = opened(raw, first, reading.model, now)
        if opening is None:
            self._refused = first.text
            return
        if dialect.operation != "chat":
            opening = opening._replace(begun=None)
        self.known = [opening, *self.known[: MOST - 1]]


def opened(raw: bytes, first: Prompt, model: str | None, now: Snapshot) -> Opening | None:
    """What is to be done with bodies that begin with this one's first message, `first`, while `now` is in force; None
    where that depends on more than these bytes: an episode's share of the traffic, variables, an adapter."""
    if now.templates or now.adapters:
        return None
    came = _until(raw, first.text)
    begun = _parsed(came)
    if came is None or begun is None or not _is(begun["messages"][0], first):
        return None
    goes, applied = came, []
    for match in slots.find(now, [first], model):
        slot = now.slots[match.known.slot]
        choice = slot.choose("", now.revision)
        if choice is None or choice.propensity != 1.0 or match.values:
            return None
        text = slots.render(match, slot.texts[choice.version])
        if text is None:
            return None
        goes = inject.replace(came + b"]}", begun, first.path, text)[:-2]
        applied.append(Applied(slot.name, choice.version, None, 1.0, {}))
    # Whatever may follow follows an element of the list `messages` now as before.
    whole, sent = _parsed(goes), _parsed(came)
    if whole is None or sent is None or whole != begun:
        return None
    if goes == came:
        goes = came
    return Opening(came, goes, model, tuple(applied), whole["messages"][0], Begun.of(sent["messages"][0]))


def _until(raw: bytes, text: str) -> bytes | None:
    """The bytes up to the end of the first message, whose content is `text`, as orjson and most clients write it."""
    spelled = orjson.dumps(text)
    at = raw.find(spelled)
    end = raw.find(b"}", at + len(spelled)) + 1
    return raw[:end] if at >= 0 and end > 0 else None


def _is(message: Any, first: Prompt) -> bool:
    return isinstance(message, dict) and (message.get("role"), message.get("content")) == (first.role, first.text)


def _parsed(beginning: bytes | None) -> dict[str, Any] | None:
    """A body of nothing but its beginning; None where what follows that would not be the second message."""
    try:
        body = None if beginning is None else orjson.loads(beginning + b",null]}")
    except orjson.JSONDecodeError:
        return None
    messages = body.get("messages") if isinstance(body, dict) else None
    if not (isinstance(messages, list) and len(messages) == 2 and messages[1] is None):
        return None
    del messages[1]
    return body
