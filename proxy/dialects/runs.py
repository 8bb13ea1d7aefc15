"""The long middle of a stream of chunks, where each tells one more piece of text and is the same otherwise.

One such chunk is parsed and found to tell nothing else; those after it that have its bytes before and after the text
mean the same but for that text. So they are cut at those bytes, and the texts parsed all at once.
"""

import re
from typing import Any, NamedTuple

import orjson

_DATA = b"data: "
_END = b"\n\n"
_CONTENT = re.compile(rb'"content"\s*:\s*("(?:[^"\\]|\\.)*")')
_OTHER = "\0another text"


class Run(NamedTuple):
    """A stream in three parts: its first two events, the texts of the chunks like the second of them, and the rest."""

    before: bytes
    texts: list[str]
    after: bytes


def find(stream: bytes) -> Run | None:
    """The run that begins behind the stream's second event; None where there is none. It is for the caller to see that
    the second event tells one piece of text and nothing else."""
    first = stream.find(_END) + len(_END)
    second = stream.find(_END, first)
    sample = stream[first:second]
    at = _CONTENT.search(sample) if first >= len(_END) and second > 0 and sample.startswith(_DATA) else None
    if at is None:
        return None
    head, tail = sample[: at.start(1)], sample[at.end(1) :] + _END
    start = second + len(_END)
    if not stream.startswith(head, start) or not _alike(head, at[1], tail):
        return None
    pieces = stream[start + len(head) :].split(tail + head)
    last, found, rest = pieces[-1].partition(tail)
    if not found:
        return None
    texts = _strings([*pieces[:-1], last])
    return None if texts is None else Run(stream[:start], texts, rest)


def _alike(head: bytes, text: bytes, tail: bytes) -> bool:
    """Whether another text between `head` and `tail` changes the text of the first choice's delta, and nothing else."""
    try:
        whole = orjson.loads(head[len(_DATA) :] + text + tail)
        other = orjson.loads(head[len(_DATA) :] + orjson.dumps(_OTHER) + tail)
        delta = whole["choices"][0]["delta"]
        delta["content"] = _OTHER
    except (ValueError, LookupError, TypeError):
        return False
    return bool(whole == other)


def _strings(pieces: list[bytes]) -> list[str] | None:
    """The JSON strings; None where one of the pieces isn't exactly one."""
    try:
        found: list[Any] = orjson.loads(b"[%b]" % b",".join(pieces))
    except orjson.JSONDecodeError:
        return None
    return found if len(found) == len(pieces) and set(map(type, found)) == {str} else None
