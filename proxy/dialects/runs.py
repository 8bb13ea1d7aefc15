"""The long middle of a stream of chunks, where each tells one more piece of text and is the same otherwise.

One such chunk is parsed and found to tell nothing else; those after it that have its bytes before and after the text
mean the same but for that text. So they are cut at those bytes, and the texts parsed all at once.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import orjson

from proxy.dialects.base import Json

_DATA = b"data: "
_END = b"\n\n"
_CONTENT = re.compile(rb'"content"\s*:\s*("(?:[^"\\]|\\.)*")')
_OTHER = "\0another text"
_SPELLED = orjson.dumps(_OTHER)


class Run(NamedTuple):
    """A stream in three parts: its first two events, the texts of the chunks like the second of them, and the rest.
    `other`: the second with another text in the place where they differ."""

    before: bytes
    texts: list[str]
    after: bytes
    other: bytes


def find(stream: bytes) -> Run | None:
    """The run that begins behind the stream's second event; None where there is none. It is for the caller to see by
    `alike` that what differs is the text."""
    first = stream.find(_END) + len(_END)
    second = stream.find(_END, first)
    sample = stream[first:second]
    at = _CONTENT.search(sample) if first >= len(_END) and second > 0 and sample.startswith(_DATA) else None
    if at is None:
        return None
    head, tail = sample[: at.start(1)], sample[at.end(1) :] + _END
    start = second + len(_END)
    if not stream.startswith(head, start):
        return None
    pieces = stream[start + len(head) :].split(tail + head)
    last, found, rest = pieces[-1].partition(tail)
    if not found:
        return None
    texts = _strings([*pieces[:-1], last])
    other = b"%b%b%b" % (head[len(_DATA) :], _SPELLED, tail)
    return None if texts is None else Run(stream[:start], texts, rest, other)


def alike(run: Run, second: Json, with_text: Callable[[Json, str], Json]) -> bool:
    """Whether another text in the place where the run's chunks differ makes of its `second` what `with_text` does: then
    that is where a chunk's text stands, and nothing else."""
    try:
        return bool(orjson.loads(run.other) == with_text(second, _OTHER))
    except (ValueError, LookupError, TypeError):
        return False


def _strings(pieces: list[bytes]) -> list[str] | None:
    """The JSON strings; None where one of the pieces isn't exactly one."""
    try:
        found: list[Any] = orjson.loads(b"[%b]" % b",".join(pieces))
    except orjson.JSONDecodeError:
        return None
    return found if len(found) == len(pieces) and set(map(type, found)) == {str} else None
