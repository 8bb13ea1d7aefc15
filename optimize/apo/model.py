"""What rollouts say about parts: a Gaussian linear mixed model with exact posterior, for graded and binary rewards.

A rollout of a prompt with the parts S on the task t gives

    y = b0 + u_t + sum over j in S of [ a_k(j) + b z_j + e_j + g_j c_j(t) ] + noise,   noise ~ N(0, s2)

    u_t    how easy the task is, ~ N(0, su2), integrated out
    a_k    what a part of class k adds on average, ~ N(.02, .04^2), learned: a world of bad proposals turns it negative
    z_j    standardised log((citations of j while absent + .5) / (failures shown while absent + 10)); its slope b
           ~ N(.01, .03^2)
    e_j    what is particular to part j, ~ N(0, tau^2), tau by marginal likelihood
    c_j(t) 1 if a failure on task t was cited for part j, else kappa_j
           = min(.8, 1.5 cited tasks / max(5, harvested tasks))
    g_j    what the part does for a task that asked for it, ~ N(gamma, .25^2), gamma ~ N(.12, .12^2), learned

Integrating u_t out: with q = su2 / s2 and c_t = q / (1 + n_t q), A = X'X - sum_t c_t x_t x_t' and
r = X'y - sum_t c_t x_t y_t, where x_t and y_t are sums over the rollouts of task t. The posterior of the coefficients
is N(m, C) with C^-1 = A / s2 + diag(1 / v) and m = C (r / s2 + mu / v). Gram and task sums grow with each rollout; no
pass over old rows. Lindley & Smith 1972 for the hierarchy; Searle, Casella & McCulloch, Variance Components, ch. 6.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Array = NDArray[np.float64]
TAUS = (0.03, 0.06, 0.12, 0.24)
DOUBTS = (0.01, 0.03, 0.06, 0.12)
SPREAD = 5.0  # a sceptic's sd of g, in units of tau
FIXED = frozenset(("rewrite", "gate", "last"))
TASK_SDS = (0.05, 0.15, 0.3)


@dataclass(frozen=True)
class Priors:
    """Means and standard deviations before any rollout, in units of reward (meant for rewards of about 0 to 1)."""

    intercept: tuple[float, float] = (0.5, 2.0)
    mean: tuple[float, float] = (0.02, 0.04)
    citation_slope: tuple[float, float] = (0.01, 0.03)
    cited: tuple[float, float] = (0.12, 0.12)
    cited_spread: float = 0.25
    cited_factor: float = 1.5
    cited_most: float = 0.8
    step_sd: float = 0.08  # a rewrite against what it was made from
    place_sd: float = 0.15  # a part that stands last, against the same part where it comes to stand
    gate_sd: float = 0.25  # the first member of a capped group, against none
    tau: float = 0.08
    task_sd: float = 0.15
    noise: float = 0.18  # s2 before any rollout, worth `noise_weight` rollouts
    noise_weight: float = 6.0


@dataclass(frozen=True)
class Trait:
    """What the model knows of a feature (a part, or a gate) besides the rollouts it was in."""

    group: str  # class of the hierarchy; those of `FIXED` have priors of their own instead
    score: float = 0.0  # z_j
    kappa: float = 0.0
    share: float = 0.0  # share of all tasks that cited it


class Evidence:
    """Rollouts as sufficient statistics. Two columns a feature: present, and present on a task that cited it."""

    def __init__(self, tasks: int) -> None:
        self.features = 0
        self.rows: list[tuple[tuple[int, ...], int, float]] = []
        self.cited: list[set[int]] = []
        self.counts = np.zeros(tasks)
        self.task_y = np.zeros(tasks)
        self.yy = 0.0
        self._gram = np.zeros((1, 1))
        self._sums = np.zeros((tasks, 1))
        self._xy = np.zeros(1)

    def grow(self) -> int:
        """Adds a feature that no rollout so far has; its index."""
        index = self.features
        self.features += 1
        self.cited.append(set())
        if 1 + 2 * self.features > len(self._xy):
            self._widen(max(64, 4 * self.features))
        return index

    def add(self, members: Sequence[int], task: int, reward: float) -> None:
        """One rollout: the features present (distinct), the task's index, the reward."""
        columns = self._columns(members, task)
        self._gram[np.ix_(columns, columns)] += 1.0
        self._sums[task, columns] += 1.0
        self._xy[columns] += reward
        self.counts[task] += 1.0
        self.task_y[task] += reward
        self.yy += reward * reward
        self.rows.append((tuple(members), task, reward))

    def cite(self, feature: int, task: int) -> None:
        """A failure on `task` was cited for `feature`; rollouts already counted are corrected."""
        if task in self.cited[feature]:
            return
        column = 2 + 2 * feature
        for members, row_task, reward in self.rows:
            if row_task == task and feature in members:
                columns = self._columns(members, task)
                self._gram[columns, column] += 1.0
                self._gram[column, columns] += 1.0
                self._gram[column, column] += 1.0
                self._sums[task, column] += 1.0
                self._xy[column] += reward
        self.cited[feature].add(task)

    def statistics(self) -> tuple[Array, Array, Array]:
        """`(X'X (p, p), task sums (T, p), X'y (p,))` with p = 1 + 2 features: intercept, then two columns each."""
        p = 1 + 2 * self.features
        return self._gram[:p, :p], self._sums[:, :p], self._xy[:p]

    def _columns(self, members: Sequence[int], task: int) -> list[int]:
        columns = [0]
        for feature in members:
            columns.append(1 + 2 * feature)
            if task in self.cited[feature]:
                columns.append(2 + 2 * feature)
        return columns

    def _widen(self, features: int) -> None:
        old, new = len(self._xy), 1 + 2 * features
        gram, sums, xy = np.zeros((new, new)), np.zeros((len(self.counts), new)), np.zeros(new)
        gram[:old, :old], sums[:, :old], xy[:old] = self._gram, self._sums, self._xy
        self._gram, self._sums, self._xy = gram, sums, xy


@dataclass(frozen=True)
class Belief:
    """A posterior of the values at one scale of effects, with its share of a mixture; zeros: no part does anything."""

    share: float
    base: float
    mean: Array
    root: Array


@dataclass(frozen=True)
class Posterior:
    """What is believed of the features' values, averaged over tasks.

    `mean` (J,) and `root` (J, p): the values are `mean + root @ N(0, I)`, so `root @ root.T` is their covariance. This
    is the searcher's belief: it expects proposals to help a little, and so explores. `doubts` is the sceptic's, for
    whoever asks whether a gain is real: a mixture, weighted by marginal likelihood, of the same model with prior means
    of 0 and effects of several scales, the first of them none at all.
    """

    mean: Array
    root: Array
    tau: float
    task_sd: float
    noise: float
    doubts: tuple[Belief, ...]

    @property
    def nothing(self) -> float:
        """The sceptic's probability that no part does anything."""
        return self.doubts[0].share

    def sceptical(self, weights: Array, above: float = 0.0, doubt: float = 1.0) -> tuple[float, float, float]:
        """The sceptic's mean, standard deviation and P(> above) of `weights (J,) @ values`; `above` >= 0.

        `doubt`: prior odds of no effects at all against any one scale of effects.
        """
        share = self._shares(doubt)
        means = np.array([float(weights @ belief.mean) for belief in self.doubts])
        sds = np.array([float(np.linalg.norm(weights @ belief.root)) for belief in self.doubts])
        mean = float(share @ means)
        variance = float(share @ (sds**2 + means**2)) - mean**2
        z = np.where(sds > 0, (means - above) / np.maximum(sds, 1e-12), -np.inf)
        return mean, math.sqrt(max(0.0, variance)), float(share @ ndtr(z))

    def expected(self, doubt: float = 1.0) -> Array:
        """The sceptic's means (J,) of the values."""
        means: Array = self._shares(doubt) @ np.array([belief.mean for belief in self.doubts])
        return means

    def base(self, doubt: float = 1.0) -> float:
        """The sceptic's expected reward of the empty set."""
        return float(self._shares(doubt) @ np.array([belief.base for belief in self.doubts]))

    def _shares(self, doubt: float) -> Array:
        share = np.array([belief.share for belief in self.doubts])
        share[0] *= doubt
        result: Array = share / share.sum()
        return result

    def draw(self, rng: np.random.Generator, scale: float) -> Array:
        """A Thompson draw (J,) of the values, with `scale` times the posterior's standard deviations."""
        return self.mean + scale * (self.root @ rng.standard_normal(self.root.shape[1]))

    def sd(self, feature: int) -> float:
        """The standard deviation of one value."""
        return float(np.linalg.norm(self.root[feature]))

    def contrast(self, weights: Array) -> tuple[float, float]:
        """Mean and standard deviation of `weights (J,) @ values`."""
        return float(weights @ self.mean), float(np.linalg.norm(weights @ self.root))


class Model:
    """Fits `Evidence`. Keeps tau, the task sd and the noise between fits as starting points."""

    def __init__(self, priors: Priors | None = None) -> None:
        self.priors = priors or Priors()
        self.tau = self.priors.tau
        self.task_sd = self.priors.task_sd
        self.noise = self.priors.noise
        self._fits = 0

    def fit(self, evidence: Evidence, traits: Sequence[Trait]) -> Posterior:
        """The posterior given all rollouts. `traits` has one entry a feature. Deterministic."""
        layout = _Layout(traits, self.priors)
        data = _statistics(evidence, layout)
        if self._fits % 4 == 0:
            fits = {sd: _solve(data, layout.mean, layout.sd(self.tau), self.noise, sd) for sd in TASK_SDS}
            self.task_sd = max(TASK_SDS, key=lambda sd: fits[sd].evidence)
        self._fits += 1
        solved = {tau: _solve(data, layout.mean, layout.sd(tau), self.noise, self.task_sd) for tau in TAUS}
        self.tau = max(TAUS, key=lambda tau: solved[tau].evidence)
        best = solved[self.tau]
        posterior = Posterior(
            mean=layout.values @ best.mean,
            root=layout.values @ best.root,
            tau=self.tau,
            task_sd=self.task_sd,
            noise=self.noise,
            doubts=self._doubts(data, layout),
        )
        self.noise = self._noise(best, data.n)
        return posterior

    def _doubts(self, data: "_Data", layout: "_Layout") -> tuple[Belief, ...]:
        """The sceptic's mixture: no effects at all and each scale of effects, equally probable before any rollout."""
        nothing = _solve(data.only_intercept(), layout.mean[:1], layout.sd(self.tau)[:1], self.noise, self.task_sd)
        fits = [_solve(data, *layout.doubtful(tau), self.noise, self.task_sd) for tau in DOUBTS]
        logs = np.array([nothing.evidence, *(fit.evidence for fit in fits)])
        shares = np.exp(logs - logs.max())
        shares /= shares.sum()
        zeros = np.zeros(len(layout.values))
        beliefs = [Belief(float(shares[0]), float(nothing.mean[0]), zeros, zeros[:, None])]
        for share, fit in zip(shares[1:], fits, strict=True):
            beliefs.append(Belief(float(share), float(fit.mean[0]), layout.values @ fit.mean, layout.values @ fit.root))
        return tuple(beliefs)

    def _noise(self, fit: "_Fit", n: int) -> float:
        """Residual variance on residual degrees of freedom, with the prior worth `noise_weight` rollouts."""
        weight = self.priors.noise_weight
        freedom = max(1.0, n - fit.freedom)
        return float(np.clip((fit.residual + weight * self.priors.noise) / (freedom + weight), 0.005, 0.25))


class _Layout:
    """The coefficients `[b0, a_1.., b, e_1.., g_1.., gamma]`, their prior, and what they say of columns and values.

    `map` (1 + 2J, p) turns coefficients into effects of Evidence's columns; `values` (J, p) into the parts' values.
    """

    def __init__(self, traits: Sequence[Trait], priors: Priors) -> None:
        groups = sorted({trait.group for trait in traits} - FIXED)
        cited = [j for j, trait in enumerate(traits) if trait.kappa > 0]
        first = 1 + len(groups) + 1
        self.size = first + len(traits) + len(cited) + 1
        self.map = np.zeros((1 + 2 * len(traits), self.size))
        self.values = np.zeros((len(traits), self.size))
        self.map[0, 0] = 1.0
        self.mean = np.zeros(self.size)
        self._sd = np.zeros(self.size)
        self.mean[0], self._sd[0] = priors.intercept
        for index in range(len(groups)):
            self.mean[1 + index], self._sd[1 + index] = priors.mean
        self.mean[first - 1], self._sd[first - 1] = priors.citation_slope
        self._tau = np.zeros(self.size, dtype=bool)
        self._spread = np.zeros(self.size, dtype=bool)
        fixed = {"rewrite": priors.step_sd, "gate": priors.gate_sd, "last": priors.place_sd}
        for j, trait in enumerate(traits):
            present = self.map[1 + 2 * j]
            present[first + j] = 1.0
            if trait.group in fixed:
                self._sd[first + j] = fixed[trait.group]
                self._spread[first + j] = trait.group == "last"
            else:
                self._tau[first + j] = True
                present[1 + groups.index(trait.group)] = 1.0
                present[first - 1] = trait.score
            self.values[j] = present
        for index, j in enumerate(cited, start=first + len(traits)):
            kappa, share = traits[j].kappa, traits[j].share
            self.map[1 + 2 * j, index] = kappa
            self.map[2 + 2 * j, index] = 1.0 - kappa
            self.values[j, index] = share + kappa * (1.0 - share)
            for row in (self.map, self.values):
                row[:, -1] += row[:, index]
            self._sd[index] = priors.cited_spread
            self._spread[index] = True
        self.mean[-1], self._sd[-1] = priors.cited

    def sd(self, tau: float) -> Array:
        """The coefficients' prior standard deviations (p,)."""
        return np.where(self._tau, tau, self._sd)

    def doubtful(self, tau: float) -> tuple[Array, Array]:
        """Prior means and standard deviations (p,) for somebody who does not expect proposals to help."""
        mean = np.where(np.arange(self.size) == 0, self.mean, 0.0)
        return mean, np.where(self._spread, np.minimum(self._sd, SPREAD * tau), self.sd(tau))


@dataclass(frozen=True)
class _Data:
    gram: Array
    sums: Array
    xy: Array
    evidence: Evidence
    n: int

    def only_intercept(self) -> "_Data":
        """The same rollouts without any part."""
        return _Data(self.gram[:1, :1], self.sums[:, :1], self.xy[:1], self.evidence, self.n)


def _statistics(evidence: Evidence, layout: _Layout) -> _Data:
    """The evidence in the layout's coefficients."""
    gram, sums, xy = evidence.statistics()
    to = layout.map
    return _Data(to.T @ gram @ to, sums @ to, to.T @ xy, evidence, len(evidence.rows))


@dataclass(frozen=True)
class _Fit:
    mean: Array
    root: Array  # root @ root.T is the covariance
    evidence: float
    residual: float
    freedom: float


def _solve(data: _Data, mu: Array, sd: Array, noise: float, task_sd: float) -> _Fit:
    """Posterior and log marginal likelihood at fixed variances; formulas in the module's docstring."""
    counts, task_y = data.evidence.counts, data.evidence.task_y
    q = task_sd**2 / noise
    shrink = q / (1.0 + counts * q)
    a = data.gram - data.sums.T @ (shrink[:, None] * data.sums)
    r = data.xy - data.sums.T @ (shrink * task_y)
    yy = data.evidence.yy - float(shrink @ task_y**2)
    precision = a / noise + np.diag(1.0 / sd**2)
    lower = np.linalg.cholesky(precision)
    root = np.linalg.inv(lower).T
    right = r / noise + mu / sd**2
    mean = root @ (root.T @ right)
    determinant = 2.0 * float(np.log(np.diag(lower)).sum() + np.log(sd).sum())
    spread = data.n * np.log(2.0 * np.pi * noise) + float(np.log1p(counts * q).sum())
    fit = yy / noise + float((mu / sd) @ (mu / sd)) - float(right @ mean)
    residual = max(0.0, yy - 2.0 * float(mean @ r) + float(mean @ a @ mean))
    freedom = float(np.sum((a @ root) * root)) / noise
    return _Fit(mean, root, -0.5 * (spread + fit + determinant), residual, freedom)
