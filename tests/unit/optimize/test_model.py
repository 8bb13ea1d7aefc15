"""The mixed model against a direct, dense computation of the same posterior, and against worlds with known effects."""

import numpy as np
import pytest

from optimize.apo.model import Evidence, Model, Priors, Trait, _Layout, _solve, _statistics

TRAITS = [Trait("added", 0.5, 0.4, 0.2), Trait("added", -0.5), Trait("sentence"), Trait("rewrite"), Trait("gate")]


def some_evidence(rng: np.random.Generator, rows: int = 60, tasks: int = 9) -> Evidence:
    evidence = Evidence(tasks)
    for _ in TRAITS:
        evidence.grow()
    for row in range(rows):
        members = [j for j in range(len(TRAITS)) if rng.random() < 0.5]
        evidence.add(members, int(rng.integers(tasks)), float(rng.random() < 0.4 + 0.2 * (0 in members)))
        if row == rows // 2:
            evidence.cite(0, 3)
            evidence.cite(0, 5)
    return evidence


def dense(evidence: Evidence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Design matrix, rewards and task indicators, straight from the rows."""
    x = np.zeros((len(evidence.rows), 1 + 2 * evidence.features))
    z = np.zeros((len(evidence.rows), len(evidence.counts)))
    for row, (members, task, _) in enumerate(evidence.rows):
        x[row, 0] = z[row, task] = 1.0
        for j in members:
            x[row, 1 + 2 * j] = 1.0
            x[row, 2 + 2 * j] = float(task in evidence.cited[j])
    return x, np.array([reward for *_, reward in evidence.rows]), z


def test_posterior_and_marginal_likelihood_equal_the_dense_formulas() -> None:
    evidence = some_evidence(np.random.default_rng(0))
    layout = _Layout(TRAITS, Priors())
    noise, task_sd, sd = 0.2, 0.15, layout.sd(0.08)
    fit = _solve(_statistics(evidence, layout), layout.mean, sd, noise, task_sd)
    base, y, z = dense(evidence)
    x = base @ layout.map
    within = noise * np.eye(len(y)) + task_sd**2 * z @ z.T
    precision = x.T @ np.linalg.solve(within, x) + np.diag(1 / sd**2)
    covariance = np.linalg.inv(precision)
    mean = covariance @ (x.T @ np.linalg.solve(within, y) + layout.mean / sd**2)
    np.testing.assert_allclose(fit.mean, mean, atol=1e-8)
    np.testing.assert_allclose(fit.root @ fit.root.T, covariance, atol=1e-8)
    total = within + x @ np.diag(sd**2) @ x.T
    residual = y - x @ layout.mean
    evidence_log = -0.5 * (
        len(y) * np.log(2 * np.pi) + np.linalg.slogdet(total)[1] + residual @ np.linalg.solve(total, residual)
    )
    assert fit.evidence == pytest.approx(evidence_log)


def test_statistics_grow_with_each_rollout_as_if_computed_at_once() -> None:
    evidence = some_evidence(np.random.default_rng(1), rows=40)
    evidence.grow()
    evidence.add([5, 0], 3, 1.0)
    evidence.cite(5, 3)
    evidence.cite(5, 3)
    gram, sums, xy = evidence.statistics()
    x, y, z = dense(evidence)
    np.testing.assert_allclose(gram, x.T @ x)
    np.testing.assert_allclose(sums, z.T @ x)
    np.testing.assert_allclose(xy, x.T @ y)


def simulate(effects: np.ndarray, rows: int, seed: int) -> tuple[Evidence, list[Trait]]:
    rng = np.random.default_rng(seed)
    evidence = Evidence(40)
    ease = 0.3 + 0.1 * rng.standard_normal(40)
    for _ in effects:
        evidence.grow()
    for row in range(rows):
        members = [j for j in range(len(effects)) if rng.random() < 0.5]
        p = float(np.clip(ease[row % 40] + effects[members].sum(), 0, 1))
        evidence.add(members, row % 40, float(rng.random() < p))
    return evidence, [Trait("added") for _ in effects]


def test_effects_are_recovered_and_the_intervals_cover_them() -> None:
    effects = np.array([0.3, 0.15, 0.0, 0.0, -0.1, 0.0])
    hits = 0
    for seed in range(20):
        evidence, traits = simulate(effects, 400, seed)
        posterior = Model().fit(evidence, traits)
        sd = np.linalg.norm(posterior.root, axis=1)
        hits += int(np.sum(np.abs(posterior.mean - effects) < 1.96 * sd))
        assert posterior.nothing < 0.01
    assert hits / 120 > 0.85


def test_a_world_of_bad_parts_turns_the_average_part_negative() -> None:
    evidence, traits = simulate(np.full(6, -0.05), 600, 1)
    evidence.grow()
    posterior = Model().fit(evidence, [*traits, Trait("added")])
    assert posterior.mean[-1] < 0


def test_the_sceptic_believes_a_gain_where_there_is_one_and_not_where_there_is_none() -> None:
    gains, nulls = [], []
    for seed in range(10):
        for effects, chances in ((np.array([0.2, 0.2, 0, 0, 0, 0.0]), gains), (np.zeros(6), nulls)):
            evidence, traits = simulate(effects, 300, seed)
            posterior = Model().fit(evidence, traits)
            chances.append(posterior.sceptical((posterior.mean > 0).astype(float))[2])
    assert np.mean(gains) > 0.95
    assert np.mean(nulls) < 0.6


def test_draws_have_the_posteriors_mean_and_spread() -> None:
    evidence, traits = simulate(np.array([0.2, 0.0, -0.2]), 100, 3)
    posterior = Model().fit(evidence, traits)
    rng = np.random.default_rng(0)
    draws = np.array([posterior.draw(rng, 0.7) for _ in range(4000)])
    sd = 0.7 * np.linalg.norm(posterior.root, axis=1)
    np.testing.assert_allclose(draws.mean(axis=0), posterior.mean, atol=0.01)
    np.testing.assert_allclose(draws.std(axis=0), sd, rtol=0.1)
