"""A prompt that a call asks for by name: `prompt_id` and `prompt_variables` in its body.

The two members never go upstream. In their place the slot's version, rendered with the variables, becomes the call's
prompt: the system message (or what the slot's role says), `instructions`, `system`, or the whole `prompt`; where the
call brings one of its own, that is replaced.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from collector import template
from proxy import inject, members
from proxy.dialects.base import Json
from proxy.errors import BadRequest
from proxy.versions import Slot

NAMES = ("prompt_id", "prompt_variables")
OPERATIONS = frozenset(("chat", "responses", "text_completion", "messages"))
_MEMBER = {"responses": "instructions", "messages": "system", "text_completion": "prompt"}


class Asked(NamedTuple):
    """A slot by name, and the values of its variables."""

    slot: str
    values: dict[str, str]


def read(body: Json) -> Asked:
    """What the body asks for. Raises BadRequest that names what is wrong with it."""
    slot, given = body.get("prompt_id"), body.get("prompt_variables")
    if not isinstance(slot, str) or not slot:
        raise BadRequest("prompt_id: must be the name of a slot", param="prompt_id")
    if given is not None and not isinstance(given, dict):
        raise BadRequest("prompt_variables: must be an object of names and values", param="prompt_variables")
    return Asked(slot, {name: _text(name, value) for name, value in (given or {}).items()})


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise BadRequest(f"prompt_variables.{name}: must be a string or a number", param=f"prompt_variables.{name}")


def check(asked: Asked, slot: Slot, text: str) -> None:
    """Raises BadRequest that names the variables which `text` needs and which are missing, or which no version of the
    slot has."""
    missing = [name for name in template.variables(text) if name not in asked.values]
    if missing:
        raise _wrong(asked.slot, "needs", missing)
    known = {name for version in slot.texts.values() for name in template.variables(version)}
    unknown = [name for name in asked.values if name not in known and name not in template.variables(text)]
    if unknown:
        raise _wrong(asked.slot, "has no variable", unknown)


def _wrong(slot: str, what: str, names: Iterable[str]) -> BadRequest:
    listed = list(names)
    message = f"prompt_variables: slot `{slot}` {what} {', '.join(f'`{name}`' for name in listed)}"
    return BadRequest(message, param=f"prompt_variables.{listed[0]}", code="invalid_prompt_variables")


def place(raw: bytes, body: Json, operation: str, role: str | None, text: str) -> bytes:
    """`raw` with `text` as the prompt of a call of one of OPERATIONS, and `body` changed to match."""
    if operation in _MEMBER:
        return members.put(raw, body, _MEMBER[operation], text)
    messages = body.get("messages")
    if not isinstance(messages, list):
        return members.put(raw, body, "messages", [{"role": role or "system", "content": text}])
    roles = (role,) if role else ("system", "developer")
    for index, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") in roles and isinstance(message.get("content"), str):
            return inject.replace(raw, body, ("messages", index, "content"), text)
    return members.put_first(raw, body, "messages", {"role": role or "system", "content": text})
