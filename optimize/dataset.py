"""Tasks: what an agent is run on. One JSON object a line, read whole, split by group."""

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from collector.errors import BadInput

UNTOLD = ("id", "group", "expected", "answer")  # fields for Ratchet and the grader, which no prompt is made of


@dataclass(frozen=True)
class Task:
    """One piece of work. `data` is the line as it was; tasks of one `group` never straddle a split."""

    id: str
    data: dict[str, Any]
    group: str

    @property
    def expected(self) -> Any:
        """What a right answer is: `expected`, else `answer`, else None. A list means any of its items."""
        return self.data.get("expected", self.data.get("answer"))

    @property
    def json(self) -> str:
        """The task as the agent gets it: one line of JSON."""
        return json.dumps(self.data, ensure_ascii=False)


T = TypeVar("T", bound=Task)


def make_task(data: dict[str, Any]) -> Task:
    """A task of its data: `id` is data["id"] or the first 12 hex digits of the canonical JSON's sha256."""
    identity = data.get("id")
    if identity is None:
        canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
        identity = hashlib.sha256(canonical.encode()).hexdigest()[:12]
    return Task(str(identity), data, str(data.get("group", identity)))


def load_tasks(path: str | Path) -> list[Task]:
    """The tasks of a JSONL file, in its order; blank lines are skipped.

    Raises BadInput where the file cannot be read, a line is no JSON object, an id comes twice, or there is no task.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the tasks {path}: {error}", param="tasks") from None
    tasks: list[Task] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        task = make_task(_object(path, number, line))
        if task.id in seen:
            raise BadInput(f"{path}, line {number}: the id {task.id!r} was used in line {seen[task.id]}", param="tasks")
        seen[task.id] = number
        tasks.append(task)
    if not tasks:
        raise BadInput(f"{path} holds no task: one JSON object a line is expected", param="tasks")
    return tasks


def _object(path: str | Path, number: int, line: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}, line {number} is not JSON: {error.msg}", param="tasks") from None
    if not isinstance(data, dict):
        raise BadInput(f"{path}, line {number} must be a JSON object, not {type(data).__name__}", param="tasks")
    return data


def split(tasks: Sequence[T], holdout: int | float, seed: int = 0) -> tuple[list[T], list[T]]:
    """`(search, held-out)`: whole groups are drawn, by `seed` and by the set of groups alone, until the held-out side
    has `holdout` tasks (an int) or that share of them (a float); both keep the order of `tasks`.

    The same tasks in another order are split alike. Raises BadInput where a side would be empty.
    """
    wanted = _wanted(len(tasks), holdout)
    sizes: dict[str, int] = {}
    for task in tasks:
        sizes[task.group] = sizes.get(task.group, 0) + 1
    groups = sorted(sizes)
    random.Random(f"ratchet-split-{seed}").shuffle(groups)  # noqa: S311  # a seeded draw, not a secret
    held: set[str] = set()
    count = 0
    for group in groups:
        if count >= wanted:
            break
        if count + sizes[group] < len(tasks):
            held.add(group)
            count += sizes[group]
    if not held:
        raise BadInput(f"{len(sizes)} group of tasks cannot be split: at least two are needed", param="tasks")
    search = [task for task in tasks if task.group not in held]
    return search, [task for task in tasks if task.group in held]


def _wanted(total: int, holdout: int | float) -> int:
    if isinstance(holdout, float):
        if not (math.isfinite(holdout) and 0 < holdout < 1):
            raise BadInput(f"a held-out share must lie between 0 and 1, not {holdout}", param="holdout")
        return max(1, min(total - 1, round(total * holdout)))
    if not 0 < holdout < total:
        raise BadInput(f"cannot hold out {holdout} of {total} tasks: some must stay for the search", param="holdout")
    return holdout
