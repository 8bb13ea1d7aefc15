"""Rewards of the capital city agent: `ratchet run --grader python:examples.capital_city.grader.grade`."""

import re
from typing import Any


def grade(task: dict[str, Any], answer: str) -> float:
    """1.0 for exactly the name (white space around it apart, letter case counts), 0.3 for an answer that has the name
    among other words or in another case, else 0."""
    expected = task["expected"] if isinstance(task["expected"], list) else [task["expected"]]
    if answer.strip() in expected:
        return 1.0
    found = any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", answer, re.IGNORECASE) for name in expected)
    return 0.3 if found else 0.0
