"""Rewards of the room agent: `ratchet run --grader python:examples.room_selection.grader.grade`."""

import re
from typing import Any


def grade(task: dict[str, Any], answer: str) -> float:
    """1.0 for the name of a fitting room and nothing else, 0.5 where it stands among other words and no wrong room
    does, else 0. `expected` lists the fitting rooms, `rooms` all of them; an empty `expected` means "none"."""
    expected = task["expected"] or ["none"]
    if answer.strip().rstrip(".").casefold() in [name.casefold() for name in expected]:
        return 1.0
    named = {name for name in [*task["rooms"], "none"] if re.search(rf"\b{re.escape(name)}\b", answer, re.IGNORECASE)}
    return 0.5 if named and named <= set(expected) else 0.0
