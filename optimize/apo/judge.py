"""The held-out test of a job: in which order, when to look, and what the pairs so far say."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from collector.errors import BadInput
from collector.settings import Gate
from optimize.apo.result import HeldOut
from optimize.dataset import Task
from optimize.gate import Method, Verdict, decide, decide_early


@dataclass(frozen=True)
class Judge:
    """Judges one candidate by the method that its job began with.

    fixed: one look, when every task is done. anytime: a look after each block of tasks, and an end as soon as the
    evidence is enough either way, at the same error rate; the tasks come in an order drawn by `seed`.
    `candidates_tried`: of these tasks, this one included.
    """

    method: Method
    gate: Gate
    candidates_tried: int
    seed: int

    def blocks(self, held: Sequence[Task], at_once: int) -> Iterator[list[Task]]:
        """The tasks between two looks: all of them, or as many as run at once."""
        if self.method == "fixed":
            yield list(held)
            return
        order = list(held)
        random.Random(f"ratchet-gate-{self.seed}").shuffle(order)  # noqa: S311 (a reproducible order)
        for at in range(0, len(order), at_once):
            yield order[at : at + at_once]

    def settled(self, pairs: Sequence[HeldOut]) -> bool:
        """Whether further pairs would change nothing. Limits on costs are tests of all tasks: with one, only a
        candidate that has lost ends early. Raises BadInput as `verdict` does."""
        verdict = self.verdict(pairs) if self.method == "anytime" else None
        limited = any((self.gate.max_cost, self.gate.max_latency, self.gate.max_length))
        return verdict is not None and verdict.decision in (("reject",) if limited else ("promote", "reject"))

    def verdict(self, pairs: Sequence[HeldOut]) -> Verdict | None:
        """What the pairs say; None where there are fewer than two.

        Raises BadInput where two rewards differ by more than the configuration says they can.
        """
        if len(pairs) < 2:
            return None
        before, after = [pair.before for pair in pairs], [pair.after for pair in pairs]
        alpha, least = self.gate.alpha, self.gate.min_samples
        if self.method == "fixed":
            return decide(
                before,
                after,
                alpha=alpha,
                candidates_tried=self.candidates_tried,
                min_samples=least,
                seed=self.seed,
            )
        widest = max(abs(pair.after - pair.before) for pair in pairs)
        if widest > self.gate.span:
            raise BadInput(
                f"two rewards differ by {widest:g}, but gate.span says {self.gate.span:g} at most: set it to the "
                "largest difference that rewards can have, and resume the job",
                param="gate.span",
            )
        return decide_early(
            before,
            after,
            alpha=alpha,
            candidates_tried=self.candidates_tried,
            min_samples=least,
            span=self.gate.span,
        )
