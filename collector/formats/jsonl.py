"""Our own form: a line an episode, {"episode_id", "reward", "spans": [...], "rewards": [...]}."""

from collections.abc import Mapping
from typing import Any

import orjson

from collector.formats.bundle import Bundle, reward_in, reward_out, span_in, span_out

MARK = "ratchet_episode"
VERSION = 1


def line(episode: Mapping[str, Any]) -> bytes:
    """One episode of the export API as a line."""
    return orjson.dumps(record(episode)) + b"\n"


def record(episode: Mapping[str, Any]) -> dict[str, Any]:
    """One episode as it leaves."""
    return {
        MARK: VERSION,
        "episode_id": episode["episode_id"],
        "reward": episode.get("reward"),
        "spans": [span_out(row) for row in (*episode["spans"], *episode["echoes"])],
        "rewards": [reward_out(row) for row in episode["rewards"]],
    }


def looks(found: Mapping[str, Any]) -> bool:
    """Whether a record is ours."""
    return MARK in found


def read(found: Mapping[str, Any]) -> Bundle:
    """The rows of a line. Raises BadInput that names the field."""
    spans = [span_in(row, f"spans[{index}]") for index, row in enumerate(found.get("spans") or ())]
    rewards = [reward_in(row, f"rewards[{index}]") for index, row in enumerate(found.get("rewards") or ())]
    return Bundle(spans, rewards)
