"""What a step saw, as text that can be compared and hashed: its input without the accidents of one run."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collector.model import Step


@dataclass(frozen=True, slots=True)
class State:
    """A step's input before it was answered. Nothing here knows what came after."""

    step: int  # calls before this one
    role: str | None
    task: str  # the first user message, "" where there is none
    last: str  # the last message
    text: str  # all messages, one a line

    @property
    def digest(self) -> str:
        """16 hex digits: equal inputs to the same role have equal digests, whenever in the episode they came."""
        return digest(f"{self.role}\n{self.text}")


def observe(step: Step) -> State:
    """The state of a step: spaces collapsed, case folded, tool-call ids left out."""
    lines = [(str(message.get("role")), _message(message)) for message in step.input_messages]
    task = next((text for role, text in lines if role == "user"), "")
    text = "\n".join(f"{role}: {text}" for role, text in lines)
    return State(step.step, step.role, task, lines[-1][1] if lines else "", text)


def digest(text: str) -> str:
    """16 hex digits of a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _message(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls") or []
    parts = [_content(message.get("content")), *(_call(call) for call in calls)]
    return _normal(" ".join(part for part in parts if part))


def _content(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts: Sequence[Any] = content if isinstance(content, list) else [content]
    return " ".join(_part(part) for part in parts)


def _part(part: Any) -> str:
    """The text of a content part; anything else (an image, a file) by its digest."""
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    return part if isinstance(part, str) else f"[{digest(json.dumps(part, sort_keys=True, default=str))}]"


def _call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, dict) else {}
    return f"{function.get('name', '')}({function.get('arguments', '')})"


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
