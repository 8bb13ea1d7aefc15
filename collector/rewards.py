"""Rewards: what `POST /reward` accepts, and how several of them become one number."""

import contextlib
import hashlib
import json
import math
import secrets
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, get_args

import orjson

from collector import redact
from collector.errors import BadInput
from collector.model import Reward, RewardSource, TargetKind

TARGETS: tuple[TargetKind, ...] = get_args(TargetKind)
SOURCES: tuple[RewardSource, ...] = get_args(RewardSource)
MAX_ITEMS = 10_000
_LENIENT_BYTES = 1 << 20
# Longest strings, in characters.
LENGTHS = {
    "episode_id": 256,
    "response_id": 256,
    "span_id": 256,
    "trace_id": 256,
    "name": 128,
    "label": 1024,
    "explanation": 65_536,
    "idempotency_key": 256,
}
FIELDS = (*LENGTHS, "value", "source", "timestamp")
_LATEST_SECONDS = 32_503_680_000  # the year 3000: larger numbers are milliseconds by mistake


def read(raw: bytes) -> Any:
    """The JSON of a request body. NaN and infinities, which JSON lacks but clients write, are read as such, so that
    `parse` can name their field. Raises BadInput."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if len(raw) <= _LENIENT_BYTES:
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(raw.decode())
        raise BadInput(f"the body is not JSON: {error}", param="body") from None


def parse(body: Any, now_ns: int) -> list[Reward]:
    """The rewards of a request body: one object, or an array of them. Secrets in texts are masked.

    Raises BadInput whose `param` names the field, "value" or "[2].value".
    """
    if isinstance(body, Mapping):
        return [_one(body, now_ns, "")]
    if not isinstance(body, list):
        raise BadInput("the body must be a reward object or an array of them", param="body")
    if not body:
        raise BadInput("the array holds no reward", param="body")
    if len(body) > MAX_ITEMS:
        raise BadInput(f"at most {MAX_ITEMS} rewards at once, not {len(body)}", param="body")
    return [_one(item, now_ns, f"[{index}]") for index, item in enumerate(body)]


def _one(item: Any, now_ns: int, where: str) -> Reward:
    if not isinstance(item, Mapping):
        raise BadInput(f"{where}: must be an object", param=where)
    prefix = f"{where}." if where else ""
    for name in item:
        if name not in FIELDS:
            raise BadInput(f"{prefix}{name}: unknown field; known: {', '.join(FIELDS)}", param=f"{prefix}{name}")
    texts = {name: _text(item, name, prefix) for name in LENGTHS}
    targets = [kind for kind in TARGETS if texts[f"{kind}_id"] is not None]
    if len(targets) != 1:
        names = ", ".join(f"{kind}_id" for kind in TARGETS)
        raise BadInput(f"{prefix}target: give exactly one of {names}", param=f"{prefix}{_blamed(targets)}")
    key = texts["idempotency_key"]
    return Reward(
        reward_id=reward_id(key),
        target_kind=targets[0],
        target_id=texts[f"{targets[0]}_id"] or "",
        value=_value(item, prefix),
        ts_ns=_timestamp(item, now_ns, prefix),
        name=texts["name"] or "reward",
        label=_masked(texts["label"]),
        explanation=_masked(texts["explanation"]),
        source=_source(item, prefix),
        idempotency_key=key,
    )


def reward_id(idempotency_key: str | None) -> str:
    """The same key gives the same id, so that a repeated reward is stored once."""
    if idempotency_key is None:
        return f"rw-{secrets.token_hex(10)}"
    return f"rw-{hashlib.sha256(idempotency_key.encode()).hexdigest()[:20]}"


def _blamed(targets: list[TargetKind]) -> str:
    return f"{targets[1]}_id" if targets else "episode_id"


def _text(item: Mapping[str, Any], name: str, prefix: str) -> str | None:
    value = item.get(name)
    if value is None:
        return None
    where = prefix + name
    if not isinstance(value, str):
        raise BadInput(f"{where}: must be a string", param=where)
    if not value and name not in ("label", "explanation"):
        raise BadInput(f"{where}: is empty", param=where)
    if len(value) > LENGTHS[name]:
        raise BadInput(f"{where}: at most {LENGTHS[name]} characters, not {len(value)}", param=where)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadInput(f"{where}: holds half of a surrogate pair", param=where) from None
    return value


def _value(item: Mapping[str, Any], prefix: str) -> float:
    value = item.get("value")
    where = f"{prefix}value"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadInput(f"{where}: must be a number", param=where)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadInput(f"{where}: must be finite", param=where)
    return number


def _source(item: Mapping[str, Any], prefix: str) -> RewardSource:
    value = item.get("source")
    if value is None:
        return "code"
    for source in SOURCES:
        if value == source:
            return source
    where = f"{prefix}source"
    raise BadInput(f"{where}: must be one of {', '.join(SOURCES)}", param=where)


def _timestamp(item: Mapping[str, Any], now_ns: int, prefix: str) -> int:
    """Nanoseconds, from RFC 3339 text or Unix seconds."""
    value = item.get("timestamp")
    where = f"{prefix}timestamp"
    if value is None:
        return now_ns
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise BadInput(f"{where}: must be RFC 3339, such as 2026-01-31T12:00:00Z", param=where) from None
        if moment.tzinfo is None:
            raise BadInput(f"{where}: needs a time zone, such as Z or +01:00", param=where)
        return _to_ns(moment, where)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadInput(f"{where}: must be RFC 3339 text or Unix seconds", param=where)
    if not 0 <= value < _LATEST_SECONDS:
        raise BadInput(f"{where}: Unix seconds must lie between 1970 and 3000; are these milliseconds?", param=where)
    return int(value) * 1_000_000_000 + round((value - int(value)) * 1e9)


def _to_ns(moment: datetime, where: str) -> int:
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    nanoseconds = (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1000
    if nanoseconds < 0:
        raise BadInput(f"{where}: lies before 1970", param=where)
    return nanoseconds


def masked(row: Mapping[str, Any]) -> dict[str, Any]:
    """A reward's row with the secrets of its texts masked."""
    return {**row, "label": _masked(row.get("label")), "explanation": _masked(row.get("explanation"))}


def _masked(value: str | None) -> str | None:
    return None if value is None else redact.text(value)[0]


def combine(rewards: Iterable[Mapping[str, Any]], weights: Mapping[str, float]) -> float | None:
    """One number for an episode out of its rewards and those of its spans; None while none has a weighted name.

    Per target and name the latest counts (the larger id, where the time is the same), so a correction replaces what it
    corrects. The view `episode_rewards_v` says the same in SQL.
    """
    latest: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for reward in rewards:
        key = (reward["target_kind"], reward["target_id"], reward["name"])
        known = latest.get(key)
        if known is None or (reward["ts_ns"], reward["reward_id"]) > (known["ts_ns"], known["reward_id"]):
            latest[key] = reward
    counted = [(weights[name], reward["value"]) for (_, _, name), reward in latest.items() if name in weights]
    return math.fsum(weight * value for weight, value in counted) if counted else None
