"""Traffic of agents, made up: episodes of three to nine calls that send their history again each time,
about 6 KB a call.
"""

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import orjson

from collector.model import Exchange

_START_NS = 1_760_000_000_000_000_000
_CONCURRENT = 16


@cache
def _words() -> tuple[str, ...]:
    """A vocabulary: the words of this project's own pages."""
    root = Path(__file__).parents[2]
    return tuple(
        sorted({word for name in ("README.md", "ARCHITECTURE.md") for word in (root / name).read_text().split()})
    )


def text(rng: random.Random, size: int) -> str:
    """About `size` characters that compress about as prose does."""
    words: list[str] = []
    length = 0
    while length < size:
        # Rare and common words, and a number now and then: text that compresses about as prose does.
        at = int(len(_words()) * rng.random() ** 2)
        word = _words()[at] if rng.random() > 0.1 else str(rng.randrange(100_000))
        words.append(word)
        length += len(word) + 1
    return " ".join(words)


@cache
def _tools() -> str:
    """The definitions of a few tools, the same in every call, as agents send them."""
    rng = random.Random(7)
    tools = [
        {
            "type": "function",
            "function": {
                "name": f"tool_{number}",
                "description": text(rng, 150),
                "parameters": {
                    "type": "object",
                    "properties": {"query": {"type": "string", "description": text(rng, 80)}},
                },
            },
        }
        for number in range(4)
    ]
    return orjson.dumps(tools).decode()


class _Episode:
    def __init__(self, rng: random.Random, number: int) -> None:
        self.id = f"ep-{rng.getrandbits(48):012x}"
        self.trace = f"{rng.getrandbits(128):032x}"
        self.number = number
        self.left = rng.randint(3, 9)
        self.messages = [{"role": "system", "content": text(rng, 1000)}]

    def call(self, rng: random.Random, at_ns: int) -> Exchange:
        self.left -= 1
        self.messages.append({"role": "user", "content": text(rng, rng.randint(200, 1000))})
        answer = {"role": "assistant", "content": text(rng, rng.randint(100, 600)), "finish_reason": "stop"}
        sent = orjson.dumps(self.messages).decode()
        self.messages.append(answer)
        return Exchange(
            span_id=f"{rng.getrandbits(64):016x}",
            trace_id=self.trace,
            episode_id=self.id,
            episode_source="chain",
            start_ns=at_ns,
            end_ns=at_ns + rng.randint(200, 3000) * 1_000_000,
            operation="chat",
            route="/v1/chat/completions",
            status="ok" if rng.random() > 0.02 else "error",
            http_status=200,
            ttft_ms=rng.random() * 500,
            provider="openai",
            request_model="gpt-5-mini",
            response_model="gpt-5-mini-2025-08-07",
            response_id=f"chatcmpl-{rng.getrandbits(96):024x}",
            finish_reason="stop",
            temperature=0.7,
            input_tokens=len(sent) // 4,
            output_tokens=len(str(answer["content"])) // 4,
            prompt_slot="agent",
            prompt_version=1 + self.number % 3,
            propensity=1.0,
            request_bytes=len(sent) + 120,
            response_bytes=len(str(answer["content"])) + 400,
            input_messages=sent,
            output_messages=orjson.dumps([answer]).decode(),
            tools=_tools(),
        )


def calls(count: int, seed: int = 1) -> Iterator[Exchange]:
    """`count` calls of episodes that run side by side, in the order of their time."""
    rng = random.Random(seed)
    live: list[_Episode] = []
    begun = 0
    for number in range(count):
        while len(live) < _CONCURRENT:
            live.append(_Episode(rng, begun))
            begun += 1
        episode = rng.choice(live)
        yield episode.call(rng, _START_NS + number * 40_000_000)
        if not episode.left:
            live.remove(episode)
