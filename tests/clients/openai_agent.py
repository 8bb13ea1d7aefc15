"""An agent as people write it with the openai package: one tool, two model calls, the second streamed."""

import json
import os

from openai import OpenAI

client = OpenAI()
model = os.environ.get("OPENAI_MODEL", "scripted")
messages: list = [
    {"role": "system", "content": "You are a weather helper."},
    {"role": "user", "content": "Weather in Paris?"},
]
parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
tools: list = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
reply = client.chat.completions.create(model=model, messages=messages, tools=tools).choices[0].message
messages.append(reply)
for call in reply.tool_calls or []:
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "18 degrees"})
answer = ""
for chunk in client.chat.completions.create(model=model, messages=messages, tools=tools, stream=True):
    if chunk.choices and chunk.choices[0].delta.content:
        answer += chunk.choices[0].delta.content
print(answer)
