"""What a resumed search needs to arrive where it was: its paid rollouts as rows, its proposals, its model's replies."""

import asyncio
import hashlib
import json
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optimize.apo.engine import Row
from optimize.apo.parts import Part
from optimize.apo.proposers import Proposer, State
from optimize.budget import Budget
from optimize.dataset import Task
from optimize.evaluate import feedback, tokens
from optimize.llm import Ask, ModelError


class ProposalLog:
    """A proposer that writes down what it proposed, so that a resumed search proposes the same and asks nobody."""

    def __init__(self, inner: Proposer, path: Path) -> None:
        self._inner = inner
        self._path = path
        self.earlier: list[list[Part]] = [[part_of(fields) for fields in line] for line in _whole_lines(path)]

    async def propose(self, state: State) -> list[Part]:
        """What the inner proposer says, once it is written down."""
        parts = await self._inner.propose(state)
        await asyncio.to_thread(_append, self._path, [asdict(part) for part in parts])
        return parts


class ReplyLog:
    """The optimizer's model behind a log: a question that was answered before a break is not asked again.

    Each call is within `budget`, and settled with it, those before the break too. Raises ModelError where the model
    gives no answer or the budget leaves none.
    """

    def __init__(self, ask: Ask, path: Path, budget: Budget) -> None:
        self._ask = ask
        self._path = path
        self._budget = budget
        self._earlier: dict[str, deque[str]] = {}
        for line in _whole_lines(path):
            self._earlier.setdefault(line["question"], deque()).append(line["text"])
            budget.settle_call(line["tokens"], line["cost_usd"])

    async def complete(self, messages: list[dict[str, str]]) -> str:
        """The reply's text, once it is written down."""
        question = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:24]
        if known := self._earlier.get(question):
            return known.popleft()
        if not self._budget.affords_call():
            raise ModelError("the budget leaves nothing for a further call of the optimizer's model")
        reply = await self._ask(messages)
        self._budget.settle_call(reply.tokens, reply.cost_usd)
        await asyncio.to_thread(_append, self._path, {"question": question, **asdict(reply)})
        return reply.text


def _whole_lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines; a torn last line is cut off."""
    if not path.is_file():
        return []
    whole, _, _torn = path.read_text().rpartition("\n")
    path.write_text(whole + "\n" if whole else "")
    return [json.loads(line) for line in whole.splitlines()]


def _append(path: Path, value: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def part_of(fields: Mapping[str, Any]) -> Part:
    """A part of its JSON fields."""
    lists = {name: tuple(fields[name]) for name in ("cites", "tasks")}
    return Part(**{**fields, **lists})


def row_of(event: Mapping[str, Any], task: Task) -> Row:
    """The search's row of a journalled rollout."""
    subset = event["subset"]
    return Row(
        template_hash=event["version_hash"],
        task_id=event["task_id"],
        replicate=event["replicate"],
        subset=tuple(json.loads(subset) if isinstance(subset, str) else subset or ()),
        score=float(event["reward"]) if event["ok"] and event["reward"] is not None else 0.0,
        ok=event["ok"],
        reason=event["reason"],
        answer=event["answer"] or "",
        feedback=feedback(task, event["reason"]),
        tokens=tokens([event["input_tokens"], event["output_tokens"]]),
        seconds=float(event["seconds"] or 0.0),
        cost_usd=event.get("cost_usd"),
    )
