"""What the readers of other products' exports share: a call of theirs as a row of ours."""

from collections.abc import Mapping, Sequence
from typing import Any

from collector.formats.bundle import Bundle, digest, ident, nanoseconds, reward_in, span_in
from collector.otel_messages import of_parts, parsed, text

OPERATIONS = {
    "generation": "chat",
    "llm": "chat",
    "chat": "chat",
    "completion": "text_completion",
    "embedding": "embeddings",
    "tool": "execute_tool",
    "agent": "invoke_agent",
    "chain": "chain",
    "retriever": "retrieval",
    "guardrail": "guardrail",
    "evaluator": "evaluate",
    "prompt": "prompt",
}
_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "function"}


def first(found: Mapping[str, Any], *names: str) -> Any:
    """The value of the first name that has one."""
    return next((found[name] for name in names if found.get(name) not in (None, "")), None)


def whole(value: Any) -> int | None:
    """A count, None for what is none."""
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) and value == value else None


def number(value: Any) -> float | None:
    """A number, None for what is none; a decimal as text is one."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def times(start: Any, end: Any) -> tuple[int, int]:
    """Start and end in nanoseconds; without an end, the start again."""
    began = nanoseconds(start, "start time")
    return began, max(began, nanoseconds(end, "end time")) if end not in (None, "") else began


def row(source: str, trace: Any, span: Any, parent: Any, **columns: Any) -> dict[str, Any]:
    """A span of another product: its ids as ours, its trace an episode unless `episode_id` says otherwise."""
    given = {
        "span_id": ident(span, 16),
        "trace_id": ident(trace, 32),
        "parent_span_id": None if parent in (None, "") else ident(parent, 16),
        "episode_id": str(trace),
        "source": source,
        "status": "ok",
        **columns,
    }
    return span_in(given)


def reward(source: Any, kind: str, target: Any, **fields: Any) -> Bundle:
    """A judgement of another product."""
    who = str(source or "").lower()
    judged = {"human": "human", "annotation": "human", "llm": "llm", "eval": "llm", "model": "llm"}.get(who, "code")
    size = 32 if kind == "trace" else 16
    return Bundle([], [reward_in({"target_kind": kind, "target_id": ident(target, size), "source": judged, **fields})])


def messages(value: Any, role: str) -> list[dict[str, Any]]:
    """Whatever a product keeps as a call's input or output, as OpenAI's messages."""
    value = parsed(value)
    if value is None:
        return []
    if isinstance(value, Mapping):
        inner = _inner(value)
        if inner is not None:
            return messages(inner, role)
        return [_message(value, role)]
    if isinstance(value, list):
        flat = [item for one in value for item in (one if isinstance(one, list) else [one])]
        return [_message(item, role) for item in flat]
    return [{"role": role, "content": text(value)}]


def _inner(value: Mapping[str, Any]) -> Any:
    """What holds the messages inside a request or an answer."""
    for name in ("messages", "generations", "choices"):
        if isinstance(value.get(name), list):
            return value[name]
    held = value.get("input") if "role" not in value else None
    return held if isinstance(held, str | list) and held else None


def _message(item: Any, role: str) -> dict[str, Any]:
    """One message: OpenAI's, of a choice, LangChain's serialised one, OTel's parts, or bare text."""
    if not isinstance(item, Mapping):
        return {"role": role, "content": text(item)}
    if isinstance(item.get("message"), Mapping):
        reason = item.get("finish_reason") or (item.get("generation_info") or {}).get("finish_reason")
        return _message(item["message"], role) | ({"finish_reason": reason} if reason else {})
    if isinstance(item.get("kwargs"), Mapping):
        return _langchain(item, role)
    if isinstance(item.get("parts"), list):
        return of_parts([item], role)[0]
    if "role" in item:
        return dict(item)
    if "type" in item and item["type"] in _ROLES and "content" in item:
        return _langchain({"kwargs": item}, role)
    content = first(item, "content", "text", "output", "answer")
    return {"role": role, "content": text(dict(item) if content is None else content)}


def _langchain(item: Mapping[str, Any], role: str) -> dict[str, Any]:
    """{"id": [..., "HumanMessage"], "kwargs": {"content", "type", "tool_calls", "additional_kwargs"}}."""
    kwargs = item["kwargs"]
    path = item.get("id")
    kind = kwargs.get("type") or (str(path[-1]).removesuffix("Chunk").removesuffix("Message").lower() if path else None)
    found: dict[str, Any] = {"role": _ROLES.get(str(kind), role), "content": kwargs.get("content")}
    calls = (kwargs.get("additional_kwargs") or {}).get("tool_calls") or _tool_calls(kwargs.get("tool_calls") or ())
    if calls:
        found["tool_calls"] = calls
    if kwargs.get("tool_call_id"):
        found["tool_call_id"] = kwargs["tool_call_id"]
    return found


def _tool_calls(calls: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {
            "id": call.get("id"),
            "type": "function",
            "function": {"name": call.get("name"), "arguments": text(call.get("args", {}))},
        }
        for call in calls
        if isinstance(call, Mapping)
    ]


def executed(name: str | None, given: Any, result: Any, call: Any = None) -> tuple[list[Any], list[Any]]:
    """A tool's run as the messages around it."""
    function = {"name": name, "arguments": "" if given is None else text(parsed(given))}
    ask = {"role": "assistant", "tool_calls": [{"id": call, "type": "function", "function": function}]}
    return [ask], [] if result is None else [{"role": "tool", "tool_call_id": call, "content": text(parsed(result))}]


def line_id(record: Any, seen: dict[str, int], size: int) -> str:
    """An id for a record without one: its content's, and which of several equal ones it is. `seen` counts them."""
    content = digest(record, 64)
    seen[content] = seen.get(content, -1) + 1
    return digest([content, seen[content]], size)
