"""The requests and answers of the scenarios, as bytes: made once, so that neither side spends time on JSON."""

from dataclasses import dataclass
from typing import Any

import orjson

MODEL = "bench-model"
PROMPT = "You are a careful assistant. Answer in one word and do not explain."
IMPROVED = PROMPT + " Write proper names as the people who live there do."
PACED = "Answer slowly."  # in the user's message: asks the upstream for pauses, and survives every gateway
PAUSE = 0.002  # seconds between two content events of a paced stream
LONG = 6_000  # bytes of a long request, about

_REPLY_ID = "chatcmpl-Bq3V0xJ8yT2mZk5wRc7nLd1s"
_CREATED = 1_760_000_000
_WORDS = 20


@dataclass(frozen=True)
class Scenario:
    """One kind of load: `concurrency` connections, each asking again as soon as it was answered, for at most `seconds`
    and at most `calls` calls."""

    name: str
    title: str
    concurrency: int
    body: bytes
    stream: bool
    seconds: float
    calls: int


def request(user: str, *, stream: bool = False) -> bytes:
    """The body of a chat call as an agent sends it: its own system prompt, and the user's text."""
    messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": user}]
    body: dict[str, Any] = {"model": MODEL, "messages": messages, "temperature": 0.2}
    return orjson.dumps({**body, "stream": True} if stream else body)


def long_text(size: int = LONG) -> str:
    """Prose of about `size` characters, none of it repeated word for word, nor like a secret."""
    lines: list[str] = []
    total = 0
    while total < size:
        number = len(lines)
        lines.append(
            f"Note {number}: the river town number {number * 37 % 1009} lies {number * 13 % 97} km to the east."
        )
        total += len(lines[-1]) + 1
    return " ".join(lines)[:size]


def scenarios() -> tuple[Scenario, ...]:
    """What is measured, in this order within a round."""
    short = request("What is the capital of France?")
    streamed = request("What is the capital of France?", stream=True)
    paced = request(f"What is the capital of France? {PACED}", stream=True)
    return (
        Scenario("json_c1", "JSON, c=1", 1, short, False, 1.0, 2_000),
        Scenario("json_c16", "JSON, c=16", 16, short, False, 2.0, 12_000),
        Scenario("json_6kb", "JSON 6 KB, c=16", 16, request(long_text()), False, 2.0, 8_000),
        Scenario("sse_unpaced", "SSE, c=4", 4, streamed, True, 2.0, 4_000),
        Scenario("sse_paced", "SSE paced, c=16", 16, paced, True, 2.0, 2_000),
    )


def reply() -> bytes:
    """The JSON answer, about 420 bytes."""
    message: dict[str, Any] = {"role": "assistant", "content": "Paris", "refusal": None, "annotations": []}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    usage = {"prompt_tokens": 29, "completion_tokens": 3, "total_tokens": 32}
    return orjson.dumps(
        {
            "id": _REPLY_ID,
            "object": "chat.completion",
            "created": _CREATED,
            "model": MODEL,
            "choices": [choice],
            "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 0}},
            "service_tier": "default",
            "system_fingerprint": "fp_44709d6fcb",
        }
    )


def events(usage: bool) -> list[bytes]:
    """The stream: role, 20 words, the finish and `[DONE]`, 23 events; one more where its usage was asked for."""
    deltas: list[tuple[dict[str, Any], str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [({"content": f" word{number}"}, None) for number in range(_WORDS)]
    deltas += [({}, "stop")]
    made = [_chunk([{"index": 0, "delta": delta, "finish_reason": finish}]) for delta, finish in deltas]
    if usage:
        made.append(_chunk([], usage={"prompt_tokens": 29, "completion_tokens": 20, "total_tokens": 49}))
    return [*made, b"data: [DONE]\n\n"]


def _chunk(choices: list[Any], **more: Any) -> bytes:
    base = {"id": _REPLY_ID, "object": "chat.completion.chunk", "created": _CREATED, "model": MODEL}
    return b"data: " + orjson.dumps({**base, "choices": choices, **more}) + b"\n\n"
