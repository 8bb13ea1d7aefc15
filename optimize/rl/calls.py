"""Logged calls as training sees them: what the engine said of its tokens, read from the rows of `spans_v`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One recorded generation. Token ids and log-probabilities are the engine's own, None where it told none.

    `version` names the policy that answered: "slot@3" of an adapter slot, else the model's name. `sampled`: at
    temperature 1 from the whole distribution, so that `logprobs` are those of the policy that acted. `single`: the
    call had one choice, so it is known which one the agent went on with.
    """

    span_id: str
    episode_id: str
    step: int
    version: str
    ok: bool = True
    prompt_ids: tuple[int, ...] | None = None
    completion_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    messages: tuple[Message, ...] = ()
    answer: str | None = None
    sampled: bool = True
    single: bool = True
    finish: str | None = None


def read_call(row: Mapping[str, Any]) -> Call:
    """A call from a row of `spans_v`; what is missing or broken in it is None."""
    prompt, completion = _ids(row.get("token_ids"))
    logprobs = _logprobs(row.get("logprobs"))
    answers = _list(row.get("output_messages"))
    content = answers[0].get("content") if len(answers) == 1 else None
    return Call(
        span_id=str(row["span_id"]),
        episode_id=str(row["episode_id"]),
        step=int(row["step"]),
        version=_version(row),
        ok=row.get("status") == "ok",
        prompt_ids=prompt if completion else None,
        completion_ids=completion if prompt else None,
        logprobs=logprobs if completion is not None and logprobs and len(logprobs) == len(completion) else None,
        messages=tuple(_list(row.get("input_messages"))),
        answer=content if isinstance(content, str) else None,
        sampled=row.get("temperature") in (None, 1.0) and row.get("top_p") in (None, 1.0),
        single=len(answers) == 1,
        finish=row.get("finish_reason"),
    )


def _version(row: Mapping[str, Any]) -> str:
    if row.get("adapter_slot") and row.get("adapter_version") is not None:
        return f"{row['adapter_slot']}@{row['adapter_version']}"
    return str(row.get("response_model") or row.get("request_model") or "")


def _ids(text: Any) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """`{"prompt": [...], "completion": [[...]]}`; for text completions the prompt may stand once for each choice."""
    found = _json(text)
    if not isinstance(found, dict):
        return None, None
    completion = found.get("completion")
    first = completion[0] if isinstance(completion, list) and len(completion) == 1 else None
    return _whole(found.get("prompt")), _whole(first)


def _whole(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or not value:
        return None
    return tuple(value) if all(type(one) is int and one >= 0 for one in value) else None


def _logprobs(text: Any) -> tuple[float, ...] | None:
    """One entry a choice: the chat form `{"content": [{"logprob"}]}` or the text form `{"token_logprobs": [...]}`.

    A missing or non-finite number makes all of them unusable: a ratio must never silently be 1.
    """
    found = _json(text)
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], dict):
        return None
    values = found[0].get("token_logprobs")
    if values is None:
        content = found[0].get("content")
        told = content if isinstance(content, list) else []
        values = [one.get("logprob") if isinstance(one, dict) else None for one in told]
    if not isinstance(values, list) or not all(_is_logprob(value) for value in values):
        return None
    return tuple(float(value) for value in values)


def _is_logprob(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value <= 1e-4


def _list(text: Any) -> list[Message]:
    found = _json(text)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, Sequence) else []


def _json(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return None
