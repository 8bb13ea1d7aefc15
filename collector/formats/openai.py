"""Plain OpenAI logs: request and answer on a line, under the names that people give them; stored completions; batch
output; and fine-tuning files, whose last message is the answer."""

from collections.abc import Mapping
from typing import Any

from collector.errors import BadInput
from collector.formats.bundle import Bundle, nanoseconds
from collector.formats.foreign import first, line_id, messages, number, row, whole
from collector.otel_messages import parsed

_REQUESTS, _ANSWERS = ("request", "input", "body", "prompt"), ("response", "output", "completion", "answer")


def looks(found: Mapping[str, Any]) -> bool:
    """Whether a record holds a request with its answer, a completion, or a conversation."""
    if isinstance(found.get("messages"), list) or str(found.get("object", "")).startswith(
        ("chat.completion", "response")
    ):
        return True
    return (first(found, *_REQUESTS) is not None and first(found, *_ANSWERS) is not None) or "custom_id" in found


def read(found: Mapping[str, Any], seen: dict[str, int], now_ns: int) -> Bundle:
    """The row of a line. `seen` tells equal lines apart; `now_ns` stands in for a time that the line lacks."""
    request, answer = _pair(found)
    given = messages(request.get("messages", request.get("input", request.get("prompt"))), "user")
    gave = _answer(answer)
    if isinstance(request.get("instructions"), str):
        given = [{"role": "system", "content": request["instructions"]}, *given]
    if not given and not gave:
        raise BadInput("messages: holds neither a request nor an answer")
    usage = parsed(answer.get("usage"))
    usage = usage if isinstance(usage, Mapping) else {}
    error = first(answer, "error") or first(found, "error")
    when = first(found, "timestamp", "created_at", "time", "start_time") or first(answer, "created", "created_at")
    start = now_ns if when is None else nanoseconds(when, "timestamp")
    ident = line_id(found, seen, 16)
    episode = _episode(found, request)
    trace = first(found, "trace_id") or episode or f"import-{ident}"
    seconds = number(first(found, "latency", "duration", "seconds"))
    made = row(
        "openai",
        trace,
        ident,
        None,
        episode_id=str(episode or trace),
        start_ns=start,
        end_ns=start + int((seconds or 0.0) * 1e9),
        operation="responses" if answer.get("object") == "response" or "instructions" in request else "chat",
        status="ok" if error is None else "error",
        error_type=None if error is None else _reason(error),
        request_model=first(request, "model") or first(answer, "model"),
        response_model=first(answer, "model"),
        response_id=first(answer, "id") if isinstance(first(answer, "id"), str) else None,
        finish_reason=gave[0].get("finish_reason") if gave else None,
        stream=request.get("stream") is True,
        temperature=number(request.get("temperature")),
        top_p=number(request.get("top_p")),
        max_tokens=whole(first(request, "max_completion_tokens", "max_output_tokens", "max_tokens")),
        seed=whole(request.get("seed")),
        input_tokens=whole(first(usage, "prompt_tokens", "input_tokens")),
        output_tokens=whole(first(usage, "completion_tokens", "output_tokens")),
        input_messages=given or None,
        output_messages=gave or None,
        tools=request.get("tools") or None,
        attributes={"metadata": request["metadata"]} if request.get("metadata") else None,
    )
    return Bundle([made], [])


def _pair(found: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    request, answer = parsed(first(found, *_REQUESTS)), parsed(first(found, *_ANSWERS))
    if isinstance(answer, Mapping) and isinstance(answer.get("body"), Mapping):  # batch output, and HTTP logs
        answer = answer["body"]
    if isinstance(request, Mapping) and isinstance(request.get("body"), Mapping):
        request = request["body"]
    if request is None and answer is None:
        return _alone(found)
    asked = request if isinstance(request, Mapping) else {"messages": request}
    return asked, answer if isinstance(answer, Mapping) else {
        "choices": [{"message": {"role": "assistant", "content": answer}}]
    }


def _alone(found: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """A stored completion, or a conversation whose last message answers."""
    held = found.get("messages")
    if isinstance(found.get("choices"), list):
        return {**found, "messages": held or []}, found
    if not isinstance(held, list) or not held:
        raise BadInput("messages: holds neither a request nor an answer")
    last = held[-1]
    answers = isinstance(last, Mapping) and last.get("role") == "assistant"
    return {**found, "messages": held[:-1] if answers else held}, {"choices": [{"message": last}] if answers else []}


def _answer(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One message a choice; of the Responses API, its output items' text and calls."""
    if isinstance(answer.get("choices"), list):
        return messages(answer["choices"], "assistant")
    items = answer.get("output")
    if isinstance(items, str):
        return [{"role": "assistant", "content": items}]
    if not isinstance(items, list):
        return messages(answer, "assistant") if {"role", "content"} <= set(answer) else []
    parts = [part for item in items if isinstance(item, Mapping) for part in item.get("content") or ()]
    said = "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
    calls = [
        {
            "id": item.get("call_id"),
            "type": "function",
            "function": {"name": item.get("name"), "arguments": item.get("arguments")},
        }
        for item in items
        if isinstance(item, Mapping) and item.get("type") == "function_call"
    ]
    return [{"role": "assistant", "content": said or None, **({"tool_calls": calls} if calls else {})}]


def _episode(found: Mapping[str, Any], request: Mapping[str, Any]) -> Any:
    about = request.get("metadata")
    inner = first(about, "episode_id", "session_id", "conversation_id") if isinstance(about, Mapping) else None
    return first(found, "episode_id", "session_id", "conversation_id") or inner


def _reason(error: Any) -> str:
    if isinstance(error, Mapping):
        error = first(error, "code", "type", "message") or "error"
    return str(error)[:256]
