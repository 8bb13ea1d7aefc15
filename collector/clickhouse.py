"""A store whose spans and rewards lie in ClickHouse: the same calls and the same views as `store.py`.

The DuckDB file beside it keeps what is small and is needed while ClickHouse is away: versions, deployments, keys, jobs,
evaluations, and the names of loaded segments. A segment goes to ClickHouse first. Its inserts carry tokens made of its
name, which the tables remember, and its name is written there last; so however a load is cut off, and even where an
insert of a killed collector is still under way, loading it again adds each row once.
"""

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent import futures
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from collector import clickhouse_sql as statements
from collector import journal as lines_of
from collector import lookup, paging, registry, results, rewards
from collector.clickhouse_http import Failed, Server, chunks
from collector.clickhouse_sql import REPEATED, TABLES, TRIALS
from collector.errors import BadRows, RatchetError, Unavailable
from collector.inserts import Segment
from collector.loader import sift
from collector.model import CALLS
from collector.readonly_clickhouse import one_select
from collector.settings import Storage
from collector.store import Store

SCHEMA = (Path(__file__).parent / "schema-clickhouse.sql").read_text()
SCHEMA_HASH = hashlib.sha256(SCHEMA.encode()).hexdigest()
BULK = frozenset(("span", "otlp", "reward"))  # what the local file has not
_NO_DATABASE, _NO_TABLE = 81, 60
_CRC_BYTES = len(b',"crc":"00000000"}')
_KIND_AT = len(b'{"event":"')
_IDS = 400  # in one statement
_NEW_IDS = 1000  # which are asked for once, and mostly our own and short
_SPANS_OF_A_PAGE = 16  # of an episode, at the first look
_NEAR_NS = 3_600_000_000_000
_LATEST_NS = (1 << 63) - 1
COUNTING_SECONDS = 0.5  # for which whoever asks for counts waits for new ones
_COUNTS_SECONDS = 10.0
_FEW_SPANS = 20_000
_MAX_RESULT_BYTES = 1 << 30

log = logging.getLogger(__name__)

Found = list[dict[str, Any]]


class ClickHouse(Store):
    """The store of `store.url`. While ClickHouse is away, loads and reads of spans raise Unavailable, no others do."""

    engine = "-clickhouse"

    def __init__(self, path: Path, journal: Path, settings: Storage, weights: Mapping[str, float]) -> None:
        if settings.url is None:
            raise ValueError("store.url is not set")
        super().__init__(path, journal, settings, weights)
        self._server = Server(settings.url.get_secret_value(), settings.query_timeout + 30)
        self._preparing = threading.Lock()
        self._prepared = False
        self._observed = False  # whether agents' own spans are there, which have to be settled
        self._counter = futures.ThreadPoolExecutor(1, "clickhouse-counts")
        self._counting: futures.Future[None] = futures.Future()
        self._counting.set_result(None)
        self._counting_lock = threading.Lock()
        self._counted: dict[str, Any] = {**dict.fromkeys(_COUNTED), "clickhouse": "counting"}
        self._counted_until = 0.0
        try:
            self._prepare_remote()
        except (Unavailable, Failed) as error:  # a password that was changed keeps calls from nothing
            log.error("%s; it is tried again, the journal keeps what comes", error.message)

    def close(self) -> None:
        """Close both."""
        self._counter.shutdown(wait=False, cancel_futures=True)
        super().close()
        self._server.close()

    def _prepare_remote(self) -> Server:
        """The server, once the database has its tables and views. Raises Unavailable, Failed."""
        with self._preparing:
            if not self._prepared:
                if self._schema() != SCHEMA_HASH:
                    for statement in split(SCHEMA):
                        self._server.run(statement)
                    self._note("schema", SCHEMA_HASH)
                self._put_weights()
                if self._server.rows(statements.ANY_OBSERVED)[0]["any"]:
                    self._observe()
                self._prepared = True
        return self._server

    def _observe(self) -> None:
        """From now on there are agents' own spans, which have to be settled."""
        self._server.run(statements.WITH_OBSERVED)
        self._observed = True

    def _schema(self) -> str | None:
        try:
            return str(self._server.rows(statements.SCHEMA_OF)[0]["value"])
        except Failed as error:
            if error.number == _NO_DATABASE:
                self._server.run(statements.CREATE_DATABASE, {"name": self._server.address.database}, database=False)
            elif error.number != _NO_TABLE:
                raise
            return None

    def _note(self, key: str, value: str) -> None:
        row = {"key": key, "value": value, "ts_ns": time.time_ns()}
        self._server.insert(statements.SET_SCHEMA, orjson.dumps(row), None)

    def _put_weights(self) -> None:
        known = {row["name"]: row["weight"] for row in self._server.rows(statements.WEIGHTS)}
        if known != self._weights and self._weights:
            revision = time.time_ns()
            rows = [{"name": name, "weight": one, "revision": revision} for name, one in self._weights.items()]
            self._server.insert(statements.SET_WEIGHTS, b"\n".join(map(orjson.dumps, rows)), None)

    def _ask(self, statement: str, where: Mapping[str, Any] | None = None) -> Found:
        return self._prepare_remote().rows(statement, where)

    # Loading

    def load(self, segments: Sequence[Segment]) -> None:
        """Insert the rows of sealed segments there, note their names there, then here.

        Raises Unavailable, and BadRows or one of DATA_ERRORS where a line does not fit.
        """
        server = self._prepare_remote()
        names = [segment.name for segment in segments]
        known = self.noted(names)
        new = [segment for segment in segments if segment.name not in known]
        if not self._observed and any("otlp" in segment.events for segment in new):
            self._observe()
        for segment in new:
            self._insert(server, segment)
        if new:
            self._settle(server, new)
            notes = [_note_of(segment) for segment in new]
            server.insert(statements.NOTE, b"\n".join(notes), _token("note", *(segment.name for segment in new)))
        super().load([replace(segment, events=segment.events - BULK) for segment in segments])

    def _insert(self, server: Server, segment: Segment) -> None:
        for event, lines in split_lines(segment).items():
            rows = self._new(server, event, lines) if event in REPEATED else lines
            if rows:
                end = b',"segment":%b,"day":%d}' % (orjson.dumps(segment.name), segment.day)
                body = b"\n".join(line[:-_CRC_BYTES] + end for line in rows)
                server.insert(statements.INSERTS[event], body, _token(event, segment.name))

    def _new(self, server: Server, event: str, lines: Sequence[bytes]) -> list[bytes]:
        """The lines whose ids are not there yet, each id once, the earliest of it."""
        name, statement = REPEATED[event]
        at = "start_ns" if event == "otlp" else "ts_ns"
        parsed = sorted(((orjson.loads(line), line) for line in lines), key=lambda one: (one[0].get(at) or 0, one[1]))
        first: dict[str, bytes] = {}
        for row, line in parsed:
            first.setdefault(str(row[name]), line)
        for ids in chunks(first, _NEW_IDS):
            for row in server.rows(statement, {"ids": ids}):
                del first[row["id"]]
        return list(first.values())

    def _settle(self, server: Server, segments: Sequence[Segment]) -> None:
        """Agents' own spans find the calls that they repeat, and their traces an episode."""
        events = frozenset[str]().union(*(segment.events for segment in segments))
        if not self._observed or not events & {"span", "otlp"}:
            return
        names = [segment.name for segment in segments]
        echoes = {"segments": names, "operations": sorted(CALLS), "near": _NEAR_NS}
        if "otlp" in events:
            server.run(statements.ECHOES_AMONG_NEW, echoes)
            server.run(statements.HOMES_OF_NEW, {"segments": names})
        if "span" in events:
            server.run(statements.ECHOES_OF_NEW, echoes)
            server.run(statements.HOMES_AMONG_NEW, {"segments": names})
        server.run(statements.HOMES_BY_ECHO, {"segments": names})

    def fits(self, segment: Segment) -> bool:
        """Whether every line fits, there and here. Nothing is stored."""
        server = self._prepare_remote()
        try:
            for event, lines in split_lines(segment).items():
                body = b"\n".join(line[:-_CRC_BYTES] + b',"segment":"","day":0}' for line in lines)
                server.insert(TRIALS[event], body, None)
        except BadRows:
            return False
        return super().fits(replace(segment, events=segment.events - BULK))

    # Days

    def old_days(self, before: int) -> list[tuple[int, int, int]]:
        """`(day, spans, rewards)` of the days before one that ClickHouse holds, ascending. Raises Unavailable."""
        rows = self._ask(statements.DAYS, {"before": before})
        return [(row["day"], row["spans"], row["rewards"]) for row in rows]

    def drop_day(self, day: int) -> None:
        """Delete the spans and rewards of a day. Raises Unavailable."""
        server = self._prepare_remote()
        for statement in statements.DROP:
            server.run(statement, {"day": day})

    def noted(self, names: Sequence[str]) -> set[str]:
        """Which of these segments ClickHouse holds. Raises Unavailable."""
        found: set[str] = set()
        for some in chunks(names, _IDS):
            found |= {row["name"] for row in self._ask(statements.KNOWN_SEGMENTS, {"ids": some})}
        return found

    # Reading

    def registry_events(self) -> list[tuple[str, dict[str, Any]]]:
        """Also those that wait in the journal while ClickHouse is away: they were acknowledged."""
        found, loaded = super().registry_events(), self.loaded()
        for path in sorted(self._journal.glob(f"*-collector-*{lines_of.SEALED}")):
            if path.stem not in loaded:
                with contextlib.suppress(OSError):  # the loader tells what it cannot read
                    lines = sift(path.read_bytes())[0]
                    found += [
                        (_event(line), lines_of.decode(line)) for line in lines if _event(line) in registry.EVENTS
                    ]
        return found

    def episodes(self, **where: Any) -> Found:
        """Rows of `episodes_v`, newest first."""
        given = {**where, **_before(where)}
        if any(where[name] is not None for name in ("slot", "version", "min_reward", "max_reward")):
            return self._ask(statements.EPISODES_WHERE, given)
        given = {name: given[name] for name in ("before_ns", "before_id", "status", "limit")}
        count = given["limit"] * _SPANS_OF_A_PAGE
        while True:
            (window,) = self._ask(statements.NEWEST, {"before_ns": given["before_ns"], "count": count})
            if not window["found"]:
                return []
            found = self._ask(statements.EPISODES, {**given, "since": window["since"]})
            if len(found) >= given["limit"] or window["found"] < count:
                return self._with_rewards(found)
            count *= 8

    def _with_rewards(self, found: Found) -> Found:
        if not found:
            return found
        given: dict[str, Found] = {row["episode_id"]: [] for row in found}
        since, until = min(row["start_ns"] for row in found), max(row["end_ns"] for row in found)
        for reward in self._judged(list(given), since, until):
            given[reward["episode_id"]].append(reward)
        return [{**row, "reward": rewards.combine(given[row["episode_id"]], self._weights)} for row in found]

    def _judged(self, ids: Sequence[str], since: int, until: int) -> Found:
        """The rewards of some episodes as `rewards_v` has them; their spans began from `since` to `until`."""
        found = [row for some in chunks(ids, _IDS) for row in self._judged_some(some, since, until)]
        return sorted(found, key=lambda row: (row["ts_ns"], row["reward_id"]))

    def _judged_some(self, ids: Sequence[str], since: int, until: int) -> Found:
        where = {"ids": list(ids), "since": since, "until": until}
        aimed = {row["reward_id"]: row for row in self._ask(statements.AIMED, where)}
        if self._observed:
            aimed |= {row["reward_id"]: row for row in self._ask(statements.AIMED_AT_ECHOES, where)}
        places: dict[str, dict[str, tuple[str, str | None]]] = {"episode": {one: (one, None) for one in ids}}
        kinds = {row["target_kind"] for row in aimed.values()}
        if "span" in kinds:
            own = self._ask(statements.OWN, where)
            own += self._ask(statements.OWN_ECHOES, where) if self._observed else []
            places["span"] = {row["span_id"]: (row["episode_id"], row["at"]) for row in own}
        for kind in kinds & statements.LATEST.keys():
            targets = {row["target_id"] for row in aimed.values() if row["target_kind"] == kind}
            places[kind] = self._latest(statements.LATEST[kind], targets, since)
        placed: Found = []
        for row in aimed.values():
            episode, span = places[row["target_kind"]].get(row["target_id"], (None, None))
            if episode in places["episode"]:
                placed.append({**row, "episode_id": episode, "span_id": span})
        return placed

    def _latest(self, statement: str, targets: Iterable[str], since: int) -> dict[str, tuple[str, str | None]]:
        found: dict[str, tuple[str, str | None]] = {}
        for some in chunks(targets, _IDS):
            rows = self._ask(statement, {"ids": some, "since": since})
            found |= {row["target"]: (row["episode"], row["at"]) for row in rows}
        return found

    def spans(self, **where: Any) -> Found:
        """Rows of `spans`, newest first."""
        return self._ask(statements.SPANS, {**where, **_before(where)})

    def episode(self, episode_id: str) -> tuple[Found, Found]:
        """`(spans with payloads, resolved rewards)` of one episode."""
        (extent,) = self._ask(statements.EXTENT, {"ids": [episode_id]})
        between = {"since": extent["since"], "until": extent["until"]}
        spans = self._ask(statements.EPISODE_SPANS, {"episode_id": episode_id, **between}) if extent["found"] else []
        return spans, self._judged([episode_id], **between)

    def echoes(self, episode_id: str) -> Found:
        """The agents' own spans that repeat calls of one episode."""
        return self._ask(statements.EPISODE_ECHOES, {"episode_id": episode_id})

    def whole(self, ids: Sequence[str]) -> tuple[lookup.Found, lookup.Found, lookup.Found]:
        """`(spans, echoes, rewards)` of some episodes, with all their columns."""
        spans: Found = []
        echoes: Found = []
        judged: Found = []
        for some in chunks(ids, _IDS):
            (extent,) = self._ask(statements.EXTENT, {"ids": some})
            where = {"ids": some, "since": extent["since"], "until": extent["until"]}
            spans += self._ask(statements.WHOLE_SPANS, where)
            echoes += self._ask(statements.WHOLE_ECHOES, where) if self._observed else []
            judged += self._judged(some, where["since"], where["until"])
        return spans, echoes, judged

    def known(self, spans: Sequence[str], rewards: Sequence[str]) -> tuple[set[str], set[str]]:
        """Which of these spans and rewards are there."""
        asked = ("spans", spans), ("observed", spans), ("rewards", rewards)
        found: dict[str, set[str]] = {name: set() for name, _ in asked}
        for name, ids in asked:
            for some in chunks(ids, _IDS):
                found[name].update(row["id"] for row in self._ask(statements.KNOWN[name], {"ids": some}))
        return found["spans"] | found["observed"], found["rewards"]

    def placed(self, spans: Sequence[str]) -> dict[str, str]:
        """The episodes of spans."""
        rows = [row for some in chunks(spans, _IDS) for row in self._ask(statements.PLACED, {"ids": some})]
        return {row["span_id"]: row["episode_id"] for row in rows}

    def targets(self, ids: Sequence[str]) -> lookup.Found:
        """Spans by any of their ids."""
        rows = [row for some in chunks(ids, _IDS) for row in self._ask(statements.TARGETS, {"ids": some})]
        return sorted(rows, key=lambda row: (row["start_ns"], row["span_id"]))

    def unmatched_rewards(self, limit: int) -> Found:
        """Rewards whose target was not seen, newest first."""
        return self._ask(statements.UNMATCHED, {"limit": limit})

    def unknown_calls(self, limit: int, characters: int) -> Found:
        """The newest calls whose prompt no slot knew."""
        return self._ask(statements.UNKNOWN, {"limit": limit, "characters": characters})

    def stats(self) -> dict[str, Any]:
        """Counts of rows, by a pass over all of them in a thread: where that takes long, those of the last pass. None
        where there was none, or where ClickHouse does not answer (`clickhouse` says which)."""
        with self._counting_lock:
            few = (self._counted["spans"] or 0) < _FEW_SPANS
            if self._counting.done() and (few or time.monotonic() >= self._counted_until):
                self._counting = self._counter.submit(self._count)
        futures.wait([self._counting], COUNTING_SECONDS)
        return {**super().stats(), **self._counted}

    def _count(self) -> None:
        try:
            self._counted = {**self._ask(statements.COUNTS)[0], "clickhouse": "ok"}
        except RatchetError as error:
            self._counted = {**dict.fromkeys(_COUNTED), "clickhouse": error.message}
        self._counted_until = time.monotonic() + _COUNTS_SECONDS

    def query(self, sql: str, limit: int, page: int | None = None) -> results.Table:
        """The first `limit` rows of one SELECT in ClickHouse's SQL, which may only read, within `store.query_timeout`.

        Raises QueryError with the engine's own words, Unavailable.
        """
        server = self._prepare_remote()
        sql = one_select(server, sql)
        bounds = {
            "limit": limit + 1,
            "max_execution_time": self._settings.query_timeout,
            "max_memory_usage": self._settings.memory_limit_mb << 20,
            "max_result_bytes": _MAX_RESULT_BYTES,
            "join_use_nulls": 1,
        }
        answer = server.query(sql, bounds)
        asked = paging.Open(pa.ipc.open_stream(answer), limit, answer.close, contextlib.nullcontext)
        return self._page(asked, page or limit)


_COUNTED = ("spans", "rewards", "episodes", "unknown_prompts", "unmatched_rewards")


def split(schema: str) -> list[str]:
    """The statements of a schema, without its comments."""
    lines = [line for line in schema.splitlines() if not line.startswith("--")]
    return [text.strip() for text in "\n".join(lines).split(";\n") if text.strip(" ;\n")]


def split_lines(segment: Segment) -> dict[str, list[bytes]]:
    """The lines of a checked segment by their event, those that have a table."""
    lines = sorted((line for line in segment.path.read_bytes().split(b"\n") if line.strip()), key=_event)
    return {event: list(group) for event, group in groupby(lines, key=_event) if event in TABLES}


def _event(line: bytes) -> str:
    return line[_KIND_AT : line.index(b'"', _KIND_AT)].decode()


def _token(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _note_of(segment: Segment) -> bytes:
    return orjson.dumps(
        {
            "name": segment.name,
            "lines": segment.lines,
            "quarantined": segment.quarantined,
            "bytes": segment.bytes,
            "loaded_ns": time.time_ns(),
            "day": segment.day,
        }
    )


def _before(where: Mapping[str, Any]) -> dict[str, Any]:
    at = where["before_ns"]
    return {"before_ns": _LATEST_NS if at is None else at, "before_id": where["before_id"] or ""}
