"""An ordinary agent: reads tasks as JSON, one a line, and answers each with the name of a capital.

It knows nothing of Ratchet. The OpenAI SDK reads its base URL and key from OPENAI_BASE_URL and OPENAI_API_KEY;
OPENAI_MODEL and OPENAI_TEMPERATURE choose how it asks.
"""

import json
import os
import sys

from openai import OpenAI

client = OpenAI()
model = os.environ.get("OPENAI_MODEL", "gemma-3-270m")

for line in sys.stdin:
    country = json.loads(line)["country"]
    reply = client.chat.completions.create(
        model=model,
        temperature=float(os.environ.get("OPENAI_TEMPERATURE", "0")),
        max_tokens=16,
        messages=[
            {"role": "system", "content": "You are a geography helper."},
            {"role": "user", "content": f"Capital of {country}?"},
        ],
    )
    answer = (reply.choices[0].message.content or "").strip()
    print(answer.replace("\n", " "), flush=True)
