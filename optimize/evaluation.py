"""What a search asks for and what it gets back: one request is one paid rollout of a prompt on a task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from optimize.dataset import Task


@dataclass(frozen=True)
class Request:
    """One rollout to be paid: this template, on this task, for the `replicate`-th time.

    `subset` names the parts that `template` is made of (ids, in the order they were drawn), for the log; `arm` is
    "search", "baseline" or "candidate".
    """

    template: str
    task: "Task"
    replicate: int = 0
    arm: str = "search"
    subset: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a rollout gave. `score` is the reward, 0.0 where the rollout failed (`ok` False, `reason` says why).

    `feedback` is what a critic may read (grader's explanation, error text; may be empty); `cached` means that an
    earlier identical rollout was found in the store and nothing was paid.
    """

    request: Request
    score: float
    ok: bool = True
    reason: str | None = None
    answer: str = ""
    feedback: str = ""
    tokens: int | None = None
    seconds: float = 0.0
    cached: bool = False
    cost_usd: float | None = None


class Evaluator(Protocol):
    """Runs rollouts. Outcomes come in the order of the requests, one each; a failed rollout is an Outcome, not an
    exception. A spent budget shows as outcomes with `ok` False and reason "budget", from which no engine learns.
    """

    async def evaluate(self, requests: Sequence[Request]) -> list[Outcome]:
        """Run all requests, concurrently as far as the evaluator allows."""
        ...
