"""What the prompt search's benchmark runs, keeps and works out; the searches themselves are not run here."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.apo.__main__ import GRID, MUST, Plan, collect, kept, measure
from bench.apo.worlds import SEED_PROMPT, SPECS, World, rule_text
from bench.result import Result


def line(engine: str, world: str, seed: int, budget: int, score: float, **more: Any) -> dict[str, Any]:
    return {
        "engine": engine,
        "world": world,
        "seed": seed,
        "budget": budget,
        "score": score,
        "rollouts": budget,
        **more,
    }


def table(gain: float, seeds: int = 4) -> list[dict[str, Any]]:
    """Ours above each peer by `gain` in one world, and null searches of which one in four was promoted."""
    lines = []
    for seed in range(seeds):
        wobble = 0.01 * seed
        for budget in (400, 1200):
            curve = {"curve": [min(1.0, at / 400) for at in GRID]} if budget == 1200 else {}
            lines.append(line("ratchet", "base", seed, budget, 0.5 + gain + wobble, promoted=True, **curve))
            lines += [line(peer, "base", seed, budget, 0.5 + wobble**2) for peer in ("gepa", "agentlightning")]
        lines.append(line("ratchet", "null", seed, 400, 0.0, promoted=seed == 0))
        lines[-1]["rollouts"] = 100
    return lines


def test_each_seed_is_complete_before_the_next_and_null_worlds_take_turns() -> None:
    plan = Plan(["base", "weak", "null", "null-low"], range(100, 102), 3, ("ratchet", "gepa"))
    mine = plan.mine()
    assert [run[2] for run in mine[:8]] == [100] * 4 + [101] * 4
    assert mine[8:] == [("ratchet", "null", 100, 400), ("ratchet", "null-low", 100, 400), ("ratchet", "null", 101, 400)]
    assert len(plan.peer("gepa")) == 8
    assert plan.peer("agentlightning") == []


def test_runs_that_are_known_are_not_run_again_and_others_are_noted(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    plan = Plan(["small", "null"], range(1), 1, ("ratchet", "gepa"))
    missing = ("ratchet", "null", 0, 400)
    known = [line(*run, 0.123) for run in [*plan.mine(), *plan.peer("gepa")] if run != missing]
    found = collect(plan, 1, [*known, line("ratchet", "small", 77, 400, 0.9)], journal)
    assert [one for one in found if one["world"] == "small"] == [one for one in known if one["world"] == "small"]
    (noted,) = [json.loads(row) for row in journal.read_text().splitlines()]
    assert (noted["engine"], noted["world"], noted["seed"], noted["budget"]) == missing
    assert noted["rollouts"] <= 400


def test_the_peers_lines_of_an_earlier_table_are_kept_and_ours_are_not(tmp_path: Path) -> None:
    rows = ["engine,world,seed,budget,score,rollouts", "gepa,base,3,400,0.5,448", "ratchet,base,3,400,0.9,400"]
    (tmp_path / "apo.csv").write_text("\n".join([*rows, "gepa,base,9,400,0.5,440", "gepa,weak,3,400,0.1,440"]) + "\n")
    (only,) = kept(tmp_path / "apo.csv", ["base"], range(4))
    assert (only["engine"], only["seed"], only["budget"], only["score"]) == ("gepa", 3, 400, 0.5)


@pytest.mark.parametrize(("gain", "above", "below"), [(0.2, 1, 0), (-0.2, 0, 1), (0.0, 0, 0)])
def test_a_world_counts_where_its_interval_leaves_out_zero(gain: float, above: int, below: int) -> None:
    result = Result("apo", MUST)
    measure(result, table(gain))
    for peer in ("gepa", "agentlightning"):
        assert result.measures[f"worlds_above_{peer}_at_400"] == above
        assert result.measures[f"worlds_below_{peer}_at_1200"] == below
    assert result.measures["rollouts_to_gepa_1200_worst_world"] == 220  # the curve meets gepa's .5036 after 201
    assert (result.measures["null_promotions"], result.measures["null_share_spent"]) == (0.25, 0.25)
    assert result.measures["budget_overshoot"] == 0


def test_a_score_is_nought_for_the_seed_and_one_for_the_optimum() -> None:
    world = World(SPECS["base"], 3)
    rules = [f"- {rule_text(rule)}" for rule in range(SPECS["base"].useful)]
    best = SEED_PROMPT.replace("\n\nTask", "\n" + "\n".join(rules) + "\n\nTask")
    assert (world.score(SEED_PROMPT), world.score(best)) == (0.0, pytest.approx(1.0))
