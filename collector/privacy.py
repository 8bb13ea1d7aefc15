"""How much of a call is kept, per route or slot: all of it, all but what is masked, hashes of it, or nothing.

Secrets (keys, tokens, private keys) are masked in every mode. Phone and card numbers are looked for in the strings of
the payloads only, never in JSON's own numbers, so that what is kept stays JSON.
"""

import re
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import orjson

from collector import redact
from collector.settings import Privacy as Mode
from collector.settings import Redaction

MASK_PHONE = "[phone]"
MASK_CARD = "[card]"
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")
_PHONE = re.compile(r"(?<![\w.+])(?:\+\d|\(\d{2,4}\)[ .-]?\d|\d{2,4}[ .-]\d)(?:[ .()-]{0,2}\d){5,12}(?!\w)")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_TEXTS = ("input_messages", "output_messages")


class Policy:
    """The rules of `store.redaction`, applied to a span's line before it is written."""

    def __init__(self, rules: Redaction) -> None:
        self._rules = rules

    @classmethod
    def of(cls, rules: Redaction) -> "Policy | None":
        """None where the rules ask for nothing beyond the masking of secrets and e-mail addresses."""
        plain = rules.mode == "masked" and not (rules.routes or rules.slots or rules.phones or rules.cards)
        return None if plain else cls(rules)

    def mode(self, route: str, slot: str | None) -> Mode:
        """What holds for a call: the slot's rule, else the route's, else the general one."""
        if slot is not None and slot in self._rules.slots:
            return self._rules.slots[slot]
        return self._rules.routes.get(route, self._rules.mode)

    def apply(self, line: dict[str, Any]) -> None:
        """Changes a span's line in place."""
        mode = self.mode(str(line.get("route")), line.get("prompt_slot"))
        if mode in ("hash", "none"):
            _strip(line, hashed=mode == "hash")
        redact.payloads(line, emails=self._rules.emails and mode == "masked")
        if mode == "masked" and (self._rules.phones or self._rules.cards):
            self._mask_numbers(line)

    def _mask_numbers(self, line: dict[str, Any]) -> None:
        hit = False
        for name in redact.PAYLOADS:
            if line.get(name):
                masked = _walked(line[name], self._masked)
                hit |= masked != line[name]
                line[name] = masked
        if hit:
            for name in redact.SPELLED:
                line.pop(name, None)

    def _masked(self, text: str) -> str:
        if self._rules.cards:
            text = _CARD.sub(lambda found: MASK_CARD if _luhn(found.group()) else found.group(), text)
        if self._rules.phones:
            text = _PHONE.sub(lambda found: found.group() if _DATE.match(found.group()) else MASK_PHONE, text)
        return text


def _strip(line: dict[str, Any], *, hashed: bool) -> None:
    """Leave no content: the messages' roles and the hashes of their contents, or nothing."""
    for name in _TEXTS:
        if hashed and line.get(name):
            line[name] = _hashes(line[name])
        else:
            line.pop(name, None)
    for name in ("tools", "attributes", *redact.SPELLED):
        line.pop(name, None)


def _hashes(text: str) -> str:
    try:
        messages = orjson.loads(text)
    except orjson.JSONDecodeError:
        messages = text
    items = messages if isinstance(messages, list) else [messages]
    kept = [{"role": item.get("role") if isinstance(item, dict) else None, "content": _hash(item)} for item in items]
    return orjson.dumps(kept).decode()


def _hash(item: Any) -> str:
    content = item.get("content") if isinstance(item, dict) and set(item) <= {"role", "content"} else item
    raw = content.encode() if isinstance(content, str) else orjson.dumps(content, option=orjson.OPT_SORT_KEYS)
    return f"sha256:{sha256(raw).hexdigest()}"


def _walked(text: str, change: Callable[[str], str]) -> str:
    """JSON text with every string changed; text that is no JSON is changed as it is."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return change(text)
    return orjson.dumps(_each(value, change)).decode()


def _each(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_each(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _each(item, change) for key, item in value.items()}
    return value


def _luhn(text: str) -> bool:
    """The check digit of card numbers (ISO/IEC 7812-1, annex B)."""
    digits = [int(one) for one in text if one.isdigit()][::-1]
    doubled = (2 * one - 9 * (one > 4) for one in digits[1::2])
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1
