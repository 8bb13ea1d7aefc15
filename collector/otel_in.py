"""Spans of agents' own instrumentation as rows, and their evaluations as rewards. Pure.

One mapping for three families of names: OTel's GenAI conventions, OpenInference, OpenLLMetry. What has no column stays,
under its own name, in `attributes`.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import orjson

from collector import otel, redact
from collector.errors import BadInput
from collector.model import CALLS, Exchange, Reward, RewardSource, Status
from collector.otel_messages import input_messages, nested, output_messages, parsed, text
from collector.otlp import LARGEST, Event, Span
from collector.rewards import LENGTHS, SOURCES, parse, reward_id

EVALUATION = "gen_ai.evaluation.result"
ROUTE = "/v1/traces"
_LONGEST_NAME = 256
_KINDS = {
    "llm": "chat",
    "embedding": "embeddings",
    "tool": "execute_tool",
    "agent": "invoke_agent",
    "workflow": "invoke_workflow",
    "chain": "chain",
    "task": "task",
    "retriever": "retrieval",
    "reranker": "rerank",
    "guardrail": "guardrail",
    "evaluator": "evaluate",
    "prompt": "prompt",
    "completion": "text_completion",
    "chat": "chat",
}
# column -> the attributes that may hold it, the first one that does wins.
_TEXTS: Mapping[str, tuple[str, ...]] = {
    "provider": ("gen_ai.provider.name", "gen_ai.system", "llm.provider", "llm.system"),
    "request_model": ("gen_ai.request.model", "llm.request.model_name", "llm.model_name", "embedding.model_name"),
    "response_model": ("gen_ai.response.model", "llm.response.model_name", "llm.model_name"),
    "response_id": ("gen_ai.response.id", "llm.response.id"),
    "agent_name": ("gen_ai.agent.name", "agent.name", "graph.node.name", "traceloop.workflow.name"),
    "tool_name": ("gen_ai.tool.name", "tool.name", "tool_call.function.name"),
}
_WHOLE: Mapping[str, tuple[str, ...]] = {
    "input_tokens": ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.token_count.prompt"),
    "output_tokens": ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens", "llm.token_count.completion"),
    "cached_tokens": (
        "gen_ai.usage.cache_read.input_tokens",
        "gen_ai.usage.cache_read_input_tokens",
        "llm.token_count.prompt_details.cache_read",
    ),
    "max_tokens": ("gen_ai.request.max_tokens", "gen_ai.request.max_completion_tokens", "max_tokens"),
    "seed": ("gen_ai.request.seed", "gen_ai.openai.request.seed", "seed"),
    "http_status": ("http.response.status_code", "http.status_code"),
    "attempts": ("ratchet.attempts",),
    "prompt_version": ("ratchet.prompt.version",),
    "adapter_version": ("ratchet.adapter.version",),
}
_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "temperature": ("gen_ai.request.temperature", "temperature"),
    "top_p": ("gen_ai.request.top_p", "top_p"),
    "cost_usd": ("ratchet.cost.usd", "llm.cost.total", "gen_ai.usage.cost"),
    "propensity": ("ratchet.propensity",),
}
_OURS = ("prompt_slot", "prompt_candidate", "adapter_slot")  # read only from spans that we exported
# An agent's span repeats the sum of its calls' tokens: counted there, they would count twice.
_OF_CALLS = ("input_tokens", "output_tokens", "cached_tokens", "cost_usd", "response_id")
_TABLES = (*_TEXTS.items(), *_WHOLE.items(), *_NUMBERS.items())
_USED = frozenset(name for _, names in _TABLES for name in names) | frozenset(otel.ATTRIBUTES.values()) | otel.EXTRA
_USED_OF_CALLS = frozenset(name for column, names in _TABLES if column in _OF_CALLS for name in names)
_WHOLE_BODIES = frozenset(("input.value", "input.mime_type", "output.value", "output.mime_type"))  # the same again
_FLAT = ("llm.input_messages.", "llm.output_messages.", "llm.tools.", "gen_ai.prompt.", "gen_ai.completion.")


@dataclass(frozen=True, slots=True)
class Observed(Exchange):
    """A span that an agent's own instrumentation made: a call that it saw, a tool, an agent, a step of a workflow."""

    name: str | None = None
    agent_name: str | None = None
    tool_name: str | None = None


def rows(spans: Iterable[Span], *, emails: bool = False) -> list[Observed]:
    """The rows of spans, secrets masked."""
    return [masked(row(span), emails) for span in spans]


def row(span: Span) -> Observed:
    """One span as a row."""
    given = _with_parameters(span.attributes)
    operation = _operation(given)
    call = operation in CALLS
    found = _columns(given)
    inputs, outputs = (input_messages(given), output_messages(given)) if call else _executed(given, found)
    ours: dict[str, Any] = {}
    if any(name.startswith("ratchet.") for name in given):
        ours = {name: _short(given.get(otel.ATTRIBUTES[name])) for name in _OURS}
    episode = _short(given.get("ratchet.episode.id"))
    return Observed(
        span_id=span.span_id,
        trace_id=span.trace_id,
        parent_span_id=span.parent_span_id,
        episode_id=episode or span.trace_id,
        episode_source=_episode_source(given, episode),
        start_ns=span.start_ns,
        end_ns=span.end_ns,
        operation=operation,
        route=ROUTE,
        source="otlp",
        status=_status(span, given),
        error_type=_error(span),
        ttft_ms=_ttft(given),
        finish_reason=_finish_reason(given, outputs) if call else None,
        stream=given.get("gen_ai.request.stream", given.get("gen_ai.is_streaming")) is True,
        input_messages=_json(inputs),
        output_messages=_json(outputs),
        tools=_tools(given),
        attributes=_json(_rest(span, call)),
        name=_short(span.name),
        **{name: value for name, value in found.items() if call or name not in _OF_CALLS},
        **ours,
    )


def _episode_source(given: Mapping[str, Any], episode: str | None) -> str:
    if episode is None:
        return "trace"
    return _short(given.get("ratchet.episode.source")) or "attribute"


def _operation(given: Mapping[str, Any]) -> str:
    for name in ("ratchet.operation", "gen_ai.operation.name"):
        if isinstance(given.get(name), str) and given[name]:
            return str(given[name])[:64]
    for name in ("openinference.span.kind", "traceloop.span.kind", "llm.request.type"):
        kind = given.get(name)
        if isinstance(kind, str) and kind.lower() in _KINDS:
            return _KINDS[kind.lower()]
    return "span"


def _with_parameters(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """OpenInference keeps the request's parameters, and the answer with its id, as JSON in one attribute each."""
    if "openinference.span.kind" not in attributes:
        return attributes
    parameters = parsed(attributes.get("llm.invocation_parameters"))
    found = {**parameters, **attributes} if isinstance(parameters, Mapping) else dict(attributes)
    answer = parsed(attributes.get("output.value"))
    if isinstance(answer, Mapping) and isinstance(answer.get("id"), str):
        found.setdefault("llm.response.id", answer["id"])
    if isinstance(parameters, Mapping) and isinstance(parameters.get("model"), str):
        found.setdefault("llm.request.model_name", parameters["model"])
    return found


def _columns(given: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {column: _first(given, names, str) for column, names in _TEXTS.items()}
    found |= {column: _first(given, names, int) for column, names in _WHOLE.items()}
    found |= {column: _first(given, names, float) for column, names in _NUMBERS.items()}
    for column in _TEXTS:
        found[column] = _short(found[column])
    if found["attempts"] is None:
        found["attempts"] = 1
    for column in ("http_status", "prompt_version", "adapter_version", "attempts"):
        number = found[column]
        if number is not None and not -(1 << 31) <= number < 1 << 31:
            found[column] = None
    return found


def _first(given: Mapping[str, Any], names: Sequence[str], kind: type[Any]) -> Any:
    for name in names:
        value = given.get(name)
        if isinstance(value, bool):
            continue
        if kind is float and isinstance(value, int | float):
            return float(value)
        if isinstance(value, kind) and value != "" and not (isinstance(value, int) and abs(value) > LARGEST):
            return value
    return None


def _executed(given: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """A tool's run as the messages around it: the call that asked for it, and what it gave back."""
    if found["tool_name"] is None and "gen_ai.tool.call.id" not in given:
        return [], []
    ident = given.get("gen_ai.tool.call.id") or given.get("tool_call.id") or given.get("tool.id")
    asked = _held(given, "gen_ai.tool.call.arguments", "tool.parameters", "input.value", "traceloop.entity.input")
    gave = _held(given, "gen_ai.tool.call.result", "output.value", "traceloop.entity.output")
    function = {"name": found["tool_name"], "arguments": "" if asked is None else text(asked)}
    request = {"role": "assistant", "tool_calls": [{"id": ident, "type": "function", "function": function}]}
    answer = [] if gave is None else [{"role": "tool", "tool_call_id": ident, "content": text(gave)}]
    return [request], answer


def _held(given: Mapping[str, Any], *names: str) -> Any:
    return next((given[name] for name in names if given.get(name) is not None), None)


def _status(span: Span, given: Mapping[str, Any]) -> Status:
    if given.get("ratchet.status") == "cancelled":
        return "cancelled"
    return "error" if span.failed else "ok"


def _error(span: Span) -> str | None:
    kind = span.attributes.get("error.type")
    if kind is None and span.failed:
        thrown = (event.attributes.get("exception.type") for event in span.events if event.name == "exception")
        kind = next((one for one in thrown if one), None) or span.message or "error"
    return _short(kind)


def _ttft(given: Mapping[str, Any]) -> float | None:
    seconds = _first(given, ("gen_ai.response.time_to_first_chunk",), float)
    return None if seconds is None else float(seconds) * 1000


def _finish_reason(given: Mapping[str, Any], outputs: Sequence[Mapping[str, Any]]) -> str | None:
    reasons = parsed(given.get("gen_ai.response.finish_reasons")) or given.get("llm.finish_reason")
    first = reasons[0] if isinstance(reasons, list) and reasons else reasons
    if not first and outputs:
        first = outputs[0].get("finish_reason")
    return "tool_calls" if first == "tool_call" else _short(first)


def _tools(given: Mapping[str, Any]) -> str | None:
    """OpenAI's list of tools."""
    tools = parsed(given.get("gen_ai.tool.definitions"))
    if tools is None:
        flat = nested(given, "llm.tools")
        items = [one.get("tool", {}).get("json_schema") for one in flat] if isinstance(flat, list) else []
        tools = [parsed(one) for one in items if one is not None]
    return _json(tools if isinstance(tools, list) else [tools])


def _rest(span: Span, call: bool) -> dict[str, Any]:
    """What has no column: attributes by their own names, events, where it came from."""
    used = _USED if call else _USED - _USED_OF_CALLS
    if call and any(name.startswith(_FLAT) for name in span.attributes):
        used |= _WHOLE_BODIES
    kept = {name: value for name, value in span.attributes.items() if name not in used and not name.startswith(_FLAT)}
    ours = parsed(kept.pop("ratchet.attributes", None))
    rest: dict[str, Any] = dict(ours) if isinstance(ours, Mapping) else {}
    if kept:
        rest["otel"] = kept
    if span.events:
        rest["events"] = [{"name": one.name, "ts_ns": one.ts_ns, **one.attributes} for one in span.events]
    if span.scope != otel.SCOPE:
        rest |= {name: value for name, value in (("resource", span.resource), ("scope", span.scope)) if value}
    return rest


def _json(value: Any) -> str | None:
    return orjson.dumps(value, default=str).decode() if value else None


def _short(value: Any) -> str | None:
    return str(value)[:_LONGEST_NAME] if value not in (None, "") else None


def masked(made: Observed, emails: bool) -> Observed:
    """The row with its secrets masked, in names too."""
    named: dict[str, Any] = {
        name: redact.text(value, emails)[0]
        for name in ("name", "agent_name", "tool_name", "error_type", "request_model")
        if (value := getattr(made, name)) is not None
    }
    return redact.exchange(replace(made, **named), emails)


# Rewards


def rewards(spans: Iterable[Span]) -> tuple[list[Reward], list[str]]:
    """`(rewards, faults)`: the evaluations among the spans' events and attributes."""
    found: list[Reward] = []
    faults: list[str] = []
    for span in spans:
        for make in _evaluations(span):
            try:
                found.append(make())
            except BadInput as error:
                faults.append(error.message)
    return found, faults


def _evaluations(span: Span) -> Iterable[Callable[[], Reward]]:
    for event in span.events:
        if event.name == EVALUATION:
            yield partial(evaluation, replace(event, trace_id=span.trace_id, span_id=span.span_id))
    for scope, wrapper in _ANNOTATIONS:
        for item in _annotations(span, scope, wrapper):
            yield partial(_annotated, span, item, scope)


_ANNOTATIONS = tuple((f"{scope}{one}s", one) for scope in ("", "trace.") for one in ("annotation", "evaluation"))


def evaluation(event: Event) -> Reward:
    """A `gen_ai.evaluation.result` as a reward: of the response that it names, else of the span it belongs to.

    Raises BadInput that names the attribute. The same event again gives the same id.
    """
    given = event.attributes
    score = given.get("gen_ai.evaluation.score.value")
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise BadInput("gen_ai.evaluation.score.value: must be a number", param="gen_ai.evaluation.score.value")
    response = given.get("gen_ai.response.id")
    target = given.get("ratchet.reward.target_kind"), given.get("ratchet.reward.target_id")
    body = {
        "name": given.get("gen_ai.evaluation.name"),
        "value": float(score),
        "label": given.get("gen_ai.evaluation.score.label"),
        "explanation": given.get("gen_ai.evaluation.explanation"),
        "source": _source(given.get("ratchet.reward.source")),
    }
    if all(isinstance(one, str) for one in target):
        body[f"{target[0]}_id"] = target[1]
    else:
        body |= _target(response, event.span_id, event.trace_id)
    return _reward(body, event, given.get("ratchet.reward.id"))


def _target(response: Any, span_id: str | None, trace_id: str | None) -> dict[str, Any]:
    for name, value in (("response_id", response), ("span_id", span_id), ("trace_id", trace_id)):
        if isinstance(value, str) and value:
            return {name: value}
    raise BadInput("gen_ai.response.id: an evaluation needs it, or the ids of its span", param="gen_ai.response.id")


def _annotations(span: Span, scope: str, wrapper: str) -> list[dict[str, Any]]:
    tree = nested(span.attributes, scope)
    items = [one.get(wrapper) for one in tree if isinstance(one, dict)] if isinstance(tree, list) else []
    return [one for one in items if isinstance(one, dict) and "score" in one]


def _annotated(span: Span, item: Mapping[str, Any], scope: str) -> Reward:
    """OpenInference's flattened `annotations.{i}.annotation.name`, `.score`, `.label`, `.explanation`."""
    target = {"trace_id": span.trace_id} if scope.startswith("trace.") else {"span_id": span.span_id}
    kind = str(item.get("annotator_kind") or "").lower()
    body = {name: item.get(name) for name in ("name", "label", "explanation")}
    event = Event(scope, span.end_ns, dict(item), span.trace_id, span.span_id)
    return _reward({**body, "value": item.get("score"), "source": _source(kind), **target}, event, None)


def _source(value: Any) -> RewardSource:
    return next((source for source in SOURCES if source == value), "code")


def _reward(body: Mapping[str, Any], event: Event, ident: Any) -> Reward:
    """Checked by the rules of `POST /reward`; too long texts are cut, since nobody is there to be told."""
    short = {
        name: value[: LENGTHS[name]] if name in LENGTHS and isinstance(value, str) else value
        for name, value in body.items()
        if value not in (None, "")
    }
    (made,) = parse([short], event.ts_ns)
    if isinstance(ident, str) and 0 < len(ident) <= _LONGEST_NAME:
        return replace(made, reward_id=ident)
    said = orjson.dumps([event.trace_id, event.span_id, event.ts_ns, short], option=orjson.OPT_SORT_KEYS)
    return replace(made, reward_id=reward_id(hashlib.sha256(said).hexdigest()))
