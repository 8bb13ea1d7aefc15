"""Episodes out of rows: calls in the order in which they began, each with what it earned. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import orjson

from collector import rewards as reward_rules
from collector.model import Episode, Step

_REWARD_KEYS = (
    "reward_id",
    "target_kind",
    "target_id",
    "span_id",
    "name",
    "value",
    "label",
    "explanation",
    "source",
    "ts_ns",
)
_STEP_KEYS = ("status", "start_ns", "end_ns", "http_status", "error_type", "finish_reason", "response_id")


def build(
    episode_id: str,
    spans: Iterable[Mapping[str, Any]],
    rewards: Iterable[Mapping[str, Any]],
    weights: Mapping[str, float],
) -> Episode:
    """The episode of some rows of `spans` joined with `payloads`, and of `rewards_v`, in whatever order they came.

    A reward that names a span stands with its step as well as with the episode.
    """
    judged = sorted(
        ({key: row.get(key) for key in _REWARD_KEYS} for row in rewards),
        key=lambda reward: (reward["ts_ns"], reward["reward_id"]),
    )
    by_span: dict[str, list[dict[str, Any]]] = {}
    for reward in judged:
        if reward["span_id"] is not None:
            by_span.setdefault(reward["span_id"], []).append(reward)
    ordered = sorted(spans, key=lambda row: (row["start_ns"], row["span_id"]))
    steps = [_step(number, row, by_span.get(row["span_id"], [])) for number, row in enumerate(ordered)]
    return Episode(episode_id, steps, judged, reward_rules.combine(judged, weights))


def to_json(episode: Episode) -> dict[str, Any]:
    """The answer of `GET /api/episodes/{id}`."""
    steps = episode.steps
    return {
        "episode_id": episode.episode_id,
        "reward": episode.reward,
        "status": "error" if any(step.status != "ok" for step in steps) else "ok",
        "start_ns": min((step.start_ns for step in steps), default=None),
        "end_ns": max((step.end_ns for step in steps), default=None),
        "steps": [asdict(step) for step in steps],
        "rewards": episode.rewards,
    }


def versions(row: Mapping[str, Any]) -> dict[str, str]:
    """{slot: "3" or "c-<hash>"} of one span: what served it."""
    found: dict[str, str] = {}
    if row.get("prompt_slot"):
        version = row.get("prompt_version") or row.get("prompt_candidate")
        if version is not None:
            found[row["prompt_slot"]] = str(version)
    if row.get("adapter_slot") and row.get("adapter_version") is not None:
        found[row["adapter_slot"]] = str(row["adapter_version"])
    return found


def _step(number: int, row: Mapping[str, Any], judged: Sequence[dict[str, Any]]) -> Step:
    return Step(
        span_id=row["span_id"],
        step=number,
        role=row.get("prompt_slot"),
        model=row.get("response_model") or row.get("request_model"),
        versions=versions(row),
        input_messages=_messages(row.get("input_messages")),
        output_messages=_messages(row.get("output_messages")),
        input_tokens=row.get("input_tokens"),
        output_tokens=row.get("output_tokens"),
        rewards=list(judged),
        tools=_messages(row.get("tools")) or None,
        attributes=_attributes(row.get("attributes")),
        **{key: row[key] for key in _STEP_KEYS if key in row},
    )


def _messages(text: str | None) -> list[dict[str, Any]]:
    """A payload column as a list of objects; what is not one (cut off, or a bare string) is shown, not hidden."""
    if not text:
        return []
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return [{"role": "unknown", "content": text}]
    items = value if isinstance(value, list) else [value]
    return [item if isinstance(item, dict) else {"role": "unknown", "content": item} for item in items]


def _attributes(text: str | None) -> dict[str, Any] | None:
    if not text:
        return None
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {"raw": text}
    return value if isinstance(value, dict) else {"raw": value}
