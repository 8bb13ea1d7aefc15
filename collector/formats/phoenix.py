"""Arize Phoenix: spans as its API lists them or as columns of its dataframe (attributes.llm..., context.span_id), and
span annotations. Attributes are OpenInference's, so they go the way of OTLP."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from collector import otel_in
from collector.errors import BadInput
from collector.formats.bundle import Bundle, ident, nanoseconds, span_in
from collector.formats.foreign import first, number, reward, times
from collector.otel_messages import parsed
from collector.otlp import Span

_DEEPEST = 16


def looks(found: Mapping[str, Any]) -> bool:
    """Whether a record is a span or an annotation of a span."""
    if "context.span_id" in found or (isinstance(found.get("context"), Mapping) and "span_id" in found["context"]):
        return True
    return "annotator_kind" in found and "span_id" in found


def read(found: Mapping[str, Any]) -> Bundle:
    """The rows of a record. Raises BadInput."""
    if "annotator_kind" in found:
        return _annotation(found)
    context = found.get("context")
    context = context if isinstance(context, Mapping) else {}
    trace = first(context, "trace_id") or first(found, "context.trace_id")
    span = first(context, "span_id") or first(found, "context.span_id")
    if trace is None or span is None:
        raise BadInput("context: needs trace_id and span_id")
    attributes = _attributes(found)
    kind = first(found, "span_kind")
    if kind is not None:
        attributes.setdefault("openinference.span.kind", str(kind))
    start, end = times(first(found, "start_time"), first(found, "end_time"))
    parent = first(found, "parent_id")
    made = otel_in.row(
        Span(
            trace_id=ident(trace, 32),
            span_id=ident(span, 16),
            parent_span_id=None if parent is None else ident(parent, 16),
            name=str(first(found, "name") or ""),
            start_ns=start,
            end_ns=end,
            attributes=attributes,
            events=[],
            failed=str(found.get("status_code") or "").upper() == "ERROR",
            message=str(found.get("status_message") or ""),
            resource={},
            scope="phoenix",
        )
    )
    columns = {one.name: getattr(made, one.name) for one in dataclasses.fields(made)}
    return Bundle([span_in({**columns, "source": "phoenix", "episode_source": "import", "route": "import"})], [])


def _attributes(found: Mapping[str, Any]) -> dict[str, Any]:
    """Flattened names, whether they came nested, flattened, or as columns of a table."""
    flat: dict[str, Any] = {}
    held = parsed(found.get("attributes"))
    if isinstance(held, Mapping):
        _flatten(held, "", flat, 0)
    for name, value in found.items():
        if name.startswith("attributes.") and value is not None:
            _flatten({name.removeprefix("attributes."): value}, "", flat, 0)
    return {name: value for name, value in flat.items() if value is not None}


def _flatten(value: Any, name: str, flat: dict[str, Any], depth: int) -> None:
    """Lists of objects become `{name}.{i}....`; other lists are values."""
    if isinstance(value, Mapping) and depth < _DEEPEST:
        for key, item in value.items():
            _flatten(item, f"{name}.{key}" if name else str(key), flat, depth + 1)
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value) and depth < _DEEPEST:
        for index, item in enumerate(value):
            _flatten(item, f"{name}.{index}", flat, depth + 1)
    else:
        flat[name] = value


def _annotation(found: Mapping[str, Any]) -> Bundle:
    result = parsed(found.get("result"))
    result = result if isinstance(result, Mapping) else found
    score = number(result.get("score"))
    if score is None:
        raise BadInput("result.score: an annotation without a number is no reward")
    return reward(
        found.get("annotator_kind"),
        "span",
        found["span_id"],
        value=score,
        name=str(first(found, "name", "annotation_name") or "reward"),
        label=first(result, "label"),
        explanation=first(result, "explanation"),
        ts_ns=nanoseconds(first(found, "updated_at", "created_at") or 0, "updated_at"),
        idempotency_key=None if found.get("id") is None else f"phoenix:{found['id']}"[:256],
    )
