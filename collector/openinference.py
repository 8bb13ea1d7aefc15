"""A row's attributes by OpenInference's names, as Phoenix and its like show them. The way back is `otel_in`."""

from collections.abc import Mapping
from typing import Any

import orjson

from collector.model import CALLS
from collector.otel_messages import parsed, text

_KINDS = {
    "embeddings": "EMBEDDING",
    "execute_tool": "TOOL",
    "invoke_agent": "AGENT",
    "retrieval": "RETRIEVER",
    "rerank": "RERANKER",
    "guardrail": "GUARDRAIL",
    "evaluate": "EVALUATOR",
}
_COLUMNS = {
    "response_model": "llm.model_name",
    "provider": "llm.provider",
    "input_tokens": "llm.token_count.prompt",
    "output_tokens": "llm.token_count.completion",
    "cached_tokens": "llm.token_count.prompt_details.cache_read",
    "cost_usd": "llm.cost.total",
    "finish_reason": "llm.finish_reason",
    "episode_id": "session.id",
    "agent_name": "agent.name",
    "tool_name": "tool.name",
}
_PARAMETERS = ("temperature", "top_p", "max_tokens", "seed")


def attributes(row: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a span; what is not known is left out."""
    operation = row.get("operation") or "chat"
    call = operation in CALLS
    found: dict[str, Any] = {"openinference.span.kind": _KINDS.get(operation, "LLM" if call else "CHAIN")}
    found |= {name: row[column] for column, name in _COLUMNS.items() if row.get(column) is not None}
    if row.get("response_model") is None and row.get("request_model") is not None:
        found["llm.model_name"] = row["request_model"]
    if row.get("input_tokens") is not None and row.get("output_tokens") is not None:
        found["llm.token_count.total"] = row["input_tokens"] + row["output_tokens"]
    parameters = {name: row[name] for name in _PARAMETERS if row.get(name) is not None}
    if parameters:
        found["llm.invocation_parameters"] = orjson.dumps(parameters).decode()
    for column, way in (("input_messages", "input"), ("output_messages", "output")):
        if row.get(column) is not None:
            found |= _spoken(row[column], way, call)
    return found


def _spoken(payload: str, way: str, call: bool) -> dict[str, Any]:
    """Messages flattened, and as one value, which is what a list of spans shows."""
    messages = parsed(payload)
    found: dict[str, Any] = {}
    listed = [one for one in messages if isinstance(one, Mapping)] if isinstance(messages, list) else []
    if call:
        for index, message in enumerate(listed):
            found |= _message(message, f"llm.{way}_messages.{index}.message")
    last = listed[-1].get("content") if listed else None
    shown = last if isinstance(last, str) and last else payload
    return found | {f"{way}.value": shown, f"{way}.mime_type": "text/plain" if shown is last else "application/json"}


def _message(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = {f"{name}.role": str(message.get("role") or "user")}
    content = message.get("content")
    if isinstance(content, str):
        found[f"{name}.content"] = content
    elif content is not None:
        found |= _parts(content, name)
    if message.get("tool_call_id"):
        found[f"{name}.tool_call_id"] = str(message["tool_call_id"])
    for index, call in enumerate(message.get("tool_calls") or ()):
        if isinstance(call, Mapping):
            found |= _tool_call(call, f"{name}.tool_calls.{index}.tool_call")
    return found


def _parts(content: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for index, part in enumerate(content if isinstance(content, list) else [content]):
        where = f"{name}.contents.{index}.message_content"
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            found |= {f"{where}.type": "text", f"{where}.text": part["text"]}
        else:
            found |= {f"{where}.type": "text", f"{where}.text": text(part)}
    return found


def _tool_call(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    function = call.get("function")
    function = function if isinstance(function, Mapping) else {}
    found = {f"{name}.function.name": str(function.get("name") or "")}
    found[f"{name}.function.arguments"] = text(function.get("arguments", "{}"))
    return found | ({f"{name}.id": str(call["id"])} if call.get("id") else {})
