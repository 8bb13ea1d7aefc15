"""From a call to its journal line: written once, before the last byte of the answer."""

import logging
import re
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import orjson

from collector import redact
from collector.journal import Journal
from collector.model import Status
from collector.prices import Prices
from collector.privacy import Policy
from proxy import metrics
from proxy.dialects.base import Dialect, Json, Reading, Summary, integer
from proxy.errors import Header
from proxy.identity import Identity, Trace, fresh, give_back, provisional, remember, trace_of
from proxy.paths import Route
from proxy.table import Table

log = logging.getLogger(__name__)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{4096,}={0,2}")
_ELIDE_ABOVE = 64 << 10
MAX_PAYLOAD = 4 << 20


class Hidden(NamedTuple):
    """What of an answer the client did not ask for."""

    token_ids: bool
    logprobs: bool


class Applied(NamedTuple):
    """A slot's version that a call was served: exactly one of `version` and `candidate` is set."""

    slot: str
    version: int | None
    candidate: str | None
    propensity: float
    values: dict[str, str]
    served: str | None = None  # an adapter's name at its engine

    @property
    def label(self) -> str:
        """As in `x-ratchet-versions`."""
        return f"{self.slot}@{self.candidate or self.version}"


class Call:
    """Everything known about a call under way. What stays None was not known when it ended.

    A plain class with defaults in place, because most calls change few of them.
    """

    copy_limit: int = 16 << 20  # bytes of the answer that are kept for the record
    body: Json | None = None  # the request as it went upstream, parsed
    reading: Reading = Reading()
    adapter: Applied | None = None
    provider: str | None = None
    attempts: int = 1
    request_bytes: int = 0
    response_bytes: int = 0
    status: Status = "error"
    http_status: int | None = None
    error_type: str | None = None
    ttft_ms: float | None = None
    stream: bool = False
    cost_usd: float | None = None
    summary: Summary = Summary()
    upstream_model: str | None = None  # the name sent in place of the client's
    limits: Mapping[str, float] | None = None  # what the key may use; None: as much as it likes
    metered: bool = False  # whether the call counts against those
    joined: int = 0  # how many retries wait for the same answer
    cached: bool = False  # whether the answer is one that was kept
    hidden: Hidden | None = None  # what the answer holds that the client did not ask for
    truncated: bool = False  # whether a part of the answer was too long to be kept
    written: bool = False

    def __init__(self, route: Route, dialect: Dialect, trace: Trace, named: str | None, tenant: str) -> None:
        """`named`: the header x-ratchet-episode. `tenant`: the name of the key; empty without keys."""
        self.route = route
        self.dialect = dialect
        self.trace = trace
        self.named = named
        self.tenant = tenant
        self.span_id = fresh()
        self.start_ns = time.time_ns()
        self.began = time.perf_counter_ns()
        self.applied: list[Applied] = []

    @cached_property
    def identity(self) -> Identity:
        """The episode; for a call that is refused before its body could tell, what URL and headers say."""
        return provisional(self.route.episode, self.named, self.trace)

    def first_byte(self) -> None:
        """The upstream's first byte of the body is here."""
        if self.ttft_ms is None:
            self.ttft_ms = (time.perf_counter_ns() - self.began) / 1e6

    def end(self, status: Literal["ok", "error", "cancelled"], error_type: str | None = None) -> None:
        """How it went."""
        self.status, self.error_type = status, error_type

    @property
    def served(self) -> list[Applied]:
        """Every version that this call was served."""
        return [*self.applied, self.adapter] if self.adapter else self.applied

    def lines(self) -> bytes:
        """The same as lines of a head."""
        labels = ",".join([one.label for one in self.served])
        episode = f"x-ratchet-episode: {self.identity.episode_id}\r\nx-ratchet-span: {self.span_id}"
        return f"{episode}\r\nx-ratchet-versions: {labels}".encode()

    def headers(self) -> list[Header]:
        """What every recorded call answers."""
        return [
            (b"x-ratchet-episode", self.identity.episode_id.encode()),
            (b"x-ratchet-span", self.span_id.encode()),
            (b"x-ratchet-versions", ",".join(one.label for one in self.served).encode()),
        ]


class Recorder:
    """Writes calls to the journal, and leaves what the episode's next call is found by."""

    def __init__(
        self,
        journal: Journal,
        table: Table,
        emails: bool,
        prices: Prices | None = None,
        policy: Policy | None = None,
    ) -> None:
        self._prices = Prices() if prices is None else prices
        self._journal = journal
        self._table = table
        self._emails = emails
        self._policy = policy

    def write(self, call: Call) -> None:
        """Writes the span, unless it is written already. Never raises: a call must not fail because of its record."""
        if call.written:
            return
        call.written = True
        seconds = (time.perf_counter_ns() - call.began) / 1e9
        told = call.summary
        tokens_in, tokens_out = told.input_tokens, told.output_tokens
        metrics.count(call.dialect.operation, call.status, seconds, tokens_in, tokens_out)
        if call.cost_usd is None and call.provider is not None and (tokens_in is not None or tokens_out is not None):
            models = (call.upstream_model, told.response_model, call.reading.model)
            call.cost_usd = self._prices.cost(call.provider, models, tokens_in, tokens_out, told.cached_tokens)
        try:
            line = exchange(call, seconds)
            if self._policy is None:
                redact.payloads(line, emails=self._emails)
            else:
                self._policy.apply(line)
            self._journal.append("span", line)
            if call.status == "ok":
                responses = call.dialect.operation == "responses"
                remember(self._table, call.tenant, call.identity, call.reading, call.summary, responses)
            else:
                give_back(self._table, call.identity)
        except Exception:
            metrics.UNRECORDED.inc()
            log.exception("the call %s could not be recorded", call.span_id)


def exchange(call: Call, seconds: float) -> Json:
    """The record of a finished call: the fields of an `Exchange`, without most of those that are not known. It is no
    Exchange, because to make and dump one takes ten times as long as a dict."""
    body, summary, identity = call.body or {}, call.summary, call.identity
    line: Json = {
        "span_id": call.span_id,
        "trace_id": call.trace.trace_id or trace_of(identity.episode_id),
        "episode_id": identity.episode_id,
        "episode_source": identity.source,
        "start_ns": call.start_ns,
        "end_ns": call.start_ns + int(seconds * 1e9),
        "operation": call.dialect.operation,
        "route": call.route.path,
        "status": call.status,
        "source": "proxy",
        "http_status": call.http_status,
        "ttft_ms": call.ttft_ms,
        "attempts": call.attempts,
        "provider": call.provider,
        "request_model": call.reading.model,
        "response_model": summary.response_model,
        "response_id": summary.response_id,
        "finish_reason": summary.finish_reason,
        "stream": call.stream,
        "input_tokens": summary.input_tokens,
        "output_tokens": summary.output_tokens,
        "request_bytes": call.request_bytes,
        "response_bytes": call.response_bytes,
    }
    if call.cost_usd is not None:
        line["cost_usd"] = call.cost_usd
    if summary.cached_tokens is not None:
        line["cached_tokens"] = summary.cached_tokens
    if call.trace.parent_id is not None:
        line["parent_span_id"] = call.trace.parent_id
    if call.error_type is not None:
        line["error_type"] = call.error_type
    if call.applied or call.adapter is not None:
        _add_versions(line, call)
    for name in filter(body.__contains__, _PARAMETERS):
        column, read = _PARAMETERS[name]
        line.setdefault(column, read(body[name]))
    _add_payloads(line, call, body)
    return line


def _add_payloads(line: Json, call: Call, body: Json) -> None:
    summary, messages = call.summary, call.dialect.messages(body)
    if messages:
        line["input_messages"] = _payload(messages)
    if summary.output_messages is not None:
        line["output_messages"] = _payload(summary.output_messages)
    if body.get("tools") is not None:
        line["tools"] = _payload(body["tools"])
    if summary.token_ids is not None:
        line["token_ids"] = _payload(summary.token_ids)
    if summary.logprobs is not None:
        line["logprobs"] = _payload(summary.logprobs)
    attributes = _attributes(call, body)
    if attributes:
        line["attributes"] = _payload(attributes)


def _add_versions(line: Json, call: Call) -> None:
    if call.applied:
        slot, line["prompt_version"], line["prompt_candidate"], line["propensity"], _, _ = call.applied[0]
        line["prompt_slot"] = slot
    if call.adapter is not None:  # slots are dealt independently
        line["adapter_slot"], line["adapter_version"] = call.adapter.slot, call.adapter.version
        line["propensity"] = line.get("propensity", 1.0) * call.adapter.propensity


def _attributes(call: Call, body: Json) -> Json:
    """What is worth keeping and has no column."""
    kept: Json = {}
    if not _KEPT.isdisjoint(body):
        kept = {name: body[name] for name in ("metadata", "user") if body.get(name)}
    if call.applied:
        if call.applied[0].values:
            kept["variables"] = call.applied[0].values
        if len(call.applied) > 1:
            kept["prompts"] = [{"slot": one.label, "variables": one.values} for one in call.applied[1:]]
    if call.identity.ambiguous:
        kept["ambiguous"] = True
    if call.tenant:
        kept["key"] = call.tenant
    if call.joined:
        kept["joined"] = call.joined
    if call.cached:
        kept["cache"] = "hit"
    if call.truncated:
        kept["truncated"] = True
    return kept


def _payload(value: Any) -> str:
    """As JSON text. Long runs of base64 (images, audio) become their hash; what is still too long is left out."""
    raw = orjson.dumps(value)
    return raw.decode() if len(raw) <= _ELIDE_ABOVE else _elided(raw.decode(), value)


def _elided(text: str, value: Any) -> str:
    text = _BASE64.sub(lambda found: "sha256:" + sha256(found.group().encode()).hexdigest(), text)
    if len(text) > MAX_PAYLOAD:
        left_out = {"elided": True, "bytes": len(text), "sha256": sha256(text.encode()).hexdigest()}
        text = orjson.dumps([left_out] if isinstance(value, list) else left_out).decode()
    return text


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


# What a body may set -> the column, and how it is read; of several for one column, the first counts.
_PARAMETERS: dict[str, tuple[str, Callable[[Any], float | int | None]]] = {
    "temperature": ("temperature", _number),
    "top_p": ("top_p", _number),
    "max_completion_tokens": ("max_tokens", integer),
    "max_output_tokens": ("max_tokens", integer),
    "max_tokens": ("max_tokens", integer),
    "seed": ("seed", integer),
}
_KEPT = frozenset(("metadata", "user"))
