"""The gate against known distributions: error rates, power, coverage, exact p-values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.errors import BadInput
from optimize.gate import (
    anytime_interval,
    bootstrap,
    decide,
    decide_early,
    decide_while_collecting,
    e_values,
    interval,
    non_inferiority,
    sign_flip,
)


def binary(rng: np.random.Generator, n: int, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """Paired successes on tasks of very different difficulty."""
    easy = rng.beta(1.0, 1.0, n) * (1 - gain)
    return (rng.random(n) < easy).astype(float), (rng.random(n) < easy + gain).astype(float)


def graded(rng: np.random.Generator, n: int, gain: float) -> tuple[np.ndarray, np.ndarray]:
    easy = rng.beta(2.0, 2.0, n)
    return easy + 0.15 * rng.standard_normal(n), easy + gain + 0.15 * rng.standard_normal(n)


def test_a_clear_gain_is_promoted_with_an_interval_above_zero() -> None:
    verdict = decide([0.0] * 30 + [1.0] * 10, [1.0] * 40, alpha=0.05, candidates_tried=1)
    assert verdict.decision == "promote"
    assert (verdict.n, verdict.before, verdict.after, verdict.diff) == (40, 0.25, 1.0, 0.75)
    assert 0 < verdict.ci95[0] <= verdict.diff <= verdict.ci95[1]
    assert verdict.p_value == pytest.approx(2 * 0.5**30)
    assert verdict.needed_n is not None and verdict.needed_n <= 40


def test_a_clear_loss_and_a_tie_are_rejected() -> None:
    assert decide([1.0] * 40, [0.0] * 30 + [1.0] * 10).decision == "reject"
    same = np.tile([0.0, 1.0], 100)
    verdict = decide(same, same)
    assert (verdict.decision, verdict.p_value, verdict.needed_n) == ("reject", 1.0, None)


def test_a_small_sample_stays_in_the_shadow_and_says_what_a_proof_needs() -> None:
    verdict = decide([0.0] * 10 + [1.0] * 10, [1.0] * 4 + [0.0] * 6 + [1.0] * 10)
    assert verdict.decision == "shadow"
    assert verdict.ci95[0] <= 0.0 <= verdict.ci95[1]
    assert verdict.needed_n is not None and 20 < verdict.needed_n < 60
    assert "inconclusive" in verdict.reason
    assert decide([0.0] * 9, [1.0] * 9).decision == "shadow"
    assert decide([0.0] * 9, [1.0] * 9, min_samples=5).decision == "promote"


@pytest.mark.parametrize("candidates", [1, 4, 16])
def test_no_gain_is_promoted_at_most_alpha_of_the_time_whatever_the_number_of_candidates(candidates: int) -> None:
    rng = np.random.default_rng(candidates)
    runs, false = {1: 600, 4: 300, 16: 150}[candidates], 0
    for _ in range(runs):
        false += any(
            decide(*binary(rng, 60, 0.0), candidates_tried=candidates).decision == "promote" for _ in range(candidates)
        )
    assert false / runs <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


def test_no_gain_in_graded_rewards_is_promoted_at_most_alpha_of_the_time() -> None:
    rng = np.random.default_rng(3)
    false = sum(decide(*graded(rng, 30, 0.0)).decision == "promote" for _ in range(100))
    assert false <= 8


def test_known_gains_are_found_with_the_power_that_needed_n_promises() -> None:
    rng = np.random.default_rng(4)
    needed = decide(*binary(rng, 20_000, 0.2)).needed_n
    assert needed is not None
    found = sum(decide(*binary(rng, needed, 0.2)).decision == "promote" for _ in range(300)) / 300
    assert 0.7 <= found <= 0.9


@pytest.mark.parametrize("draw", [binary, graded])
@pytest.mark.parametrize(("n", "gain"), [(30, 0.0), (30, 0.25), (100, 0.1)])
def test_the_interval_covers_the_truth(draw, n: int, gain: float) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(n)
    hits = 0
    for _ in range(500):
        low, high = interval(*draw(rng, n, gain))
        hits += low <= gain <= high
    assert hits / 500 >= 0.93


def test_interval_and_test_seldom_contradict() -> None:
    rng = np.random.default_rng(6)
    verdicts = [decide(*binary(rng, 40, 0.15)) for _ in range(400)]
    assert not [v for v in verdicts if v.p_value > 0.05 and not v.ci95[0] <= 0 <= v.ci95[1]]
    assert sum(v.p_value <= 0.05 and v.ci95[0] <= 0 <= v.ci95[1] for v in verdicts) <= 8


def test_the_sign_flip_test_is_exact_where_it_can_be() -> None:
    assert sign_flip([1.0] * 6) == pytest.approx(2 / 64)
    assert sign_flip([0.0] * 50 + [1.0] * 5 + [-1.0]) == pytest.approx(14 / 64)
    assert sign_flip([1.0, 2.0, 4.0]) == pytest.approx(2 / 8)
    assert sign_flip([0.0, 0.0]) == 1.0
    many = np.linspace(0.1, 1.0, 30)
    assert sign_flip(many) == pytest.approx(1 / 20_000)
    assert sign_flip(many * np.where(np.arange(30) % 2, 1, -1)) == sign_flip(many * np.where(np.arange(30) % 2, 1, -1))


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=2, max_size=12))
def test_swapping_the_prompts_mirrors_the_verdict(pairs: list[tuple[float, float]]) -> None:
    before, after = zip(*pairs, strict=True)
    one, other = decide(before, after), decide(after, before)
    assert one.diff == pytest.approx(-other.diff)
    assert one.p_value == pytest.approx(other.p_value)
    assert one.ci95 == pytest.approx((-other.ci95[1], -other.ci95[0]))
    assert one.ci95[0] <= one.diff <= one.ci95[1]


def test_evidence_by_betting_rarely_crosses_without_a_gain_and_does_with_one() -> None:
    rng = np.random.default_rng(8)
    crossed = sum(e_values(*binary(rng, 300, 0.0)).max() >= 20 for _ in range(300))
    assert crossed / 300 <= 0.05
    found = sum(e_values(*binary(rng, 120, 0.25)).max() >= 20 for _ in range(100))
    assert found >= 75
    assert e_values([0.0] * 3, [1.0] * 3).shape == (3,)
    assert np.all(np.diff(e_values([0.0] * 9, [1.0] * 9)) > 0)


@pytest.mark.parametrize(
    ("baseline", "candidate", "named"),
    [
        ([1.0, 0.0], [1.0], "candidate"),
        ([1.0, 0.0], [1.0, 0.0, 1.0], "candidate"),
        ([1.0, math.nan], [1.0, 0.0], "baseline"),
        ([1.0, 0.0], [1.0, math.inf], "candidate"),
        ([], [], "baseline"),
        ([[1.0, 0.0]], [[1.0, 0.0]], "baseline"),
        ([None, 1.0], ["x", 1.0], "baseline"),
    ],
)
def test_bad_input_names_the_field(baseline: list, candidate: list, named: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(BadInput) as caught:
        decide(baseline, candidate)
    assert caught.value.param == named


def test_bad_parameters_are_named() -> None:
    for wrong in ({"alpha": 0.0}, {"alpha": 1.0}, {"candidates_tried": 0}):
        with pytest.raises(BadInput) as caught:
            decide([0.0, 1.0], [1.0, 1.0], **wrong)
        assert caught.value.param in wrong
    with pytest.raises(BadInput):
        e_values([0.0, 0.0], [3.0, 0.0])


def costs(rng: np.random.Generator, n: int, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Paired costs of tasks of very different size; the candidate's are `ratio` times as high on average."""
    size = rng.lognormal(0.0, 0.7, n)
    return size * rng.lognormal(-0.045, 0.3, n), ratio * size * rng.lognormal(-0.045, 0.3, n)


def test_a_cost_above_the_limit_is_seldom_called_held_and_one_well_below_mostly_is() -> None:
    rng = np.random.default_rng(5)
    at_limit = [non_inferiority(*costs(rng, 60, 1.25), limit=1.25).verdict for _ in range(300)]
    assert at_limit.count("held") / 300 <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 300)
    same = [non_inferiority(*costs(rng, 60, 1.0), limit=1.25).verdict for _ in range(100)]
    assert same.count("held") >= 85
    twice = [non_inferiority(*costs(rng, 60, 2.0), limit=1.25).verdict for _ in range(100)]
    assert twice.count("worse") >= 95


def test_the_interval_of_a_cost_ratio_holds_the_truth() -> None:
    rng = np.random.default_rng(6)
    found = [non_inferiority(*costs(rng, 80, 1.5)) for _ in range(200)]
    assert sum(one.low <= 1.5 <= one.high for one in found) / 200 >= 0.83  # two ends at 5% each
    assert all(one.low <= one.ratio <= one.high for one in found)


def test_costs_that_cannot_be_compared_are_refused() -> None:
    for before, after in (([0.0, 0.0], [1.0, 1.0]), ([1.0, -1.0], [1.0, 1.0]), ([1.0], [1.0])):
        with pytest.raises(BadInput):
            non_inferiority(before, after)


def test_the_bootstrap_agrees_with_the_sign_flip_test_on_clear_cases() -> None:
    rng = np.random.default_rng(7)
    false = covered = 0
    for _ in range(300):
        before, after = graded(rng, 60, 0.0)
        low, high, p = bootstrap(before, after)
        false += p < 0.05
        covered += low <= 0.0 <= high
    assert false / 300 <= 0.09
    assert covered / 300 >= 0.91
    low, high, p = bootstrap(*graded(rng, 60, 0.2))
    assert low > 0
    assert p < 0.001


@pytest.mark.parametrize("candidates", [1, 8])
def test_looking_after_every_pair_promotes_no_gain_at_most_alpha_of_the_time(candidates: int) -> None:
    rng = np.random.default_rng(candidates)
    runs = 400 // candidates
    false = sum(
        any(
            decide_while_collecting(*binary(rng, 150, 0.0), candidates_tried=candidates)[0] == "promote"
            for _ in range(candidates)
        )
        for _ in range(runs)
    )
    assert false / runs <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


def test_a_real_gain_is_promoted_while_collecting_and_a_loss_rejected() -> None:
    rng = np.random.default_rng(2)
    assert sum(decide_while_collecting(*binary(rng, 200, 0.3))[0] == "promote" for _ in range(50)) >= 45
    lost = [decide_while_collecting(*binary(rng, 200, 0.3)[::-1])[0] for _ in range(50)]
    assert lost.count("reject") >= 45
    assert decide_while_collecting([0.0, 1.0], [1.0, 1.0])[0] == "shadow"


def test_an_interval_that_is_looked_at_after_every_pair_holds_the_truth_at_all_of_them() -> None:
    rng = np.random.default_rng(4)
    missed = 0
    for _ in range(40):
        before, after = binary(rng, 80, 0.2)
        seen = [anytime_interval((after - before)[:n]) for n in (20, 80)]
        assert seen[-1][0] <= float((after - before).mean()) <= seen[-1][1]
        missed += not all(low <= 0.2 <= high for low, high in seen)
    assert missed <= 6  # 5 % of 40 are 2


def test_the_early_gate_stops_on_a_clear_gain_and_promotes_no_gain_at_most_alpha_of_the_time() -> None:
    rng = np.random.default_rng(5)

    def ask(gain: float) -> tuple[str, int]:
        before, after = binary(rng, 80, gain)
        for n in range(16, 81, 16):
            verdict = decide_early(before[:n], after[:n])
            if verdict.decision != "shadow":
                break
        return verdict.decision, verdict.n

    none = [ask(0.0)[0] for _ in range(40)]
    assert none.count("promote") <= 6
    clear = [ask(0.5) for _ in range(10)]
    assert [decision for decision, _ in clear].count("promote") >= 8
    assert np.mean([n for _, n in clear]) < 60
    verdict = decide_early([0.0] * 20, [1.0] * 20)
    assert (verdict.decision, verdict.p_value < 0.01) == ("promote", True)
    assert verdict.ci95[0] > 0.2
    assert decide_early([0.0] * 4, [1.0] * 4).decision == "shadow"
    assert decide_early([1.0] * 30, [0.0] * 30).decision == "reject"
