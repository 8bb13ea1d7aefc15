"""How an engine of whole prompts pays: batches within the budget, what was asked before for nothing, and a ledger."""

import hashlib
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from optimize.apo.engine import Candidate, Problem, Progress, Row, SearchResult, Stop
from optimize.apo.templates import guard
from optimize.dataset import Task
from optimize.evaluation import Outcome, Request
from optimize.gate import sign_flip

BROKEN = 8  # rollouts after which an agent that fails whatever its prompt ends the search


class Ended(Exception):  # no error: the search is over
    """The budget has no room for the next batch, or the agent is broken."""

    def __init__(self, stop: Stop, reason: str) -> None:
        super().__init__(reason)
        self.stop, self.reason = stop, reason


def template_id(template: str) -> str:
    """First 12 hex digits of the sha256 of a prompt's text."""
    return hashlib.sha256(template.encode()).hexdigest()[:12]


class Account:
    """Rollouts of one search, one a (prompt, task): asked again, the same outcome comes back and costs nothing.

    What this very job paid for before it was broken off counts as spent when it is asked for again, so that a resumed
    search walks the same way; until then it is reserved.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.outcomes: dict[tuple[str, str], Outcome] = {}
        self.templates: dict[str, str] = {template_id(problem.seed_template): problem.seed_template}
        self.parents: dict[str, str | None] = {template_id(problem.seed_template): None}
        self.reasons: dict[str, str] = {}
        self.rejected: list[tuple[str, str]] = []
        self.calls = 0
        self.history: list[tuple[int, float, float]] = []
        self._earlier = {(row.template_hash, row.task_id) for row in problem.rows if row.paid}
        self._began = time.monotonic()
        self._recent: list[Outcome] = []

    async def run(self, pairs: Sequence[tuple[str, Task]]) -> list[Outcome]:
        """One outcome a (template, task), in order. Raises Ended, with nothing paid, where the batch is too dear."""
        asked = {(template_id(template), task.id): Request(template, task) for template, task in pairs}
        new = {key: request for key, request in asked.items() if key not in self.outcomes}
        budget = self.problem.budget
        fresh = sum(key not in self._earlier for key in new)
        granted = budget.reserve(len(new)) if fresh <= budget.left - len(self._earlier - new.keys()) else 0
        if granted < len(new):
            budget.refund(granted)
            raise Ended("budget", f"{budget.spent} rollouts are spent, and the next {fresh} are more than is left")
        outcomes = await self.problem.evaluate(list(new.values())) if new else []
        for key, outcome in zip(new, outcomes, strict=True):
            self._book(key, outcome)
        self._check()
        return [self.outcomes[template_id(template), task.id] for template, task in pairs]

    def _book(self, key: tuple[str, str], outcome: Outcome) -> None:
        self.outcomes[key] = outcome
        self._recent.append(outcome)
        budget = self.problem.budget
        if outcome.cached and key not in self._earlier:
            budget.refund(1)
        else:
            budget.settle(outcome.tokens, outcome.cost_usd, outcome.seconds)
        self._earlier.discard(key)

    def _check(self) -> None:
        failed = [outcome for outcome in self._recent if not outcome.ok]
        if len(self._recent) >= BROKEN and len(failed) >= 0.75 * len(self._recent):
            why = Counter(outcome.reason or "no reason given" for outcome in failed).most_common(1)[0][0]
            raise Ended("failures", f"{len(failed)} of {len(self._recent)} rollouts failed: {why}")

    def adopt(self, template: str, parent: str) -> bool:
        """Take a new prompt in; False where a guard refuses it or it is known, with the reason kept."""
        problem = self.problem
        if template_id(template) in self.templates:
            return False
        why = guard(problem.seed_template, template, problem.train_texts)
        if why is not None:
            self.rejected.append((template, why))
            return False
        self.templates[template_id(template)] = template
        self.parents[template_id(template)] = template_id(parent)
        return True

    def mean(self, template: str, tasks: Sequence[Task]) -> float | None:
        """The mean reward over those of `tasks` that the prompt has met; None for none."""
        known = [self.outcomes.get((template_id(template), task.id)) for task in tasks]
        scores = [outcome.score for outcome in known if outcome is not None]
        return float(np.mean(scores)) if scores else None

    def report(self, best: str, tasks: Sequence[Task]) -> None:
        """Tell how far the search is, with the best prompt so far."""
        gain, _, p_gain = self.gain(best, tasks)
        budget, seconds = self.problem.budget, time.monotonic() - self._began
        self.history.append((budget.spent, gain, p_gain))
        if self.problem.on_progress is None:
            return
        recent = [outcome.score for outcome in self._recent[-20:]]
        self.problem.on_progress(
            Progress(
                rollouts=budget.spent,
                budget=budget.rollouts,
                parts=len(self.templates),
                calls=self.calls,
                gain=gain,
                gain_sd=0.0,
                p_gain=p_gain,
                best_template=best,
                recent=float(np.mean(recent)) if recent else 0.0,
                seconds=seconds,
                eta_seconds=seconds / budget.spent * budget.left if budget.spent else None,
            )
        )

    def gain(self, best: str, tasks: Sequence[Task]) -> tuple[float, float, float]:
        """`(mean, sd of the mean, P(> 0))` of the prompt's reward less the seed's on tasks that both have met.

        P is half the paired sign-flip test's doubt: this is what the search saw, and it chose what looked best.
        """
        seed = template_id(self.problem.seed_template)
        both = [
            (self.outcomes[template_id(best), task.id].score, self.outcomes[seed, task.id].score)
            for task in tasks
            if (template_id(best), task.id) in self.outcomes and (seed, task.id) in self.outcomes
        ]
        if len(both) < 2 or template_id(best) == seed:
            return 0.0, 0.0, 0.5
        diffs = np.array([new - old for new, old in both])
        mean, sd = float(diffs.mean()), float(diffs.std(ddof=1)) / len(diffs) ** 0.5
        doubt = sign_flip(diffs) / 2
        return mean, sd, 1 - doubt if mean > 0 else doubt

    def result(self, best: str, tasks: Sequence[Task], stop: Stop, reason: str) -> SearchResult:
        """What the search found, with every prompt it tried."""
        gain, sd, p_gain = self.gain(best, tasks)
        return SearchResult(
            seed_template=self.problem.seed_template,
            best_template=best,
            best_parts=(),
            leader_template=best,
            value=self.mean(best, tasks) or 0.0,
            gain=gain,
            gain_sd=sd,
            p_gain=p_gain,
            rollouts=self.problem.budget.spent,
            stop=stop,
            reason=reason,
            calls=self.calls,
            parts=(),
            rejected=tuple(self.rejected),
            history=tuple(self.history),
            rows=tuple(self._row(*item) for item in self.outcomes.items()),
            proposals=(),
            candidates=tuple(self._candidate(one, best) for one in self.templates),
        )

    def _candidate(self, one: str, best: str) -> Candidate:
        scores = [outcome.score for (template, _), outcome in self.outcomes.items() if template == one]
        score = float(np.mean(scores)) if scores else None
        reason = self.reasons.get(one, "was not tried: the search ended" if not scores else "scored less")
        if one == template_id(best):
            reason = "best of the search"
        return Candidate(one, self.parents[one], self.templates[one], score, len(scores), reason)

    def _row(self, key: tuple[str, str], outcome: Outcome) -> Row:
        return Row(
            key[0],
            key[1],
            0,
            (),
            outcome.score,
            outcome.ok,
            outcome.reason,
            outcome.answer,
            outcome.feedback,
            outcome.tokens,
            outcome.seconds,
            not outcome.cached,
            outcome.cost_usd,
        )
