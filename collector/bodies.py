"""Bodies of requests: what may be written, by field. Unknown fields are refused by name."""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from collector.errors import BadInput

Text = Annotated[str, Field(max_length=4096)]
Identifier = Annotated[str, Field(min_length=1, max_length=256)]
Model = TypeVar("Model", bound=BaseModel)


class Body(BaseModel):
    """A body that knows no other keys than its own, and takes no `true` or "2" for a number."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), strict=True)


class VersionBody(Body):
    """A new version: a prompt with `template`, or an adapter with `base_model` and `path`."""

    kind: Literal["prompt", "adapter"] = "prompt"
    template: str | None = Field(default=None, max_length=1_000_000)
    base_model: Identifier | None = None
    path: Text | None = None
    match: dict[str, str] = Field(default_factory=dict)
    parent: int | None = None
    note: Text | None = None
    job_id: Identifier | None = None
    metrics: dict[str, Any] = Field(default_factory=dict)


class CandidateBody(Body):
    """A prompt under search."""

    template: str = Field(min_length=1, max_length=1_000_000)


class AdoptBody(Body):
    """What a new slot is made of: the id of a proposal, or a template."""

    proposal: Identifier | None = None
    template: str | None = Field(default=None, min_length=1, max_length=1_000_000)
    note: Text | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.proposal is None) == (self.template is None):
            raise ValueError("give exactly one of `proposal` and `template`")
        return self


class DecisionBody(Body):
    """Who decided, and why."""

    evidence: Literal["manual", "gate"] = "manual"
    job_id: Identifier | None = None
    note: Text | None = None


class PromoteBody(DecisionBody):
    """Deal `traffic` of new episodes to `version`."""

    version: int
    traffic: float = Field(default=1.0, gt=0, le=1)


class HoldBody(Body):
    """Have engines serve an adapter version that gets no traffic, for calls that are pinned to it."""

    version: int
    seconds: float = Field(default=3600.0, gt=0, le=86_400)


class KeyBody(Body):
    """A new key: what it may do, and how much of it."""

    name: Identifier
    scopes: list[Literal["agent", "reward", "admin"]] = ["agent", "reward"]
    limits: dict[str, float | None] = Field(default_factory=dict)


class ExportBody(Body):
    """Which episodes to give out whole: those named, or those of the filters, newest first."""

    limit: int = Field(default=100, ge=1, le=500)
    cursor: str | None = None
    episodes: list[Identifier] | None = Field(default=None, max_length=100_000)
    slot: str | None = None
    version: int | None = None
    min_reward: float | None = None
    max_reward: float | None = None
    status: Literal["ok", "error"] | None = None
    since_ns: int | None = Field(default=None, ge=0, lt=1 << 63)


class QueryBody(Body):
    """One SELECT."""

    sql: str | None = Field(default=None, min_length=1, max_length=100_000)
    limit: int = Field(default=10_000, ge=1, le=10_000_000)
    page: int | None = Field(default=None, ge=1, le=10_000_000)  # rows of one answer; a bound in bytes holds anyway
    cursor: str | None = Field(default=None, max_length=64)  # `next` of the answer before

    @model_validator(mode="after")
    def _one_of(self) -> "QueryBody":
        if (self.sql is None) == (self.cursor is None):
            raise ValueError("give exactly one of `sql` and `cursor`")
        return self


class CompactBody(Body):
    """Move days that ended `days` days ago or earlier to the archive."""

    days: int = Field(default=1, ge=1, le=100_000)
    dry_run: bool = False


class RetainBody(Body):
    """Delete the spans of days that ended more than `days` days ago."""

    days: int = Field(ge=1, le=100_000)
    dry_run: bool = False


class JobEvent(Body):
    """The state of a job; the latest of a `job_id` counts."""

    event: Literal["job"]
    job_id: Identifier
    kind: Identifier
    slot: str | None = None
    status: Literal["running", "done", "failed", "cancelled"]
    spec: str
    progress: str = "{}"
    result: str | None = None
    ts_ns: int = Field(ge=0, lt=1 << 63)


class EvaluationEvent(Body):
    """One paid rollout."""

    event: Literal["evaluation"]
    evaluation_id: Identifier
    job_id: Identifier | None = None
    slot: str
    version_hash: str
    task_id: str
    replicate: int = Field(default=0, ge=0, lt=1 << 31)
    arm: Literal["search", "baseline", "candidate"] = "search"
    subset: str | None = None
    episode_id: str | None = None
    reward: float | None = Field(default=None, allow_inf_nan=False)
    ok: bool
    reason: str | None = None
    answer: str = ""
    seconds: float = Field(default=0.0, allow_inf_nan=False)
    input_tokens: int | None = None
    output_tokens: int | None = None
    calls: int | None = None
    cost_usd: float | None = Field(default=None, allow_inf_nan=False)
    model: str | None = None
    ts_ns: int = Field(ge=0, lt=1 << 63)


_EVENTS: TypeAdapter[list[JobEvent | EvaluationEvent]] = TypeAdapter(
    list[Annotated[JobEvent | EvaluationEvent, Field(discriminator="event")]]
)


def events(body: Any) -> list[JobEvent | EvaluationEvent]:
    """Job and evaluation events. Raises BadInput whose `param` is, say, "[2].reward"."""
    try:
        return _EVENTS.validate_python(body, strict=True)
    except ValidationError as error:
        raise explain(error.errors()) from None


def check(model: type[Model], body: Any) -> Model:
    """`body` as `model`. Raises BadInput that names the field."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise explain(error.errors()) from None


def explain(errors: Any) -> BadInput:
    """The first of pydantic's errors in one sentence that begins with the field."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return BadInput("body: is not JSON", param="body")
    # "body" and "query" are where FastAPI found it, the discriminator's tag is not part of the path either.
    parts = [part for part in first["loc"] if part not in ("body", "query", "path", "job", "evaluation")]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".") or "body"
    message = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
    return BadInput(f"{param}: {message}", param=param)
