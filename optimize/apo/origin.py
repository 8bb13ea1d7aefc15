"""The prompt that a search starts from: the slot's live version, or the agent's own, read from its first call."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collector.client import Client
from collector.errors import BadInput, NotFound, RatchetError
from collector.template import render
from optimize.dataset import UNTOLD, Task
from optimize.patience import patiently
from optimize.rollout import Plan
from optimize.runner import Runner

SAMPLES = 2  # runs of the agent that are compared to find what varies in its prompt


@dataclass(frozen=True)
class Origin:
    """The prompt to improve, and its version; `adopted` says that it was read from the agent just now."""

    template: str
    version: int
    adopted: bool


async def find(client: Client, runner: Runner, slot: str, tasks: Sequence[Task]) -> Origin:
    """The version of `slot` that is dealt most; for an unknown slot the agent runs unpinned and its prompt is adopted.

    Raises BadInput for a slot that holds adapters or a prompt that cannot be told from the task's own text,
    RatchetError where the agent makes no call.
    """
    known = await live(client, slot)
    if known is not None:
        return known
    template = await _observe(client, runner, tasks)
    note = "the agent's own prompt, read from its first call"
    added = await patiently(lambda: client.add_version(slot, kind="prompt", template=template, note=note))
    return Origin(template, added["version"], adopted=True)


async def live(client: Client, slot: str) -> Origin | None:
    """The version of `slot` that is dealt most, None for an unknown slot. Raises BadInput where it holds adapters."""
    try:
        versions = await patiently(lambda: client.versions(slot))
    except NotFound:
        return None
    if not versions:
        return None
    most = max(versions, key=lambda version: (version["live"], version["version"]))
    if most["kind"] != "prompt":
        raise BadInput(f"slot {slot} holds adapters, not prompts", param="slot")
    return Origin(most["template"], most["version"], adopted=False)


async def _observe(client: Client, runner: Runner, tasks: Sequence[Task]) -> str:
    chosen = list(tasks[:SAMPLES])
    rollouts = await runner.run_all([Plan(task) for task in chosen])
    seen: list[tuple[Mapping[str, Any], str]] = []
    for task, rollout in zip(chosen, rollouts, strict=True):
        try:
            steps = (await patiently(lambda at=rollout.episode_id: client.episode(at)))["steps"]  # type: ignore[misc]
        except NotFound:
            steps = []
        text = prompt_of(steps[0]["input_messages"]) if steps else None
        if text is None:
            why = f"{rollout.reason}: {rollout.detail}" if rollout.reason else "it ended without one"
            raise RatchetError(f"the agent made no call with a prompt to learn from on task {task.id!r}; {why}")
        seen.append((task.data, text))
    return template_of(seen)


def prompt_of(messages: Sequence[Mapping[str, Any]] | None) -> str | None:
    """The text of the system or developer message, else of the first user message; None where there is no text."""
    for roles in (("system", "developer"), ("user",)):
        for message in messages or ():
            if message.get("role") in roles:
                return text_of(message.get("content"))
    return None


def text_of(content: Any) -> str | None:
    """The text of a message's content, a string or a list of parts; None where it holds anything but text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    return None


def template_of(seen: Sequence[tuple[Mapping[str, Any], str]]) -> str:
    """The template behind prompts that an agent made of tasks: `(task data, text)` of each.

    The same text each time is the prompt itself. Else the task's own values become variables, and what comes out must
    render to every text. Raises BadInput where it does not.
    """
    if len({text for _, text in seen}) == 1:
        return seen[0][1]
    data, text = seen[0]
    names = {str(value): name for name, value in _values(data) if str(value) in text}
    if names:
        longest = sorted(names, key=len, reverse=True)
        template = re.sub("|".join(map(re.escape, longest)), lambda found: "{" + names[found.group(0)] + "}", text)
        if all(render(template, {name: str(value) for name, value in _values(data)}) == text for data, text in seen):
            return template
    raise BadInput(
        "the agent's prompt differs from task to task in more than the task's own values, so it cannot be told what of "
        "it to improve; register its template as the first version of the slot, then run this again",
        param="slot",
    )


def _values(data: Mapping[str, Any]) -> list[tuple[str, str | int | float]]:
    return [
        (name, value)
        for name, value in data.items()
        if name not in UNTOLD and name.isidentifier() and isinstance(value, str | int | float) and str(value).strip()
    ]
