"""Where parts come from: a bank of general instructions, the agent's own successes, a language model's edits."""

import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

from optimize.apo.editor import LLMEditor
from optimize.apo.parts import Part, make, words
from optimize.apo.state import Failure, Proposer, State

__all__ = [
    "BANK",
    "Bank",
    "Chain",
    "Demonstrations",
    "Example",
    "Examples",
    "Failure",
    "LLMEditor",
    "Proposer",
    "State",
]


class Chain:
    """Several proposers as one, in order."""

    def __init__(self, proposers: Sequence[Proposer]) -> None:
        self.proposers = tuple(proposers)

    async def propose(self, state: State) -> list[Part]:
        """What each of them proposes, one after the other."""
        return [part for proposer in self.proposers for part in await proposer.propose(state)]


# (text, group): members of a group are alternatives, and at most one of them is in a prompt.
BANK: tuple[tuple[str, str | None], ...] = (
    ("Output ONLY the answer, with no punctuation.", "bank: only"),
    ("Output ONLY the answer and nothing else.", "bank: only"),
    ("Answer with the name only.", "bank: only"),
    ("Answer with a single word or number.", "bank: only"),
    ("Answer in one line.", "bank: length"),
    ("Answer in as few words as possible.", "bank: length"),
    ("Answer in one short sentence.", "bank: length"),
    ("Do not explain your answer.", "bank: reasoning"),
    ("Think step by step, then give the final answer on the last line.", "bank: reasoning"),
    ("Do not repeat the question.", None),
    ("Do not use quotes, markdown or any other formatting.", None),
    ("Follow the format that is asked for exactly.", None),
    ("If you are not sure, give your best guess.", None),
    ("Be precise and check your answer before you give it.", None),
)


class Bank:
    """Instructions about format that help many tasks and need no language model to write. All at once, at the start."""

    def __init__(self, lines: Sequence[tuple[str, str | None]] = BANK) -> None:
        self.parts = [make("format", text, group=group, source="bank") for text, group in lines]

    async def propose(self, state: State) -> list[Part]:
        """Those not known yet."""
        known = {part.id for part in state.parts}
        return [part for part in self.parts if part.id not in known]


@dataclass(frozen=True)
class Example:
    """An input that the agent saw and the output that was rewarded. `task_id`: the task it came from."""

    input: str
    output: str
    reward: float = 1.0
    task_id: str | None = None


Examples = Callable[[], Awaitable[Sequence[Example]]]


class Demonstrations:
    """The agent's own successes as examples in its prompt.

    `examples` are known from the start; `source` is asked again at each proposal, since a search finds new successes.
    Only examples with at least `min_reward`, of `task_ids` where given (the search tasks: a held-out task must never be
    shown), not empty, at most `max_chars` long; one an input, the shortest of the best. At most `limit` in all, in an
    order drawn with `seed`: more candidates than a search can tell apart would only cost rollouts.

    A part remembers its task; the search never examines a task on a prompt that shows its own answer.
    """

    def __init__(
        self,
        examples: Sequence[Example] = (),
        *,
        source: Examples | None = None,
        task_ids: Collection[str] | None = None,
        min_reward: float = 0.999,
        limit: int = 10,
        max_chars: int = 800,
        layout: str = "Question: {input}\nAnswer: {output}",
        seed: int = 0,
    ) -> None:
        self.examples = list(examples)
        self.source, self.task_ids = source, None if task_ids is None else frozenset(task_ids)
        self.min_reward, self.limit, self.max_chars = min_reward, limit, max_chars
        self.layout, self.seed = layout, seed
        self._proposed: set[tuple[str, ...]] = set()

    async def propose(self, state: State) -> list[Part]:
        """Examples of inputs not proposed before, until `limit` have been."""
        if len(self._proposed) >= self.limit:
            return []
        if self.source is not None:
            self.examples += await self.source()
        fresh = [example for example in self._best() if words(example.input) not in self._proposed]
        random.Random(f"{self.seed}:{len(self._proposed)}").shuffle(fresh)  # noqa: S311 (a reproducible order)
        chosen = fresh[: self.limit - len(self._proposed)]
        self._proposed.update(words(example.input) for example in chosen)
        return [self._part(example) for example in chosen]

    def _best(self) -> list[Example]:
        best: dict[tuple[str, ...], Example] = {}
        for example in self.examples:
            if self._usable(example):
                key = words(example.input)
                if key not in best or _rank(example) < _rank(best[key]):
                    best[key] = example
        return [best[key] for key in sorted(best)]

    def _usable(self, example: Example) -> bool:
        return (
            example.reward >= self.min_reward
            and bool(example.input.strip())
            and bool(example.output.strip())
            and len(example.input) + len(example.output) <= self.max_chars
            and (self.task_ids is None or example.task_id in self.task_ids)
        )

    def _part(self, example: Example) -> Part:
        text = self.layout.replace("{output}", "\0").replace("{input}", example.input.strip())
        tasks = () if example.task_id is None else (example.task_id,)
        return make("demonstration", text.replace("\0", example.output.strip()), source="traces", tasks=tasks)


def _rank(example: Example) -> tuple[float, int, str]:
    return -example.reward, len(example.output), example.output
