"""Episodes out of rows: calls in the order in which they began, each with what it earned, and the tree they stand in.

Pure: the same rows give the same episode, in whatever order they came.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import orjson

from collector import rewards as reward_rules
from collector.model import CALLS, Ending, Episode, Node, Step

IDLE_NS = 900_000_000_000  # without a sign of life for so long, an episode counts as over
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
Rows = Sequence[Mapping[str, Any]]


def build(
    episode_id: str,
    spans: Iterable[Mapping[str, Any]],
    rewards: Iterable[Mapping[str, Any]],
    weights: Mapping[str, float],
    echoes: Iterable[Mapping[str, Any]] = (),
    now_ns: int | None = None,
) -> Episode:
    """The episode of some rows of `spans` joined with `payloads`, of `rewards_v`, and of `echoes`.

    A reward that names a span stands with its step as well as with the episode. `now_ns`: idle episodes have ended.
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
    above = parents(ordered, list(echoes))
    walk = _depth_first(ordered, above)
    roles = _roles(walk, above)
    calls = [row for row in ordered if row.get("operation", "chat") in CALLS]
    steps = [
        _step(number, row, by_span.get(row["span_id"], []), roles[row["span_id"]], branch)
        for number, (row, branch) in enumerate(zip(calls, branches(calls), strict=True))
    ]
    numbers = {step.span_id: step.step for step in steps}
    tree = [_node(row, depth, above, roles, numbers) for row, depth in walk]
    total = reward_rules.combine(judged, weights)
    return Episode(episode_id, steps, judged, total, tree, ending(ordered, judged, now_ns))


def to_json(episode: Episode) -> dict[str, Any]:
    """The answer of `GET /api/episodes/{id}`."""
    steps, nodes = episode.steps, episode.tree
    return {
        "episode_id": episode.episode_id,
        "reward": episode.reward,
        "status": "error" if any(step.status != "ok" for step in steps) else "ok",
        "start_ns": min((node.start_ns for node in nodes), default=None),
        "end_ns": max((node.end_ns for node in nodes), default=None),
        "ended": episode.ended,
        "steps": [asdict(step) for step in steps],
        "tree": [asdict(node) for node in nodes],
        "rewards": episode.rewards,
    }


def parents(spans: Rows, echoes: Rows = ()) -> dict[str, str | None]:
    """{span: its parent among these spans, None for a root}. Never a cycle, whatever the rows say.

    An agent's own span of a recorded call (an echo) is none of the spans: what hangs under it hangs under its parent,
    and the recorded call itself takes the echo's place where it names no parent of its own.
    """
    known = {row["span_id"] for row in spans}
    echoed = {row["span_id"]: row.get("parent_span_id") for row in echoes}
    place = {row["echo_of"]: row.get("parent_span_id") for row in sorted(echoes, key=lambda row: str(row["span_id"]))}
    found: dict[str, str | None] = {}
    for row in spans:
        own = row.get("parent_span_id")
        parent = _through(own if own is not None else place.get(row["span_id"]), echoed, known)
        if parent is None and row["span_id"] in place:
            parent = _through(place[row["span_id"]], echoed, known)
        found[row["span_id"]] = parent
    _cut_cycles(found)
    return found


def _through(parent: str | None, echoed: Mapping[str, str | None], known: set[str]) -> str | None:
    """The nearest known span upwards, over echoes."""
    seen: set[str] = set()
    while parent is not None and parent not in known:
        if parent in seen or parent not in echoed:
            return None
        seen.add(parent)
        parent = echoed[parent]
    return parent


def _cut_cycles(above: dict[str, str | None]) -> None:
    """Where spans are their own ancestors, make the one from which that is found a root."""
    done: set[str] = set()
    for start in above:
        path: dict[str, None] = {}
        at: str | None = start
        while at is not None and at not in done and at not in path:
            path[at] = None
            at = above[at]
        if at is not None and at in path:
            above[at] = None
        done.update(path)


def branches(calls: Rows) -> list[int]:
    """The branch of each call, calls in order of their start: 0 for a chain, more where calls run at the same time.

    The lowest branch that is free when the call starts: within a branch no two overlap, and there are no more branches
    than calls ever ran at once.
    """
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    found: list[int] = []
    for row in calls:
        while busy and busy[0][0] <= row["start_ns"]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        branch = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (max(row["end_ns"], row["start_ns"] + 1), branch))
        found.append(branch)
    return found


def ending(spans: Rows, rewards: Rows, now_ns: int | None, idle_ns: int = IDLE_NS) -> Ending | None:
    """How an episode ended: a reward of the whole was given; its agent's own root span was closed; nothing came for
    long. None while it may go on."""
    if any(reward["target_kind"] in ("episode", "trace") for reward in rewards):
        return "reward"
    if any(row.get("source") == "otlp" and row.get("parent_span_id") is None for row in spans):
        return "closed"
    last = max((row["end_ns"] for row in spans), default=None)
    return "idle" if now_ns is not None and last is not None and now_ns - last > idle_ns else None


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


def _roles(walk: Iterable[tuple[Mapping[str, Any], int]], above: Mapping[str, str | None]) -> dict[str, str | None]:
    """{span: who acts}: the slot that served it, else the agent that it or the nearest span above it names."""
    agents: dict[str | None, str | None] = {None: None}
    found: dict[str, str | None] = {}
    for row, _ in walk:
        span_id = row["span_id"]
        agents[span_id] = row.get("agent_name") or agents[above[span_id]]
        found[span_id] = row.get("prompt_slot") or agents[span_id]
    return found


def _depth_first(spans: Rows, above: Mapping[str, str | None]) -> list[tuple[Mapping[str, Any], int]]:
    """The spans with their depth, each before what hangs under it, siblings in order of their start."""
    below: dict[str | None, list[Mapping[str, Any]]] = {}
    for row in spans:
        below.setdefault(above[row["span_id"]], []).append(row)
    found: list[tuple[Mapping[str, Any], int]] = []
    stack = [(row, 0) for row in reversed(below.get(None, []))]
    while stack:
        row, depth = stack.pop()
        found.append((row, depth))
        stack += [(child, depth + 1) for child in reversed(below.get(row["span_id"], []))]
    return found


def _node(
    row: Mapping[str, Any],
    depth: int,
    above: Mapping[str, str | None],
    roles: Mapping[str, str | None],
    numbers: Mapping[str, int],
) -> Node:
    step = numbers.get(row["span_id"])
    return Node(
        span_id=row["span_id"],
        parent_span_id=above[row["span_id"]],
        depth=depth,
        operation=row.get("operation") or "chat",
        name=row.get("tool_name") or row.get("agent_name") or row.get("name") or row.get("request_model"),
        role=roles[row["span_id"]],
        step=step,
        status=row["status"],
        error_type=row.get("error_type"),
        start_ns=row["start_ns"],
        end_ns=row["end_ns"],
        input_messages=_messages(row.get("input_messages")) if step is None else [],
        output_messages=_messages(row.get("output_messages")) if step is None else [],
    )


def _step(number: int, row: Mapping[str, Any], judged: Sequence[dict[str, Any]], role: str | None, branch: int) -> Step:
    return Step(
        span_id=row["span_id"],
        step=number,
        role=role,
        branch=branch,
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
