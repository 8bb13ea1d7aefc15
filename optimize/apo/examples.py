"""Demonstrations from the store: what the agent was asked and answered in episodes that earned the full reward.

Nothing of a held-out task may get into a prompt, so each episode is traced to its task, by its id where the runner made
it and by its words else, and those of held-out tasks are left out.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from collector.client import Client
from collector.template import invert
from optimize.apo.origin import prompt_of, text_of
from optimize.apo.proposers import Example
from optimize.dataset import UNTOLD, Task
from optimize.patience import patiently
from optimize.runner import task_part

# Episodes of one call, since the reward of several is not that call's alone. A constant: no query is made of text.
BEST = """
select s.episode_id, s.prompt_slot, s.input_messages, s.output_messages, e.reward
from spans_v s join episodes_v e using (episode_id)
where e.reward >= 0.999 and e.steps = 1 and s.status = 'ok' order by s.start_ns desc
"""
NEWEST = 1000
RUN_EPISODE = re.compile(r"run-[A-Za-z0-9]+-(.+)-\d+-[0-9a-f]{8}")


async def gather(
    client: Client, slot: str, template: str, search: Sequence[Task], held: Sequence[Task]
) -> list[Example]:
    """Examples of `slot`, or of calls whose prompt is `template`, newest first; none of a held-out task."""
    found = await patiently(lambda: client.query(BEST, limit=NEWEST))
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
    tracer = Tracer(search, held)
    examples = []
    for row in rows:
        inputs, outputs = _messages(row["input_messages"]), _messages(row["output_messages"])
        prompt = prompt_of(inputs)
        if row["prompt_slot"] != slot and (prompt is None or invert(template, prompt) is None):
            continue
        asked = text_of(next((m.get("content") for m in reversed(inputs) if m.get("role") == "user"), None))
        answer = text_of(outputs[0].get("content")) if outputs else None
        if not asked or not answer:
            continue
        task_id, allowed = tracer.trace(row["episode_id"], asked)
        if allowed:
            examples.append(Example(asked, answer.strip(), float(row["reward"]), task_id))
    return examples


def labelled(tasks: Sequence[Task]) -> list[Example]:
    """Examples out of the tasks themselves, where they say what a right answer is: for agents whose calls nobody saw.

    The input is the task's text where it has one field of text, else its JSON.
    """
    examples = []
    for task in tasks:
        told = {name: value for name, value in task.data.items() if name not in UNTOLD}
        texts = [value for value in told.values() if isinstance(value, str) and value.strip()]
        expected = task.expected[0] if isinstance(task.expected, list) and task.expected else task.expected
        if isinstance(expected, str | int | float) and told:
            asked = texts[0] if len(texts) == 1 else json.dumps(told, ensure_ascii=False)
            examples.append(Example(asked, str(expected), 1.0, task.id))
    return examples


def _messages(value: Any) -> list[Mapping[str, Any]]:
    messages = json.loads(value) if isinstance(value, str) else value
    return [message for message in messages or [] if isinstance(message, Mapping)]


class Tracer:
    """Tells which task an episode was about."""

    def __init__(self, search: Sequence[Task], held: Sequence[Task]) -> None:
        self._held = {task.id for task in held}
        tasks = [*search, *held]
        self._by_part = {task_part(task.id): task.id for task in tasks}
        counts = Counter(mark for task in tasks for mark in _marks(task))
        # Longest first: "Papua New Guinea" is told before "Guinea".
        marks = [(mark, task.id) for task in tasks for mark in _marks(task) if counts[mark] == 1]
        self._marks = sorted(marks, key=lambda pair: -len(pair[0]))

    def trace(self, episode_id: str, text: str) -> tuple[str | None, bool]:
        """`(task id, may be shown)`: None for no known task, which may be shown."""
        task_id = self._by_words(text.casefold())
        named = RUN_EPISODE.fullmatch(episode_id)
        if task_id is None and named is not None:
            task_id = self._by_part.get(named.group(1))
        return task_id, task_id not in self._held

    def _by_words(self, text: str) -> str | None:
        """The task whose own words are in the text; of equally long ones a held-out task, to be on the safe side."""
        best: tuple[int, str] | None = None
        for mark, task_id in self._marks:
            if best is not None and len(mark) < best[0]:
                break
            if mark in text and re.search(rf"(?<!\w){re.escape(mark)}(?!\w)", text):
                if task_id in self._held:
                    return task_id
                best = best or (len(mark), task_id)
        return None if best is None else best[1]


def _marks(task: Task) -> set[str]:
    return {
        value.strip().casefold()
        for name, value in task.data.items()
        if name not in UNTOLD and isinstance(value, str) and len(value.strip()) > 1
    }
