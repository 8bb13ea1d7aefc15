"""Server-sent events, as bytes: cut a stream into whole events, read an event.

Lines end in LF, CR LF or CR (WHATWG HTML, "Event stream interpretation"); an empty line ends an event. Everything works
on bytes, so a UTF-8 sequence split between two reads is never decoded in halves.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson

# Two line ends in a row. A CR is a line end of its own only where no LF follows; after a line that ended in LF, an LF
# is to be expected, so a CR at the very end of what has arrived is not believed yet.
_BLANK = re.compile(rb"(?:\r\n|\n)(?:\r\n|\n|\r(?=[^\n]))|\r(?!\n)(?:\r\n|\n|\r)")
_BOM = b"\xef\xbb\xbf"
_DATA = b"data: "
_DONE = b"data: [DONE]\n\n"
MAX_EVENT = 32 << 20


class Event(NamedTuple):
    """One event: its `event:` name (empty when there is none) and its data lines joined by LF."""

    name: bytes
    data: bytes


class Splitter:
    """Cuts chunks as they come from the network into runs of whole events. No byte is lost, added or moved."""

    def __init__(self) -> None:
        self.rest = b""  # the beginning of an event that isn't whole yet

    def feed(self, chunk: bytes) -> bytes:
        """All whole events there are now, as one run of raw bytes; the rest waits. One over 32 MB is let through."""
        if not self.rest and chunk.endswith(b"\n\n"):
            return chunk
        text = self.rest + chunk
        end = _last_end(text, max(0, len(self.rest) - 3))
        if not end and len(text) > MAX_EVENT:
            end = len(text)
        self.rest = text[end:]
        return text[:end]


def _last_end(text: bytes, start: int) -> int:
    """Where the last whole event ends; nothing before `start` can end one."""
    if b"\r" not in text:
        at = text.rfind(b"\n\n", start)
        return at + 2 if at >= 0 else 0
    end = 0
    for found in _BLANK.finditer(text, start):
        end = found.end()
    return end


def blocks(run: bytes) -> Iterator[bytes]:
    """The raw bytes of each event in turn, with the empty line that ends it; joined they are `run`."""
    at = 0
    for found in _BLANK.finditer(run):
        yield run[at : found.end()]
        at = found.end()
    if at < len(run):
        yield run[at:]


def read(block: bytes) -> Event | None:
    """The event in a block; None where it holds only comments or nothing."""
    name, data = b"", []
    for line in block.removeprefix(_BOM).splitlines():
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ")
    return Event(name, b"\n".join(data)) if data else None


def events(stream: bytes) -> Iterator[Event]:
    """The events of a whole recorded stream; an unfinished last one counts too, since a broken stream still tells."""
    for block in blocks(stream):
        event = read(block)
        if event is not None:
            yield event


def values(stream: bytes) -> list[dict[str, Any]] | None:
    """The JSON objects of a plain stream by one parse, a closing `[DONE]` left out. None for any other stream, which
    `events` then reads: with names, comments or CRs, with data of several lines or that are no JSON objects, or cut."""
    rest = stream.removesuffix(_DONE)
    if not rest.startswith(_DATA) or not rest.endswith(b"\n\n") or b"\r" in rest:
        return None
    parts = rest[len(_DATA) : -2].split(b"\n\n" + _DATA)
    if rest.count(b"\n") != 2 * len(parts):
        return None
    try:
        found = orjson.loads(b"[%b]" % b",".join(parts))
    except orjson.JSONDecodeError:
        return None
    return found if len(found) == len(parts) and set(map(type, found)) <= {dict} else None
