"""The prompt that a search starts from: the slot's live version, or the agent's own, read from its first call."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collector.client import Client
from collector.errors import BadInput, NotFound, RatchetError
from collector.template import invert, render
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


async def find(client: Client, runner: Runner, slots: Sequence[str], tasks: Sequence[Task]) -> dict[str, Origin]:
    """The version of each slot that is dealt most. For unknown slots the agent runs unpinned and its prompts are
    adopted, in the order in which it first uses them.

    Raises BadInput for a slot that holds adapters, a prompt that cannot be told from the task's own text, or another
    number of prompts than of unknown slots; RatchetError where the agent makes no call.
    """
    found = {slot: await live(client, slot) for slot in slots}
    unknown = [slot for slot, origin in found.items() if origin is None]
    templates = (
        await _observe(client, runner, tasks, [origin for origin in found.values() if origin]) if unknown else []
    )
    if len(slots) > 1 and len(templates) != len(unknown):
        raise BadInput(
            f"the agent uses {len(templates)} prompts that no slot knows, but {len(unknown)} of the slots are new "
            f"({', '.join(unknown)}): name one slot a prompt, in the order of their first calls",
            param="slot",
        )
    for slot, template in zip(unknown, templates, strict=False):
        found[slot] = await _adopt(client, slot, template)
    return {slot: origin for slot, origin in found.items() if origin is not None}


async def _adopt(client: Client, slot: str, template: str) -> Origin:
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


async def _observe(client: Client, runner: Runner, tasks: Sequence[Task], known: Sequence[Origin]) -> list[str]:
    """The templates behind the prompts of the agent's calls that none of `known` explains, in order of appearance."""
    chosen = list(tasks[:SAMPLES])
    rollouts = await runner.run_all([Plan(task) for task in chosen])
    seen: list[list[str]] = []
    for task, rollout in zip(chosen, rollouts, strict=True):
        try:
            steps = (await patiently(lambda at=rollout.episode_id: client.episode(at)))["steps"]  # type: ignore[misc]
        except NotFound:
            steps = []
        texts = [text for step in steps if (text := prompt_of(step["input_messages"])) is not None]
        if not texts:
            why = f"{rollout.reason}: {rollout.detail}" if rollout.reason else "it ended without one"
            raise RatchetError(f"the agent made no call with a prompt to learn from on task {task.id!r}; {why}")
        own = [text for text in texts if all(invert(origin.template, text) is None for origin in known)]
        seen.append(list(dict.fromkeys(own)))
    count = min(len(texts) for texts in seen)
    return [
        template_of([(task.data, texts[at]) for task, texts in zip(chosen, seen, strict=True)]) for at in range(count)
    ]


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
