"""An ordinary agent of two roles: a planner lists what a note must say, a writer writes it.

It knows nothing of Ratchet. The OpenAI SDK reads its base URL and key from OPENAI_BASE_URL and OPENAI_API_KEY.
"""

import json
import os
import sys

from openai import OpenAI

PLANNER = "You plan short product notes."
WRITER = "You write short product notes from a plan."


def ask(client: OpenAI, model: str, prompt: str, text: str) -> str:
    """One call of one role."""
    messages = [{"role": "system", "content": prompt}, {"role": "user", "content": text}]
    reply = client.chat.completions.create(model=model, temperature=0, max_tokens=200, messages=messages)
    return (reply.choices[0].message.content or "").strip()


if __name__ == "__main__":
    task = json.loads(sys.stdin.readline())
    client, model = OpenAI(), os.environ.get("OPENAI_MODEL", "gpt-5-mini")
    plan = ask(client, model, PLANNER, f"Product: {task['product']}. Facts: {'; '.join(task['facts'])}.")
    note = ask(client, model, WRITER, f"Plan:\n{plan}\n\nWrite the note about {task['product']}.")
    print(note.replace("\n", " "), flush=True)
