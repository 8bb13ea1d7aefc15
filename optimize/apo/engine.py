"""What every search engine is given and gives back: one problem in, one result out, whatever goes on between.

An engine pays only through `Problem.evaluate`, and only what `Problem.budget` granted before; it sees search tasks
alone. Whether its prompt is any better is for `optimize.gate` to say.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from optimize.apo.parts import Part
from optimize.apo.state import Proposer
from optimize.budget import Budget
from optimize.dataset import Task
from optimize.evaluation import Outcome, Request

Evaluate = Callable[[Sequence[Request]], Awaitable[list[Outcome]]]
Complete = Callable[[list[dict[str, str]]], Awaitable[str]]
Stop = Literal["budget", "headroom", "no gain", "converged", "failures", "rounds"]


@dataclass(frozen=True)
class Row:
    """One rollout as it is logged: enough to fit again, or to resume, without paying again."""

    template_hash: str
    task_id: str
    replicate: int
    subset: tuple[str, ...]
    score: float
    ok: bool
    reason: str | None = None
    answer: str = ""
    feedback: str = ""
    tokens: int | None = None
    seconds: float = 0.0
    paid: bool = True
    cost_usd: float | None = None


@dataclass(frozen=True)
class Progress:
    """Where a search stands, after each block."""

    rollouts: int
    budget: int
    parts: int
    calls: int
    gain: float
    gain_sd: float
    p_gain: float
    best_template: str
    recent: float  # mean reward of the last 20 rollouts
    seconds: float
    eta_seconds: float | None


@dataclass(frozen=True)
class PartReport:
    """What is believed of one part: its value added to the reward, averaged over tasks."""

    part: Part
    mean: float
    sd: float
    p_helps: float
    rollouts: int
    chosen: bool


@dataclass(frozen=True)
class Candidate:
    """One whole prompt that a search tried, or refused to try, and why it went no further.

    `id` is the hash of its text, `parent` that of the prompt it was made from (None: the seed); `score` is the mean
    reward over `rollouts` search rollouts, None where there was none.
    """

    id: str
    parent: str | None
    template: str
    score: float | None
    rollouts: int
    reason: str


@dataclass(frozen=True)
class SearchResult:
    """What a search found. `best_*` is the seed itself while `p_gain` < `confident`; `leader_template` is what leads.

    `gain` and `gain_sd`: posterior of the leader's reward less the seed's; `value`: the leader's expected reward.
    `history`: (rollouts, gain, p_gain) after each fit. `rows` and `proposals` are what a resumed run needs.
    `parts` is of engines that think in parts, `candidates` of those that think in whole prompts.
    """

    seed_template: str
    best_template: str
    best_parts: tuple[Part, ...]
    leader_template: str
    value: float
    gain: float
    gain_sd: float
    p_gain: float
    rollouts: int
    stop: Stop
    reason: str
    calls: int
    parts: tuple[PartReport, ...]
    rejected: tuple[tuple[str, str], ...]
    history: tuple[tuple[int, float, float], ...]
    rows: tuple[Row, ...]
    proposals: tuple[tuple[Part, ...], ...]
    candidates: tuple[Candidate, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether a prompt other than the seed is reported, so that a gate has something to judge."""
        return self.best_template != self.seed_template


@dataclass(frozen=True)
class Problem:
    """What to search for, and with what.

    `tasks` hold no held-out task. `proposer` is for engines that think in parts; `complete` asks the optimizer's
    language model (None: there is none) and is logged, so that a resumed search gets the same replies. `rows` and
    `proposals` are what this very job paid for before it was broken off. `train_texts`: texts that no instruction may
    copy. `params` are the engine's own parameters by name.
    """

    seed_template: str
    tasks: Sequence[Task]
    evaluate: Evaluate
    budget: Budget
    proposer: Proposer
    complete: Complete | None = None
    seed: int = 0
    concurrency: int = 4
    rows: Sequence[Row] = ()
    proposals: Sequence[Sequence[Part]] = ()
    train_texts: Sequence[str] = ()
    on_progress: Callable[[Progress], None] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """Searches for a better prompt."""

    async def search(self, problem: Problem) -> SearchResult:
        """Search until the budget, or hope, is spent. Raises BadInput for a problem that cannot be searched."""
        ...
