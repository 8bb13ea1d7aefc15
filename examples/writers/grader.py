"""Rewards of the writers: `ratchet run --grader python:examples.writers.grader.grade`."""

from typing import Any

WORDS = 60


def grade(task: dict[str, Any], answer: str) -> float:
    """The share of the facts' key words that the note has, halved where it is longer than 60 words, 0 where it does
    not name the product."""
    text = answer.casefold()
    if task["product"].casefold() not in text:
        return 0.0
    kept = sum(key.casefold() in text for key in task["keys"]) / len(task["keys"])
    return kept if len(answer.split()) <= WORDS else kept / 2
