"""Which episode a call belongs to, without asking the agent to say so.

First hit wins: URL, `x-ratchet-episode`, `traceparent`, `metadata.episode_id`, `previous_response_id` or
`conversation`, a message prefix that an earlier call left behind, else a new episode.
"""

import os
import re
import time
from collections.abc import Iterator
from hashlib import sha256
from typing import Any, NamedTuple

from proxy import table as tables
from proxy.dialects.base import Json, Reading, Summary
from proxy.errors import BadRequest
from proxy.metrics import CONTINUATIONS
from proxy.table import Table

_EPISODE = re.compile(r"[A-Za-z0-9._:~-]{1,128}")
_OWN = re.compile(r"ep-[0-9a-f]{28}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")
_NAMING = frozenset(("metadata", "previous_response_id", "conversation"))  # what of a body may name an episode
_PREFIXES = 16  # how many ends of earlier replies are looked up, the latest first
_CHAINED, _AMBIGUOUS = CONTINUATIONS.labels("chained"), CONTINUATIONS.labels("ambiguous")


class Identity(NamedTuple):
    """The episode, how it was found, and the key of the prefix that this call used up (None: it used none)."""

    episode_id: str
    source: str
    taken: bytes | None = None
    ambiguous: bool = False


class Trace(NamedTuple):
    """What `traceparent` says: both None where there is none."""

    trace_id: str | None = None
    parent_id: str | None = None


NO_TRACE = Trace()


def read_traceparent(value: str | None) -> Trace:
    """The trace of a W3C `traceparent`; an invalid one, or one of zeros, counts as absent."""
    if not value:
        return NO_TRACE
    found = _TRACEPARENT.fullmatch(value.strip())
    if found is None or value.startswith("ff") or not found[1].strip("0") or not found[2].strip("0"):
        return NO_TRACE
    return Trace(found[1], found[2])


def trace_of(episode_id: str) -> str:
    """The trace id of an episode whose calls bring none: 32 hex digits, for ids made here those of the episode."""
    if _OWN.fullmatch(episode_id):
        return episode_id[3:] + "0000"
    return sha256(b"trace:" + episode_id.encode()).hexdigest()[:32]


def _random() -> Iterator[str]:
    """16 hex digits at a time, from the system's source, which is asked for many at once."""
    while True:
        block = os.urandom(2048).hex()
        for at in range(0, len(block), 16):
            yield block[at : at + 16]


fresh = _random().__next__


def new_episode() -> str:
    """Sorts by time: 12 hex digits of milliseconds, then 16 at random."""
    return f"ep-{time.time_ns() // 1_000_000:012x}{fresh()}"


def explicit(value: Any, where: str) -> str:
    """An episode id that the caller chose. Raises BadRequest that names it."""
    if not isinstance(value, str) or not _EPISODE.fullmatch(value):
        shown = repr(value) if isinstance(value, str) and len(value) <= 200 else "this"
        raise BadRequest(
            f"{where}: {shown} can't be an episode id; use 1 to 128 letters, digits or any of . _ : ~ -",
            param=where,
            code="invalid_episode_id",
        )
    return value


def provisional(url: str | None, header: str | None, trace: Trace) -> Identity:
    """The episode of a call whose body isn't known; a new one where the id given can't be one."""
    for given, source in ((url, "url"), (header, "header"), (trace.trace_id, "traceparent")):
        if given is not None and _EPISODE.fullmatch(given):
            return Identity(given, source)
    return Identity(new_episode(), "new")


def identify(
    url: str | None, header: str | None, trace: Trace, body: Json, reading: Reading, table: Table, tenant: str
) -> Identity:
    """The episode of a call. `tenant` keeps the conversations of different keys apart. Raises BadRequest."""
    if url is header is trace.trace_id is None and _NAMING.isdisjoint(body):  # as most are
        return chained(reading, table, tenant)
    if url is not None:
        return Identity(explicit(url, "episode_id"), "url")
    if header is not None:
        return Identity(explicit(header, "x-ratchet-episode"), "header")
    if trace.trace_id is not None:
        return Identity(trace.trace_id, "traceparent")
    metadata = body.get("metadata")
    if isinstance(metadata, dict) and metadata.get("episode_id") is not None:
        return Identity(explicit(metadata["episode_id"], "metadata.episode_id"), "metadata")
    return _referred(body, table, tenant) or chained(reading, table, tenant)


def _referred(body: Json, table: Table, tenant: str) -> Identity | None:
    """By the id of an earlier response, or of a conversation, which belongs to whoever names it first."""
    previous = body.get("previous_response_id")
    if isinstance(previous, str):
        held = table.get(tables.key("response", tenant, previous))
        if held is not None:
            return Identity(held.decode(), "response")
    conversation = body.get("conversation")
    if isinstance(conversation, dict):
        conversation = conversation.get("id")
    if isinstance(conversation, str) and conversation:
        held = table.put_if_absent(tables.key("conversation", tenant, conversation), new_episode().encode())
        return Identity(held.decode(), "response")
    return None


def chained(reading: Reading, table: Table, tenant: str) -> Identity:
    """By the longest prefix that ends in a reply and that a call has left behind. Each can be continued once; a second
    call that continues it, or one that fits several episodes, is ambiguous."""
    for key in prefixes(reading, tenant):
        taken = table.take(key)
        if not taken.found:
            continue
        ambiguous = taken.found > 1 or taken.value is None
        (_AMBIGUOUS if ambiguous else _CHAINED).inc()
        if taken.value is None:
            return Identity(new_episode(), "new", ambiguous=True)
        return Identity(taken.value.decode(), "chain", key, ambiguous)
    return Identity(new_episode(), "new")


def prefixes(reading: Reading, tenant: str) -> list[bytes]:
    """The keys of the prefixes of a conversation that end where a reply ended, longest first."""
    digest = sha256(tenant.encode())
    keys: list[bytes] = []
    ended = False  # whether what came last was a reply
    for reply, canonical in reading.turns:
        if ended and not reply:
            keys.append(digest.digest()[: tables.KEY])
        digest.update(canonical)
        ended = reply
    if ended:
        keys.append(digest.digest()[: tables.KEY])
    reading.digest = digest
    return keys[: -_PREFIXES - 1 : -1] if keys else keys


def remember(
    table: Table, tenant: str, identity: Identity, reading: Reading, summary: Summary, responses: bool
) -> None:
    """After an answer: leaves the prefixes by which a next call is found, one for each choice."""
    episode = identity.episode_id.encode()
    if responses and summary.response_id is not None:
        table.put_if_absent(tables.key("response", tenant, summary.response_id), episode)
    if not reading.turns:
        return
    if reading.digest is None:
        prefixes(reading, tenant)
    for reply in summary.replies:
        if reply:
            digest = reading.digest.copy()
            for canonical in reply:
                digest.update(canonical)
            table.add(digest.digest()[: tables.KEY], episode)


def give_back(table: Table, identity: Identity) -> None:
    """After a failure: the prefix that this call used up can be continued again, by the retry."""
    if identity.taken is not None:
        table.give_back(identity.taken, identity.episode_id.encode())
