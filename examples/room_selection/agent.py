"""An ordinary tool-using agent: books the meeting room that fits a request, by asking two tools.

It knows nothing of Ratchet. The OpenAI SDK reads its base URL and key from OPENAI_BASE_URL and OPENAI_API_KEY.
"""

import json
import os
import sys
from pathlib import Path

from openai import OpenAI

ROOMS = json.loads(Path(__file__).with_name("rooms.json").read_text())
MAX_STEPS = 6
PROMPT = "You book meeting rooms."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "list_rooms",
            "description": "All rooms with their seats, floor and equipment.",
            "parameters": {"type": "object", "properties": {}},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "is_free",
            "description": "Whether a room is free at an hour of a day.",
            "parameters": {
                "type": "object",
                "properties": {"room": {"type": "string"}, "day": {"type": "string"}, "hour": {"type": "integer"}},
                "required": ["room", "day", "hour"],
            },
        },
    },
]


def call(name: str, arguments: str) -> str:
    """What a tool answers; a mistake is told to the model, which may try again."""
    try:
        given = json.loads(arguments or "{}")
        if name == "list_rooms":
            return json.dumps([{key: value for key, value in room.items() if key != "busy"} for room in ROOMS])
        room = next(room for room in ROOMS if room["name"] == given["room"])
        return json.dumps([given["day"], given["hour"]] not in room["busy"])
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        return f"error: {type(error).__name__}: {error}"


def book(client: OpenAI, model: str, request: str) -> str:
    """The model's last word on the request."""
    messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": request}]
    for _ in range(MAX_STEPS):
        reply = client.chat.completions.create(model=model, temperature=0, messages=messages, tools=TOOLS)
        message = reply.choices[0].message
        if not message.tool_calls:
            return (message.content or "").strip()
        messages.append(message.model_dump(exclude_none=True))
        for one in message.tool_calls:
            content = call(one.function.name, one.function.arguments)
            messages.append({"role": "tool", "tool_call_id": one.id, "content": content})
    return ""


if __name__ == "__main__":
    task = json.loads(sys.stdin.readline())
    print(book(OpenAI(), os.environ.get("OPENAI_MODEL", "gpt-5-mini"), task["request"]).replace("\n", " "), flush=True)
