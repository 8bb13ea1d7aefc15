"""What the agents share: the tool, the answer that they must come to, and how they say what they did."""

import json
import os

MODEL = os.environ.get("OPENAI_MODEL", "scripted")
QUESTION = "Weather in Paris, then Rome?"
ANSWER = "It is 18 degrees in Paris and 21 in Rome."
DEGREES = {"Paris": "18 degrees", "Rome": "21 degrees"}


def weather(city: str) -> str:
    """The weather in a city."""
    return DEGREES[city]


def case(name: str, calls: int | None, steps: int | None = None, episodes: int = 1) -> None:
    """One thing that works: the model calls that it took (None: as many as were made), the steps that were expected,
    and the episodes that they must make."""
    assert steps is None or calls is None or calls == steps, (name, calls, steps)
    print(json.dumps({"case": name, "calls": steps if calls is None else calls, "episodes": episodes}), flush=True)
