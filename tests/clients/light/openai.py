"""As much of the OpenAI SDK as the examples' agents use, without its second of imports.

For tests of what is around an agent; the SDK itself is driven in tests/contract/test_clients.py and tests/clients.
"""

import json
import os
from types import SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen


def _create(**body: Any) -> Any:
    headers = {"content-type": "application/json", "authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
    url = f"{os.environ['OPENAI_BASE_URL']}/chat/completions"
    with urlopen(Request(url, json.dumps(body).encode(), headers), timeout=60) as answer:
        return json.load(answer, object_hook=lambda fields: SimpleNamespace(**fields))


class OpenAI:
    """A client of the URL and the key that the environment names."""

    def __init__(self) -> None:
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=_create))
