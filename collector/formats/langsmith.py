"""LangSmith: runs (the API's, or a bulk export's), and feedback of runs. A run's feedback_stats count where no feedback
record of its own gives the same score."""

from collections.abc import Mapping
from typing import Any

from collector.errors import BadInput
from collector.formats.bundle import Bundle, nanoseconds
from collector.formats.foreign import OPERATIONS, executed, first, messages, number, reward, row, times, whole
from collector.otel_messages import parsed


def looks(found: Mapping[str, Any]) -> bool:
    """Whether a record is a run or feedback."""
    return "run_type" in found or ("run_id" in found and "key" in found and "score" in found)


def read(found: Mapping[str, Any]) -> Bundle:
    """The rows of a record. Raises BadInput."""
    if "run_type" not in found:
        return _feedback(found)
    ident = first(found, "id", "run_id")
    if ident is None or first(found, "start_time") is None:
        raise BadInput("a run needs id and start_time")
    bundle = Bundle([_run(found, ident)], [])
    stats = parsed(found.get("feedback_stats"))
    for key, one in (stats if isinstance(stats, Mapping) else {}).items():
        average = number(one.get("avg")) if isinstance(one, Mapping) else None
        if average is not None:
            when = first(found, "end_time", "start_time")
            bundle.add(_judged(ident, key, average, "code", when, f"langsmith:{ident}:{key}"))
    return bundle


def _run(found: Mapping[str, Any], ident: Any) -> dict[str, Any]:
    kind = str(found.get("run_type") or "chain").lower()
    call, name = kind in ("llm", "embedding"), first(found, "name")
    given, gave = parsed(found.get("inputs")), parsed(found.get("outputs"))
    if call:
        inputs, outputs = messages(given, "user"), messages(gave, "assistant")
    else:
        inputs, outputs = executed(name, given, gave) if kind == "tool" else ([], [])
    start, end = times(found["start_time"], found.get("end_time"))
    began = first(found, "first_token_time")
    error = first(found, "error")
    return row(
        "langsmith",
        first(found, "trace_id") or ident,
        ident,
        first(found, "parent_run_id") or _nearest(found),
        start_ns=start,
        end_ns=end,
        operation=OPERATIONS.get(kind, "span"),
        status="ok" if error is None else "error",
        error_type=None if error is None else str(error).strip().splitlines()[0][:256],
        ttft_ms=None if began is None else max(0, nanoseconds(began, "first_token_time") - start) / 1e6,
        finish_reason=outputs[0].get("finish_reason") if call and outputs else None,
        name=name,
        tool_name=name if kind == "tool" else None,
        input_messages=inputs or None,
        output_messages=outputs or None,
        attributes=_rest(found, call) or None,
        **(_call(found, gave) if call else {}),
    )


def _nearest(found: Mapping[str, Any]) -> Any:
    above = parsed(found.get("parent_run_ids"))
    return above[-1] if isinstance(above, list) and above else None


def _call(found: Mapping[str, Any], gave: Any) -> dict[str, Any]:
    extra = parsed(found.get("extra"))
    extra = extra if isinstance(extra, Mapping) else {}
    about, asked = extra.get("metadata") or {}, extra.get("invocation_params") or {}
    answered = gave.get("llm_output") if isinstance(gave, Mapping) else None
    usage = (answered or {}).get("token_usage") if isinstance(answered, Mapping) else None
    usage = usage or (gave.get("usage") if isinstance(gave, Mapping) else None) or {}
    model = first(about, "ls_model_name") or first(asked, "model", "model_name")
    return {
        "provider": first(about, "ls_provider"),
        "request_model": model,
        "response_model": (gave.get("model") if isinstance(gave, Mapping) else None) or model,
        "response_id": gave.get("id") if isinstance(gave, Mapping) and isinstance(gave.get("id"), str) else None,
        "temperature": number(first(about, "ls_temperature") or asked.get("temperature")),
        "max_tokens": whole(first(about, "ls_max_tokens") or asked.get("max_tokens")),
        "input_tokens": whole(first(found, "prompt_tokens") or usage.get("prompt_tokens")),
        "output_tokens": whole(first(found, "completion_tokens") or usage.get("completion_tokens")),
        "cost_usd": number(first(found, "total_cost")),
    }


def _rest(found: Mapping[str, Any], call: bool) -> dict[str, Any]:
    names = ("extra", "tags", "session_id", "session_name") + (() if call else ("inputs", "outputs"))
    return {name: parsed(found[name]) for name in names if found.get(name) not in (None, "", [], {})}


def _feedback(found: Mapping[str, Any]) -> Bundle:
    score = found["score"]
    value = float(score) if isinstance(score, bool) else number(score)
    if value is None:
        raise BadInput("score: feedback without a number is no reward")
    origin = (
        (found.get("feedback_source") or {}).get("type") if isinstance(found.get("feedback_source"), Mapping) else None
    )
    source = {"model": "llm", "app": "human"}.get(str(origin), "code")
    made = _judged(found["run_id"], found["key"], value, source, first(found, "created_at"), None)
    explanation = first(found, "comment")
    if explanation is not None:
        made.rewards[0]["explanation"] = str(explanation)
    return made


def _judged(run: Any, key: Any, value: float, source: str, when: Any, idempotency_key: str | None) -> Bundle:
    stamp = nanoseconds(when or 0, "created_at")
    fields = {"value": value, "name": str(key), "ts_ns": stamp, "idempotency_key": idempotency_key}
    return reward(source, "span", run, **fields)
