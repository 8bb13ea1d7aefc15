"""anthropic for Python: an agent in JSON and in SSE, and calls at once."""

import asyncio
from typing import Any

from _common import ANSWER, MODEL, QUESTION, case, weather
from anthropic import Anthropic, AsyncAnthropic

client = Anthropic()
SCHEMA: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [{"name": "weather", "description": "The weather in a city.", "input_schema": SCHEMA}]

for stream in (False, True):
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    asked: Any = {"model": MODEL, "max_tokens": 100, "system": f"You use anthropic. {stream}", "tools": TOOLS}
    calls = 0
    while True:
        calls += 1
        if stream:
            with client.messages.stream(**asked, messages=messages) as events:
                reply = events.get_final_message()
        else:
            reply = client.messages.create(**asked, messages=messages)
        messages.append({"role": "assistant", "content": reply.content})
        uses = [block for block in reply.content if block.type == "tool_use"]
        if not uses:
            break
        results = [{"type": "tool_result", "tool_use_id": use.id, "content": weather(**use.input)} for use in uses]
        messages.append({"role": "user", "content": results})
    assert reply.content[0].text == ANSWER
    case("agent, SSE" if stream else "agent, JSON", calls, steps=3)


async def at_once() -> None:
    async with AsyncAnthropic() as many:

        async def one(n: int) -> str:
            words: Any = [{"role": "user", "content": f"q{n}"}]
            reply = await many.messages.create(model=MODEL, max_tokens=9, messages=words)
            return reply.content[0].text

        assert await asyncio.gather(*(one(n) for n in range(4))) == [ANSWER] * 4


asyncio.run(at_once())
case("async, 4 at once", 4, episodes=4)
