"""From the store to training rows: stored spans and rewards as episodes and calls, credited."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collector.client import Client
from collector.episodes import build as build_episode
from collector.model import Episode
from optimize import credit
from optimize.rl.calls import Call, read_call

# Constants, so that no query is made of text; what is asked for is picked from the newest rows.
SPANS = """
select span_id, episode_id, step, start_ns, end_ns, status, http_status, error_type, finish_reason, response_id,
  request_model, response_model, prompt_slot, prompt_version, prompt_candidate, adapter_slot, adapter_version,
  temperature, top_p, input_tokens, output_tokens, input_messages, output_messages, tools, attributes, token_ids,
  logprobs
from spans_v order by start_ns desc
"""
REWARDS = """
select reward_id, target_kind, target_id, episode_id, span_id, name, value, label, explanation, source, ts_ns
from rewards_v order by ts_ns desc
"""
MOST_SPANS = 100_000


@dataclass(frozen=True)
class Gathered:
    """Episodes with the calls in them, as the engine told them."""

    episodes: list[Episode]
    calls: list[Call]

    @property
    def rewards(self) -> dict[str, float | None]:
        """Episode id -> its reward."""
        return {one.episode_id: one.reward for one in self.episodes}

    @property
    def turns(self) -> float:
        """Calls an episode."""
        return len(self.calls) / max(len(self.episodes), 1)


def gather(
    client: Client,
    weights: Mapping[str, float],
    *,
    only: Collection[str] | None = None,
    models: Collection[str] | None = None,
    limit: int = MOST_SPANS,
) -> Gathered:
    """The newest episodes: those in `only`, or those with a call that one of `models` answered, at most `limit` calls.

    `weights` are the config's: reward name -> weight.
    """
    client.flush()
    spans = _rows(client.query(SPANS, limit=limit))
    wanted = set(only) if only is not None else {row["episode_id"] for row in spans if _of(row, models)}
    by_episode: dict[str, list[dict[str, Any]]] = {}
    for row in spans:
        if row["episode_id"] in wanted:
            by_episode.setdefault(row["episode_id"], []).append(row)
    judged: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(client.query(REWARDS, limit=limit)):
        if row["episode_id"] in by_episode:
            judged.setdefault(row["episode_id"], []).append(row)
    names = sorted(by_episode)
    episodes = [build_episode(name, by_episode[name], judged.get(name, []), weights) for name in names]
    calls = [read_call(row) for name in names for row in by_episode[name] if _of(row, models)]
    return Gathered(episodes, calls)


def _rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]


def _of(row: Mapping[str, Any], models: Collection[str] | None) -> bool:
    if models is None:
        return True
    return any(row.get(name) in models for name in ("adapter_slot", "response_model", "request_model"))


def default_credit(method: str, turns: float) -> str:
    """Per-step credit where episodes have several calls; else the reward against the others'."""
    if turns > 1.5:
        return "gae"
    return "leave_one_out" if method in ("rft", "sft", "kto", "dpo") else "group"


def advantages(
    gathered: Gathered,
    method: str,
    name: str | None,
    *,
    tasks: Mapping[str, str] | None = None,
    weights: Mapping[str, float] | None = None,
    roles: Sequence[str] = (),
) -> tuple[str, dict[str, float | None]]:
    """`(credit method, span id -> advantage)`. `tasks`: episode id -> task, where known; else the first user message.

    Imitation (rft, sft) compares with all episodes: an answer that is poor, but the best to a hard task, is no model.
    """
    chosen = name or default_credit(method, gathered.turns)
    params: dict[str, Any] = {}
    if chosen in ("leave_one_out", "group", "gigpo"):
        imitates = method in ("rft", "sft") and chosen == "leave_one_out"
        keys: dict[str, Hashable] = {one.episode_id: (tasks or {}).get(one.episode_id) for one in gathered.episodes}
        if imitates:
            params["key"] = dict.fromkeys(keys, "all")
        elif tasks:
            params["key"] = keys
    given = credit.assign(gathered.episodes, chosen, weights=weights, roles=roles or None, **params)
    return chosen, {one.span_id: one.advantage for one in given}
