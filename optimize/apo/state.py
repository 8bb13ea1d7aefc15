"""What passes between a search and its proposers."""

from dataclasses import dataclass
from typing import Protocol

from optimize.apo.parts import Part
from optimize.dataset import Task


@dataclass(frozen=True)
class Failure:
    """A rollout worth learning from: what the agent answered, what the grader said, and the parts in its prompt."""

    task: Task
    answer: str
    feedback: str
    score: float
    subset: tuple[str, ...]  # part ids


@dataclass(frozen=True)
class State:
    """What a proposer sees. `failures` is empty when too few have gathered for a call that costs."""

    seed: str
    template: str  # the best prompt so far
    subset: tuple[str, ...]  # its part ids
    parts: tuple[Part, ...]  # all known
    failures: tuple[Failure, ...] = ()


class Proposer(Protocol):
    """Proposes parts. Called before the search and again as failures gather; an empty answer is fine."""

    async def propose(self, state: State) -> list[Part]:
        """New parts, or known ones (same text) again with further citations."""
        ...
