"""What a candidate costs beside the prompt in force, from the held-out rollouts: money, time, length of answers."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from collector.errors import BadInput
from collector.settings import Gate
from optimize.apo.result import HeldOut
from optimize.evaluation import Outcome
from optimize.gate import Comparison, Verdict, non_inferiority

DEFAULT_LIMIT = 1.25  # what is told where no limit is set
Measure = Callable[[Outcome], float | None]

# Dollars where both are known, else tokens.
MEASURES: dict[str, tuple[Measure, ...]] = {
    "cost": (lambda one: one.cost_usd, lambda one: one.tokens),
    "latency": (lambda one: one.seconds,),
    "length": (lambda one: len(one.answer) or None,),
}


def compare(pairs: Sequence[HeldOut], gate: Gate) -> dict[str, Comparison]:
    """Each measure that is known of every rollout, with the limit of the configuration."""
    limits = {"cost": gate.max_cost, "latency": gate.max_latency, "length": gate.max_length}
    found = {}
    for name, measures in MEASURES.items():
        columns = next(filter(None, (_columns(pairs, measure) for measure in measures)), None)
        if columns is None:
            continue
        try:
            found[name] = non_inferiority(*columns, limit=limits[name] or DEFAULT_LIMIT, alpha=gate.alpha)
        except BadInput:  # nothing to compare with: the old prompt cost nothing at all
            continue
    return found


def _columns(pairs: Sequence[HeldOut], measure: Measure) -> tuple[list[float], list[float]] | None:
    """Means a task of the old prompt and the new one; None where one rollout's is not known."""
    columns: tuple[list[float], list[float]] = ([], [])
    for pair in pairs:
        for outcomes, column in ((pair.old, columns[0]), (pair.new, columns[1])):
            values = [measure(one) for one in outcomes]
            known = [value for value in values if value is not None]
            if not known or len(known) < len(values):
                return None
            column.append(sum(known) / len(known))
    return columns if len(pairs) >= 2 else None


def within(verdict: Verdict, costs: dict[str, Comparison], gate: Gate) -> Verdict:
    """The verdict under the configuration's limits: what is not proven to be within one stays in the shadow."""
    limits = {"cost": gate.max_cost, "latency": gate.max_latency, "length": gate.max_length}
    for name, limit in limits.items():
        if verdict.decision != "promote" or limit is None:
            continue
        one = costs.get(name)
        if one is None:
            return replace(verdict, decision="shadow", reason=f"{verdict.reason}; but its {name} is not known")
        if one.verdict != "held":
            told = f"its {name} is {one.ratio:.2f} times the old one (up to {one.high:.2f}), the limit is {limit:g}"
            return replace(verdict, decision="shadow", reason=f"{verdict.reason}; but {told}")
    return verdict
