"""How deep a JSON body may be nested."""

import re
from typing import Any

from proxy.errors import BadRequest

MAX_DEPTH = 64
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|([\[{])|[\]}]')


def check(raw: bytes, parsed: Any) -> None:
    """Raises BadRequest for JSON nested deeper than 64 levels, which no API needs and every parser pays for."""
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return
    # What isn't parsed is no JSON at all, or too deep for the parser.
    deep = _deep(parsed) if parsed is not None else raw.lstrip()[:1] in (b"{", b"[") and _deep_text(raw)
    if deep:
        raise BadRequest(f"the body is nested deeper than {MAX_DEPTH} levels", param="body", code="json_too_deep")


def _deep(value: Any) -> bool:
    """Level by level, so that depth costs no recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for one in level
            for child in (one.values() if isinstance(one, dict) else one)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _deep_text(raw: bytes) -> bool:
    depth = 0
    for token in _TOKENS.finditer(raw):
        if token[1]:
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif token[0] in (b"]", b"}"):
            depth -= 1
    return False
