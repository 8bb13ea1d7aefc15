"""openai for Python: every interface that agents use, sync and async, JSON and streamed."""

import asyncio
import base64
import json
from typing import Any

from _common import ANSWER, MODEL, case, weather
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

client = OpenAI()
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
FLAT: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": False}


class City(BaseModel):
    city: str
    degrees: int


def asking(text: str, system: str) -> list[Any]:
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def agent(messages: list[Any], stream: bool) -> tuple[str, int]:
    for calls in range(1, 9):
        if stream:
            with client.chat.completions.stream(model=MODEL, messages=messages, tools=[TOOL]) as events:
                reply = events.get_final_completion().choices[0].message
        else:
            reply = client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL]).choices[0].message
        if not reply.tool_calls:
            return reply.content or "", calls
        messages.append(reply)
        for call in reply.tool_calls:
            told = weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": told})
    raise AssertionError("no answer")


for stream in (False, True):
    answer, calls = agent(asking("Weather in Paris, then Rome?", f"You use the openai package. {stream}"), stream)
    assert answer == ANSWER
    case("agent, streamed" if stream else "agent", calls, steps=3)
answer, calls = agent(asking("Weather in both cities?", "You call in parallel."), False)
assert answer == ANSWER
case("parallel tool calls", calls, steps=2)

reply = client.chat.completions.create(model=MODEL, messages=asking("Hi", "n"), n=3, logprobs=True)
assert [choice.index for choice in reply.choices] == [0, 1, 2]
assert reply.choices[2].logprobs and reply.choices[2].logprobs.content[0].logprob == -0.25
case("n > 1, logprobs", 1)

parsed = client.chat.completions.parse(model=MODEL, messages=asking("Hi", "structured"), response_format=City)
assert parsed.choices[0].message.parsed == City(city="Paris", degrees=18)
case("structured outputs", 1)

url = "data:image/png;base64," + base64.b64encode(bytes(range(256)) * 400).decode()
image: Any = [{"type": "text", "text": "What is in this image?"}, {"type": "image_url", "image_url": {"url": url}}]
seen = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": image}])
assert seen.choices[0].message.content == "A picture."
case("images", 1)

options: Any = {"include_usage": True}
plain = list(client.chat.completions.create(model=MODEL, messages=asking("Hi", "plain"), stream=True))
assert all(chunk.choices and chunk.usage is None for chunk in plain)
told = list(
    client.chat.completions.create(model=MODEL, messages=asking("Hi", "told"), stream=True, stream_options=options)
)
assert told[-1].usage and told[-1].usage.total_tokens == 14
case("stream without and with usage", 2, episodes=2)

given: list[Any] = [{"role": "user", "content": "Weather in Paris, then Rome?"}]
calls = 0
while True:
    calls += 1
    response = client.responses.create(model=MODEL, instructions="You use Responses.", input=given, tools=[FLAT])
    wanted = [item for item in response.output if item.type == "function_call"]
    if not wanted:
        break
    given += response.output
    for item in wanted:
        output = weather(**json.loads(item.arguments))
        given.append({"type": "function_call_output", "call_id": item.call_id, "output": output})
assert response.output_text == ANSWER
case("Responses agent", calls, steps=3)
again = client.responses.create(model=MODEL, input="And now?", previous_response_id=response.id)
assert again.output_text == ANSWER
case("Responses, previous_response_id", 1, episodes=0)
with client.responses.stream(model=MODEL, input="Hello, streamed") as events:
    assert events.get_final_response().output_text == ANSWER
case("Responses, streamed", 1)
typed = client.responses.parse(model=MODEL, input="Hello, structured", text_format=City)
assert typed.output_parsed == City(city="Paris", degrees=18)
case("Responses, structured outputs", 1)

assert client.embeddings.create(model="e", input=["a", "b"]).data[1].embedding == [0.5, -1.0]
case("embeddings", 1)
assert client.models.list().data[0].id
case("models", 0, episodes=0)


async def at_once() -> None:
    async with AsyncOpenAI() as many:

        async def one(n: int) -> str:
            stream = await many.chat.completions.create(model=MODEL, messages=asking(f"q{n}", "async"), stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

        assert await asyncio.gather(*(one(n) for n in range(8))) == [ANSWER] * 8


asyncio.run(at_once())
case("async, 8 streams at once", 8, episodes=8)
