"""What a resumed search needs to arrive where it was: its paid rollouts as rows, and its proposals."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optimize.apo.engine import Row
from optimize.apo.parts import Part
from optimize.apo.proposers import Proposer, State
from optimize.dataset import Task
from optimize.evaluate import feedback, tokens


class ProposalLog:
    """A proposer that writes down what it proposed, so that a resumed search proposes the same and asks nobody."""

    def __init__(self, inner: Proposer, path: Path) -> None:
        self._inner = inner
        self._path = path
        self.earlier: list[list[Part]] = []
        if path.is_file():
            whole, _, _torn = path.read_text().rpartition("\n")
            self.earlier = [[part_of(fields) for fields in json.loads(line)] for line in whole.splitlines()]
            path.write_text(whole + "\n" if whole else "")

    async def propose(self, state: State) -> list[Part]:
        """What the inner proposer says, once it is written down."""
        parts = await self._inner.propose(state)
        await asyncio.to_thread(self._append, json.dumps([asdict(part) for part in parts]) + "\n")
        return parts

    def _append(self, line: str) -> None:
        with self._path.open("a") as file:
            file.write(line)


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
