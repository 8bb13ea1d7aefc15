"""Changing one value of a JSON body and nothing else: pure functions on its bytes.

A body is never dumped again when it can be spliced, because a dump changes what it doesn't mean to: large integers,
`1e2`, white space. A splice is believed only after the result was parsed and compared.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import orjson

from proxy.dialects.base import Json, Path

_TRIES = 8
_SPELLINGS: tuple[Callable[[str], bytes], ...] = (
    orjson.dumps,
    lambda text: json.dumps(text).encode(),
    lambda text: json.dumps(text, ensure_ascii=False).encode(),
)
_USAGE = re.compile(rb'("include_usage"\s*:\s*)(?:false|null)')
_OPTIONS = re.compile(rb'("stream_options"\s*:\s*)(\{|null)')


def replace(raw: bytes, body: Json, path: Path, text: str) -> bytes:
    """`raw` with the string at `path` replaced by `text`; `body` is `raw` parsed, and is changed to match.

    Raises KeyError, IndexError or TypeError if `path` leads to no string.
    """
    holder: Any = body
    for step in path[:-1]:
        holder = holder[step]
    old = holder[path[-1]]
    if not isinstance(old, str):
        raise TypeError("not a string")
    if old == text:
        return raw
    holder[path[-1]] = text
    return _spliced(raw, body, old, text) or orjson.dumps(body)


def _spliced(raw: bytes, wanted: Json, old: str, new: str) -> bytes | None:
    """The old text may stand at several places, or be escaped in another way than ours: try, parse and compare."""
    after = orjson.dumps(new)
    for spell in _SPELLINGS:
        before = spell(old)
        at = raw.find(before)
        for _ in range(_TRIES):
            if at < 0:
                break
            changed = raw[:at] + after + raw[at + len(before) :]
            if _means(changed, wanted):
                return changed
            at = raw.find(before, at + 1)
    return None


def _means(raw: bytes, wanted: Json) -> bool:
    try:
        return bool(orjson.loads(raw) == wanted)
    except orjson.JSONDecodeError:
        return False


def ask_for_usage(raw: bytes, body: Json) -> bytes | None:
    """`raw` with `stream_options.include_usage` true, and `body` changed to match; None if it is asked for already, or
    can't be added without touching anything else."""
    options = body.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage") is True:
        return None
    wanted = {**body, "stream_options": {**(options if isinstance(options, dict) else {}), "include_usage": True}}
    for changed in _with_usage(raw, options):
        if _means(changed, wanted):
            body["stream_options"] = wanted["stream_options"]
            return changed
    return None


def _with_usage(raw: bytes, options: Any) -> list[bytes]:
    if options is None and b'"stream_options"' not in raw:
        at = raw.find(b"{") + 1
        return [raw[:at] + b'"stream_options":{"include_usage":true},' + raw[at:]]
    if isinstance(options, dict) and "include_usage" in options:
        return [raw[: at.start()] + at[1] + b"true" + raw[at.end() :] for at in _USAGE.finditer(raw)]
    return [raw[: at.start()] + _opened(at, bool(options)) + raw[at.end() :] for at in _OPTIONS.finditer(raw)]


def _opened(at: "re.Match[bytes]", more: bool) -> bytes:
    if at[2] == b"null":
        return at[1] + b'{"include_usage":true}'
    return at[1] + b'{"include_usage":true' + (b"," if more else b"")
