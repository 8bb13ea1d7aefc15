"""The nouns that travel between the packages. All frozen; times are nanoseconds since the epoch, tokens are counts.

`None` always means "not known" and is never read as 0.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

TargetKind = Literal["episode", "response", "span", "trace"]
RewardSource = Literal["code", "human", "llm"]
VersionKind = Literal["prompt", "adapter"]
Status = Literal["ok", "error", "cancelled"]
Ending = Literal["reward", "closed", "idle"]
# Operations that are calls of a model: the steps of an episode. What else a span may be (a tool's run, an agent, a
# chain) stands in the episode's tree. The macro `is_call` of schema.sql says the same.
CALLS = frozenset(("chat", "text_completion", "generate_content", "embeddings", "responses", "messages", "other"))


@dataclass(frozen=True, slots=True)
class Exchange:
    """One recorded call: the columns of `spans` and `payloads`, under the names that the journal line carries.

    Names follow OTel's GenAI conventions (`operation` is `gen_ai.operation.name`, `request_model` is
    `gen_ai.request.model` and so on; `collector/otel.py` holds the mapping). Payload fields are JSON *strings*: the
    loader then copies them without parsing.
    """

    span_id: str  # 16 hex digits
    trace_id: str  # 32 hex digits
    episode_id: str
    episode_source: str  # url | header | traceparent | metadata | response | chain | new
    start_ns: int
    end_ns: int
    operation: str  # chat | text_completion | embeddings | responses | messages | other
    route: str  # the path relayed, without scope and query
    status: Status
    parent_span_id: str | None = None
    source: str = "proxy"
    http_status: int | None = None  # None: no answer was begun
    error_type: str | None = None
    ttft_ms: float | None = None  # time to the first byte of the body
    attempts: int = 1
    provider: str | None = None
    request_model: str | None = None
    response_model: str | None = None
    response_id: str | None = None
    finish_reason: str | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    cost_usd: float | None = None
    prompt_slot: str | None = None
    prompt_version: int | None = None  # None with `prompt_candidate` set: a prompt under search
    prompt_candidate: str | None = None
    adapter_slot: str | None = None
    adapter_version: int | None = None
    propensity: float | None = None  # probability with which this episode got this version
    request_bytes: int = 0
    response_bytes: int = 0
    input_messages: str | None = None  # what the model saw, after injection: JSON list of {"role", "content", ...}
    output_messages: str | None = None  # one assistant message per choice, each with "finish_reason"
    tools: str | None = None
    token_ids: str | None = None  # {"prompt": [...], "completion": [[...], ...]} as the engine gave them
    logprobs: str | None = None
    attributes: str | None = None  # everything else worth keeping: {"variables": {...}, "metadata": {...}, ...}


@dataclass(frozen=True, slots=True)
class Reward:
    """One judgement of an episode, a response, a span or a trace."""

    reward_id: str
    target_kind: TargetKind
    target_id: str
    value: float
    ts_ns: int
    name: str = "reward"
    label: str | None = None
    explanation: str | None = None
    source: RewardSource = "code"
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One call of an episode, in the order in which the calls began; `step` counts from 0."""

    span_id: str
    step: int
    role: str | None  # the slot, where one matched; else the agent that its own spans name
    model: str | None
    versions: dict[str, str]
    input_messages: list[dict[str, Any]]
    output_messages: list[dict[str, Any]]
    input_tokens: int | None
    output_tokens: int | None
    rewards: list[dict[str, Any]]
    credit: float | None = None
    status: Status = "ok"
    start_ns: int = 0
    end_ns: int = 0
    http_status: int | None = None
    error_type: str | None = None
    finish_reason: str | None = None
    response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    attributes: dict[str, Any] | None = None
    branch: int = 0  # above 0: runs beside an earlier step


@dataclass(frozen=True, slots=True)
class Node:
    """A span in its episode's tree: a step by its number; a tool's run, an agent, a chain with what went in and out."""

    span_id: str
    parent_span_id: str | None  # None for a root; else a span of the same episode
    depth: int
    operation: str
    name: str | None
    role: str | None
    step: int | None
    status: Status
    error_type: str | None
    start_ns: int
    end_ns: int
    input_messages: list[dict[str, Any]]
    output_messages: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Episode:
    """Calls that belong together, and what they earned. `reward` is None while nothing was judged.

    `tree` holds every span, calls and others, each after the one it hangs under.
    """

    episode_id: str
    steps: list[Step]
    rewards: list[dict[str, Any]]
    reward: float | None
    tree: list[Node] = field(default_factory=list)
    ended: Ending | None = None


@dataclass(frozen=True, slots=True)
class Version:
    """An immutable, content-hashed version of a slot, numbered from 1."""

    slot: str
    version: int
    kind: VersionKind
    hash: str
    created_ns: int
    template: str | None = None
    base_model: str | None = None
    path: str | None = None
    match: dict[str, str] = field(default_factory=dict)  # {"model"?, "role"?}
    parent: int | None = None
    job_id: str | None = None
    note: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Deployment:
    """One line of the audit log: from `revision` on, new episodes of `slot` are dealt `arms` (version -> share)."""

    revision: int
    slot: str
    action: Literal["initial", "promote", "rollback"]
    arms: dict[int, float]
    ts_ns: int
    evidence: str = "manual"  # manual | gate | initial
    job_id: str | None = None
    note: str | None = None
