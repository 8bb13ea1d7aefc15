"""One run of an agent on one task: as planned, as it ended, and who can make it."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from optimize.dataset import Task

# Reasons that say nothing of the prompt: such rollouts are tried again, and only such.
INFRASTRUCTURE = ("proxy_unreachable", "upstream")


@dataclass(frozen=True)
class Rollout:
    """One run of the agent on one task. `reward` None is a missing reward; `seconds` is the run's wall time.

    Not `ok`: `reason` is crash, timeout, no_reward, grader, upstream or proxy_unreachable, and `detail` its text.
    `calls`, tokens and cost are the store's, None where it knows nothing of the episode.
    """

    task_id: str
    episode_id: str
    reward: float | None
    ok: bool
    reason: str | None
    answer: str
    seconds: float
    calls: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    detail: str = ""
    cost_usd: float | None = None
    upstream: bool = False  # it crashed, and its last call had failed for want of the model

    @property
    def score(self) -> float:
        """The reward, 0.0 for a failure: in a controlled run a failed rollout counts, it is never dropped."""
        return self.reward if self.ok and self.reward is not None else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "score": self.score}


@dataclass(frozen=True)
class Plan:
    """One rollout to be made. `pin` is "slot@3" or "slot@c-...": the version that the agent's calls get, and
    `template` its text, where one was pinned by its text."""

    task: Task
    pin: str | None = None
    replicate: int = 0
    episode_id: str | None = None
    template: str | None = None


Attempt = TypeVar("Attempt")
Settled = Callable[[list[tuple[int, Rollout]]], Awaitable[None]]


class Rollouts(Protocol):
    """Makes rollouts: an agent's process a task, a logged request sent again, or a function called."""

    @property
    def base_url(self) -> str:
        """Where the agents' calls go; empty where that is not known."""
        ...

    async def run_all(self, plans: Sequence[Plan], on_settled: Settled | None = None) -> list[Rollout]:
        """All rollouts, concurrently, in the order of `plans`; `on_settled` gets (index, rollout) in small batches as
        they end. An agent's failure is a Rollout, not an exception; Unavailable where the collector stays away."""
        ...


async def as_they_end(
    attempts: Sequence[Coroutine[Any, Any, Attempt]],
    settle: Callable[[list[Attempt]], Awaitable[list[Rollout]]],
    on_settled: Settled | None = None,
) -> list[Rollout]:
    """Run all attempts at once; what has ended meanwhile is settled together, while the others go on.

    The rollouts come in the order of `attempts`. If settling raises or this is cancelled, what still runs is cancelled
    and waited for.
    """
    pending = {asyncio.create_task(attempt): index for index, attempt in enumerate(attempts)}
    rollouts: dict[int, Rollout] = {}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            ended = [(pending.pop(task), task.result()) for task in done]
            settled = await settle([attempt for _, attempt in ended])
            numbered = [(index, rollout) for (index, _), rollout in zip(ended, settled, strict=True)]
            rollouts.update(numbered)
            if on_settled is not None:
                await on_settled(numbered)
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    return [rollouts[index] for index in range(len(attempts))]


async def settled_already(rollouts: list[Rollout]) -> list[Rollout]:
    """For attempts that end as rollouts."""
    return rollouts
