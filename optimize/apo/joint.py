"""Several prompts of one agent in one search: which of them to work on is decided by what work on each has earned.

Each slot is first searched alone, the others held where they are,
with a share of the budget; the rest goes to the slots by the gain that their own search found (the share of the
episode's reward that their prompt has shown to move). The joint winner meets the held-out tasks once, as a whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from optimize.apo.account import template_id
from optimize.apo.engine import Engine, PartReport, Problem, Progress, SearchResult
from optimize.apo.parts import Part
from optimize.evaluation import Outcome, Request
from optimize.joint import divide, join

FIRST_SHARE = 0.6  # of the budget, divided among the slots, before credit decides
LEAST = 16  # rollouts below which a slot's search learns nothing


class Joint:
    """An engine that searches several slots with another one."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner

    async def search(self, problem: Problem) -> SearchResult:
        """See the module. Each slot's search sees a problem of its own, paid from the one budget."""
        prompts = divide(problem.seed_template, "")
        if len(prompts) < 2:
            return await self.inner.search(problem)
        run = _Run(self.inner, problem, prompts)
        share = max(LEAST, int(FIRST_SHARE * problem.budget.left) // len(prompts))
        for slot in prompts:
            await run.work_on(slot, share)
        for slot in sorted(run.credit, key=lambda name: -run.credit[name]):
            if run.credit[slot] > 0 or slot == max(run.credit, key=lambda name: run.credit[name]):
                await run.work_on(slot, problem.budget.left)
        return run.result()


class _Run:
    def __init__(self, inner: Engine, problem: Problem, prompts: Mapping[str, str]) -> None:
        self.inner, self.problem = inner, problem
        self.prompts = dict(prompts)
        self.credit = dict.fromkeys(prompts, 0.0)
        self.found: list[tuple[str, int, SearchResult]] = []  # slot, rollouts before it
        self._proposals = list(problem.proposals)
        self._earlier = {(row.template_hash, row.task_id, row.replicate) for row in problem.rows if row.paid}

    async def work_on(self, slot: str, rollouts: int) -> None:
        """Search one slot with up to so many rollouts, the others as they are; keep what is better."""
        before, budget = self.problem.budget.spent, self.problem.budget
        if budget.left < LEAST or self._broken():
            return
        held = dict(self.prompts)

        async def evaluate(requests: Sequence[Request]) -> list[Outcome]:
            whole = [replace(one, template=join({**held, slot: one.template})) for one in requests]
            return [
                replace(outcome, request=one, cached=outcome.cached and not self._counted(outcome.request))
                for one, outcome in zip(requests, await self.problem.evaluate(whole), strict=True)
            ]

        def progressed(progress: Progress) -> None:
            if self.problem.on_progress is not None:
                best = join({**held, slot: progress.best_template})
                told = replace(progress, best_template=best, rollouts=budget.spent, budget=budget.rollouts)
                self.problem.on_progress(told)

        result = await self.inner.search(
            replace(
                self.problem,
                seed_template=held[slot],
                evaluate=evaluate,
                budget=budget.part(min(rollouts, budget.left)),
                rows=(),
                proposals=self._proposals,
                on_progress=progressed,
            )
        )
        self._proposals = self._proposals[len(result.proposals) :]
        self.found.append((slot, before, result))
        self.credit[slot] += result.gain if result.changed else 0.0
        self.prompts[slot] = result.best_template

    def _counted(self, request: Request) -> bool:
        """Whether this very job paid for the rollout before it was broken off: it counts as spent, once."""
        key = (template_id(request.template), request.task.id, request.replicate)
        known = key in self._earlier
        self._earlier.discard(key)
        return known

    def _broken(self) -> bool:
        return bool(self.found) and self.found[-1][2].stop == "failures"

    def result(self) -> SearchResult:
        """All searches as one: the joint prompt, every part with its slot's name, the history one after another."""
        last = self.found[-1][2]
        seed, best = self.problem.seed_template, join(self.prompts)
        parts: tuple[PartReport, ...] = ()
        history: tuple[tuple[int, float, float], ...] = ()
        reached = 0.0
        for slot, before, one in self.found:
            parts += tuple(replace(row, part=_named(row.part, slot)) for row in one.parts)
            history += tuple((before + rollouts, reached + gain, p_gain) for rollouts, gain, p_gain in one.history)
            reached += one.gain if one.changed else 0.0
        told = ", ".join(f"{slot} {credit:+.2f}" for slot, credit in self.credit.items())
        return replace(
            last,
            seed_template=seed,
            best_template=best,
            best_parts=tuple(_named(part, slot) for slot, _, one in self.found for part in one.best_parts),
            leader_template=best,
            gain=reached,
            p_gain=max(one.p_gain for _, _, one in self.found),
            rollouts=self.problem.budget.spent,
            reason=f"{last.reason}; gain by slot: {told}",
            calls=sum(one.calls for _, _, one in self.found),
            parts=parts,
            rejected=tuple(item for _, _, one in self.found for item in one.rejected),
            history=history,
            rows=tuple(row for _, _, one in self.found for row in one.rows),
            proposals=tuple(batch for _, _, one in self.found for batch in one.proposals),
            candidates=tuple(item for _, _, one in self.found for item in one.candidates),
        )


def _named(part: Part, slot: str) -> Part:
    return replace(part, text=f"{slot}: {part.text}")
