"""What travels between formats: rows of spans and rewards, as the store has them."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, get_args

import orjson

from collector import redact
from collector.errors import BadInput
from collector.model import Reward
from collector.otel_in import Observed
from collector.rewards import SOURCES, TARGETS

SPAN_COLUMNS = tuple(one.name for one in fields(Observed))
ECHO_OF = "echo_of"  # on an agent's own span of a recorded call: that call. Settled anew where it is imported
REWARD_COLUMNS = tuple(one.name for one in fields(Reward))
PAYLOADS = ("input_messages", "output_messages", "tools", "token_ids", "logprobs", "attributes")
_REQUIRED = ("span_id", "trace_id", "episode_id", "start_ns", "end_ns", "operation", "status")
_STATUSES = ("ok", "error", "cancelled")
_HEX = {size: re.compile(f"[0-9a-f]{{{size}}}") for size in (16, 32)}
_KINDS: Mapping[type, tuple[type, ...]] = {str: (str,), int: (int,), float: (float, int), bool: (bool,)}


def kinds(row: type) -> dict[str, type]:
    """{column: str, int, float or bool} of a row's dataclass."""
    found = {}
    for one in fields(row):
        first = (get_args(one.type) or (one.type,))[0]
        found[one.name] = first if isinstance(first, type) else str  # of a Literal: its words
    return found


_TYPES = kinds(Observed)


@dataclass
class Bundle:
    """Some episodes' rows: spans as the columns of `spans_v`, rewards as those of `rewards`."""

    spans: list[dict[str, Any]] = field(default_factory=list)
    rewards: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.spans or self.rewards)

    def add(self, other: "Bundle") -> None:
        """Take in what another one holds."""
        self.spans += other.spans
        self.rewards += other.rewards


def span_out(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as it leaves: known columns only, payloads as values, secrets masked once more."""
    found: dict[str, Any] = {}
    for name in (*SPAN_COLUMNS, ECHO_OF):
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, str):
            value, _ = redact.text(value)
        found[name] = _value(value) if name in PAYLOADS else value
    return found


def reward_out(row: Mapping[str, Any]) -> dict[str, Any]:
    """A reward as it leaves."""
    found = {name: row[name] for name in REWARD_COLUMNS if row.get(name) is not None}
    return {name: redact.text(value)[0] if isinstance(value, str) else value for name, value in found.items()}


def _value(text: str) -> Any:
    """A payload as its value, where that comes back as the same text's value; other text stays text."""
    if text[:1] not in ("[", "{"):
        return text
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def span_in(given: Mapping[str, Any], where: str = "span") -> dict[str, Any]:
    """A row as it enters: every column checked, payloads as text again. Raises BadInput that names the column."""
    found = {name: _checked(name, value, where) for name in SPAN_COLUMNS if (value := given.get(name)) is not None}
    for name in _REQUIRED:
        if name not in found:
            raise BadInput(f"{where}.{name}: is missing", param=name)
    if found["status"] not in _STATUSES:
        raise BadInput(f"{where}.status: must be one of {', '.join(_STATUSES)}", param="status")
    for name, size in (("span_id", 16), ("trace_id", 32)):
        if _HEX[size].fullmatch(found[name]) is None:
            raise BadInput(f"{where}.{name}: must be {size} hex digits", param=name)
    return {"episode_source": "import", "route": "import", "source": "import", **found}


def _checked(name: str, value: Any, where: str) -> Any:
    if name in PAYLOADS and not isinstance(value, str):
        value = _text(value, f"{where}.{name}")
    allowed = _KINDS[_TYPES[name]]
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise BadInput(f"{where}.{name}: must be {allowed[0].__name__}", param=name)
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise BadInput(f"{where}.{name}: is too large", param=name)
    return value


def _text(value: Any, where: str) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:
        raise BadInput(f"{where}: {error}", param=where) from None


def reward_in(given: Mapping[str, Any], where: str = "reward") -> dict[str, Any]:
    """A reward as it enters. Raises BadInput that names the field."""
    found = {name: given.get(name) for name in REWARD_COLUMNS if given.get(name) is not None}
    value, target = found.get("value"), found.get("target_id")
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        raise BadInput(f"{where}.value: must be a finite number", param="value")
    if found.get("target_kind") not in TARGETS or not isinstance(target, str) or not target:
        raise BadInput(f"{where}.target_kind: must be one of {', '.join(TARGETS)}, with a target_id", param="target_id")
    for name in ("reward_id", "name", "label", "explanation", "idempotency_key"):
        if name in found and not isinstance(found[name], str):
            raise BadInput(f"{where}.{name}: must be str", param=name)
    stamp = found.get("ts_ns")
    if isinstance(stamp, bool) or not isinstance(stamp, int) or not 0 <= stamp < 1 << 63:
        raise BadInput(f"{where}.ts_ns: must be nanoseconds since 1970", param="ts_ns")
    if found.get("source") not in SOURCES:
        found["source"] = "code"
    found.setdefault("reward_id", f"rw-{digest(found, 20)}")
    return {"name": "reward", **found, "value": float(value)}


def digest(value: Any, size: int) -> str:
    """`size` hex digits that stand for a value: the same value, the same digits."""
    text = orjson.dumps(value, option=orjson.OPT_SORT_KEYS, default=str)
    return hashlib.sha256(text).hexdigest()[:size]


def ident(value: Any, size: int) -> str:
    """Another product's id as one of ours: hex of the right length stays, anything else becomes its digest."""
    text = str(value).lower().removeprefix("0x")
    if size == 32 and len(text) == 36:
        text = text.replace("-", "")
    return text if _HEX[size].fullmatch(text) and text.strip("0") else digest(str(value), size)


def nanoseconds(value: Any, where: str) -> int:
    """A time as text (RFC 3339; without a zone it is UTC), seconds, milliseconds or nanoseconds. Raises BadInput."""
    if isinstance(value, datetime):
        moment = value
    elif isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return int(value * _unit(value))
    else:
        try:
            moment = datetime.fromisoformat(str(value).strip().replace(" UTC", "+00:00"))
        except ValueError:
            raise BadInput(f"{where}: {str(value)[:60]!r} is no time", param=where) from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return max(0, (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1000)


def _unit(value: float) -> int:
    """Nanoseconds in the unit that makes `value` a time of these decades."""
    for unit, least in ((1, 1e17), (1_000, 1e14), (1_000_000, 1e11)):
        if value >= least:
            return unit
    return 1_000_000_000


def grouped(spans: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Spans by episode, in the order of their start."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(spans, key=lambda row: (row["start_ns"], row["span_id"])):
        found.setdefault(row["episode_id"], []).append(row)
    return found
