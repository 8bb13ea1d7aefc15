from typing import Any

import pytest

from collector.settings import Gate
from optimize.apo.costs import compare, within
from optimize.apo.result import HeldOut, pair_of
from optimize.dataset import make_task
from optimize.evaluation import Outcome, Request
from optimize.gate import decide


def pairs(old: dict[str, Any], new: dict[str, Any], n: int = 20) -> list[HeldOut]:
    found = []
    for number in range(n):
        task = make_task({"id": number})
        scale = 1 + number % 3
        outcomes = [
            Outcome(
                Request("p", task),
                score,
                answer="x" * cost.get("length", 3) * scale,
                tokens=None if cost.get("tokens") is None else cost["tokens"] * scale + number % 2,
                seconds=cost.get("seconds", 1.0) * scale,
                cost_usd=cost.get("usd"),
            )
            for score, cost in ((0.0, old), (1.0, new))
        ]
        found.append(pair_of(outcomes))
    return found


def test_cost_is_dollars_where_known_else_tokens_else_untold() -> None:
    assert compare(pairs({"usd": 0.2, "tokens": 10}, {"usd": 0.1, "tokens": 90}), Gate())["cost"].ratio == 0.5
    assert compare(pairs({"tokens": 10}, {"tokens": 90}), Gate())["cost"].ratio > 8
    assert "cost" not in compare(pairs({}, {"tokens": 90}), Gate())


@pytest.mark.parametrize("name", ["cost", "latency", "length"])
def test_a_candidate_that_is_dearer_than_the_limit_stays_in_the_shadow(name: str) -> None:
    dearer = pairs({"tokens": 10}, {"tokens": 30, "seconds": 3.0, "length": 9})
    verdict = decide([pair.before for pair in dearer], [pair.after for pair in dearer])
    assert verdict.decision == "promote"
    free, strict, lax = Gate(), Gate(**{f"max_{name}": 1.5}), Gate(**{f"max_{name}": 4.0})
    assert within(verdict, compare(dearer, free), free) == verdict
    held = within(verdict, compare(dearer, strict), strict)
    assert (held.decision, f"its {name} is" in held.reason) == ("shadow", True)
    assert within(verdict, compare(dearer, lax), lax).decision == "promote"


def test_a_limit_on_what_nobody_knows_is_not_passed_silently() -> None:
    unknown = pairs({}, {})
    verdict = decide([pair.before for pair in unknown], [pair.after for pair in unknown])
    gate = Gate(max_cost=2.0)
    assert "cost is not known" in within(verdict, compare(unknown, gate), gate).reason
