"""What training needs of an answer and an agent doesn't: token ids and logprobs are asked for, recorded, and hidden.

Asked of upstreams that know `return_token_ids` (vLLM >= 0.10.2, SGLang, `ratchet engine`), for models and slots marked
`train: true`. The client gets what it would have got: what it asked for itself is left where it is.
"""

from collections.abc import Container

import orjson

from proxy import members, sse
from proxy.dialects.base import Json, dicts
from proxy.record import Call, Hidden
from proxy.upstream import Target

_LOGPROBS = {"chat": True, "text_completion": 1}
_REFUSING = frozenset(("openai", "anthropic"))  # they answer an unknown field with an error


def wanted(call: Call, target: Target, slots: Container[str]) -> bool:
    """Whether this call is one to learn from: by its model's mark, or by that of a slot that it was served."""
    if target.params is not None or call.dialect.operation not in _LOGPROBS:
        return False
    marked = any(one.slot in slots for one in call.served) and target.provider not in _REFUSING
    return target.train or marked


def ask(raw: bytes, body: Json, operation: str) -> tuple[bytes, Hidden | None]:
    """The body with what is missing asked for, and what is to be hidden again; `body` is left as it is."""
    asked = dict(body)
    hidden = Hidden(body.get("return_token_ids") is not True, body.get("logprobs") is None or body["logprobs"] is False)
    if hidden.token_ids:
        raw = members.put(raw, asked, "return_token_ids", True)
    if hidden.logprobs:
        raw = members.put(raw, asked, "logprobs", _LOGPROBS[operation])
    return raw, hidden if any(hidden) else None


def hide(body: bytes, hidden: Hidden) -> bytes:
    """A JSON answer, or the data of one chunk, as it would have been. What is no JSON object stays as it is."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    if not isinstance(answer, dict) or not _take_out(answer, hidden):
        return body
    return orjson.dumps(answer)


def _take_out(answer: Json, hidden: Hidden) -> bool:
    """Whether anything was there to be taken out. `logprobs` is null, as it is where nobody asks."""
    held = False
    for holder in (answer, *dicts(answer.get("choices"))):
        if hidden.token_ids:
            for name in ("prompt_token_ids", "token_ids"):
                held = holder.pop(name, None) is not None or held
        if hidden.logprobs and holder.get("logprobs") is not None:
            holder["logprobs"], held = None, True
    return held


def hide_run(run: bytes, hidden: Hidden) -> bytes:
    """A run of whole events of a stream, each as it would have been; events without such fields keep their bytes."""
    if b"token_ids" not in run and b'"logprobs"' not in run:
        return run
    return b"".join(_hide_event(block, hidden) for block in sse.blocks(run))


def _hide_event(block: bytes, hidden: Hidden) -> bytes:
    event = sse.read(block)
    if event is None:
        return block
    data = hide(event.data, hidden)
    if data is event.data:
        return block
    return (b"event: " + event.name + b"\n" if event.name else b"") + b"data: " + data + b"\n\n"
