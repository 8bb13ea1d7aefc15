"""Credit, measured where the truth is known: `python -m bench.credit` prints three tables.

1. Gradient bias: the mean of (advantage x score) against the policy gradient in closed form, true V.
2. Distance to the true advantages, with V fitted by the product (`assign`, cross-fitted ridge on the steps' text).
3. Learning speed: episodes until a softmax policy earns 90 % of what can be gained, per-step credit against broadcast.
"""

import os

# The matrices are small: threads of the linear algebra only wait for each other. Read when numpy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from bench.mdp import MDP, Batch, Floats, chain, key_door, lock, score, tally, walk
from collector.model import Episode, Step
from optimize import credit

Table = dict[str, dict[str, float]]
# (problem, batch, true V (T+1, S+1)) -> advantages (T_i,) of each episode
Method = Callable[[MDP, Batch, Floats], list[Floats]]


def rewards_of(batch: Batch) -> list[Floats]:
    """Each episode's rewards, cut to its length."""
    return [row[:size] for row, size in zip(batch.rewards, batch.lengths, strict=True)]


def values_of(batch: Batch, values: Floats) -> list[Floats]:
    """V (T_i + 1,) along each episode, 0 at its end."""
    steps = np.arange(batch.states.shape[1])
    rows = values[steps, batch.states]
    return [np.append(row[:size], 0.0) for row, size in zip(rows, batch.lengths, strict=True)]


def whole(problem: MDP, batch: Batch, values: Floats) -> list[Floats]:
    """Broadcast of the discounted return (gamma^t taken out again, since the gradient puts it in)."""
    totals = [float(credit.discounted(row, problem.gamma)[0]) for row in rewards_of(batch)]
    return [_flat(problem, total, size) for total, size in zip(totals, batch.lengths, strict=True)]


def left_out(problem: MDP, batch: Batch, values: Floats) -> list[Floats]:
    """The same, with the others' mean as baseline."""
    totals = [float(credit.discounted(row, problem.gamma)[0]) for row in rewards_of(batch)]
    return [
        _flat(problem, total, size) for total, size in zip(credit.leave_one_out(totals), batch.lengths, strict=True)
    ]


def _flat(problem: MDP, total: float, size: int) -> Floats:
    return credit.broadcast(total, int(size)) / problem.gamma ** np.arange(size)


def returns(problem: MDP, batch: Batch, values: Floats) -> list[Floats]:
    """Return-to-go."""
    return [credit.discounted(row, problem.gamma) for row in rewards_of(batch)]


def reshaped(problem: MDP, batch: Batch, values: Floats) -> list[Floats]:
    """Return-to-go of rewards shaped by the true V."""
    pairs = zip(rewards_of(batch), values_of(batch, values), strict=True)
    return [credit.discounted(credit.shaped(row, v, problem.gamma), problem.gamma) for row, v in pairs]


def gae(lam: float) -> Method:
    """GAE with the given V."""

    def method(problem: MDP, batch: Batch, values: Floats) -> list[Floats]:
        pairs = zip(rewards_of(batch), values_of(batch, values), strict=True)
        return [credit.gae(row, v, problem.gamma, lam) for row, v in pairs]

    return method


def anchored(problem: MDP, batch: Batch, values: Floats) -> list[Floats]:
    """GiGPO with the others' mean, halved: episode and step part each aim at the whole gradient (gamma 1 only)."""
    going = returns(problem, batch, values)
    sizes = batch.lengths
    totals, owners = np.repeat([one[0] for one in going], sizes), np.repeat(np.arange(len(sizes)), sizes)
    states = np.concatenate([row[:size] for row, size in zip(batch.states, sizes, strict=True)])
    found = credit.gigpo(np.concatenate(going), states, totals, owners, 1.0, normalise=False) / 2
    return np.split(found, np.cumsum(sizes)[:-1])


BIAS: dict[str, Method] = {
    "broadcast": whole,
    "discounted": returns,
    "leave_one_out": left_out,
    "gae 1": gae(1.0),
    "gae 0.95": gae(0.95),
    "gae 0.5": gae(0.5),
    "gae 0 (TD)": gae(0.0),
    "shaped": reshaped,
    "gigpo": anchored,
}


def bias(batches: int = 400, size: int = 64, seed: int = 0) -> tuple[Table, Table]:
    """Per problem and method: bias along the gradient in standard errors of it, and the estimate's spread."""
    errors: Table = {}
    spreads: Table = {}
    for problem in (chain(5, 2), key_door(3), lock(3), walk(3, 6)):
        rng = np.random.default_rng(seed)
        theta = rng.normal(0, 0.5, problem.gains.shape)
        values, truth = problem.values(theta)[0], problem.gradient(theta)
        found: dict[str, list[Floats]] = {name: [] for name in BIAS if name != "gigpo" or problem.gamma == 1}
        for _ in range(batches):
            batch = problem.sample(theta, size, rng)
            for name, rows in found.items():
                rows.append(estimate(problem, theta, batch, BIAS[name](problem, batch, values)))
        along = {name: np.tensordot(rows, truth, 2) / float((truth**2).sum()) - 1 for name, rows in found.items()}
        errors[problem.name] = {name: _sigmas(one) for name, one in along.items()}
        spreads[problem.name] = {name: float(np.sqrt(np.var(rows, axis=0).sum())) for name, rows in found.items()}
    return errors, spreads


def _sigmas(sample: Floats) -> float:
    return float(sample.mean() / (sample.std(ddof=1) / math.sqrt(len(sample))))


def estimate(problem: MDP, theta: Floats, batch: Batch, advantages: list[Floats]) -> Floats:
    """The batch's mean of sum_t gamma^t A_t d log pi."""
    factors = np.concatenate([problem.gamma ** np.arange(len(one)) * one for one in advantages])
    kept = np.arange(batch.states.shape[1]) < batch.lengths[:, None]
    return score(theta, problem.seen[batch.states[kept]], batch.actions[kept], factors) / len(batch.lengths)


def episodes_of(problem: MDP, batch: Batch) -> list[Episode]:
    """The batch as logged episodes: each input tells the state in words, rewards are posted on their steps."""
    made = []
    for number, size in enumerate(batch.lengths):
        steps = []
        for t in range(size):
            text = f"you are at place {batch.states[number, t]}"
            messages = [{"role": "user", "content": problem.name}, {"role": "tool", "content": text}]
            reward = float(batch.rewards[number, t])
            given = [{"name": "reward", "value": reward}] if reward or t == size - 1 else []
            steps.append(Step(f"{number}-{t}", t, "agent", None, {}, messages, [], None, None, given))
        made.append(Episode(f"episode {number}", steps, [], None))
    return made


FITTED: dict[str, tuple[str, dict[str, Any]]] = {
    "broadcast": ("broadcast", {}),
    "leave_one_out": ("leave_one_out", {}),
    "return - V": ("shaped", {}),
    "gae 0.95": ("gae", {"lam": 0.95}),
    "gae 0.5": ("gae", {"lam": 0.5}),
    "gae 0 (TD)": ("gae", {"lam": 0.0}),
    "td_lambda 0.8": ("td_lambda", {"lam": 0.8}),
    "td_lambda 0.5": ("td_lambda", {"lam": 0.5}),
    "td_lambda 0": ("td_lambda", {"lam": 0.0}),
    "gigpo, unscaled": ("gigpo", {"gamma": 1.0, "normalise": False}),
}


def distance(seeds: int = 5, count: int = 400) -> Table:
    """RMSE of each method's advantages to the true ones, mean over seeds, uniform policy."""
    table: Table = {}
    for problem in (chain(5, 2), chain(8, 1), key_door(4), lock(4), walk(4, 10, gamma=1.0)):
        theta = np.zeros(problem.gains.shape)
        values, q = problem.values(theta)
        rows: dict[str, list[float]] = {name: [] for name in FITTED}
        for seed in range(seeds):
            batch = problem.sample(theta, count, np.random.default_rng(seed))
            kept = np.arange(problem.horizon) < batch.lengths[:, None]
            steps = np.broadcast_to(np.arange(problem.horizon), kept.shape)
            true = (q[steps, batch.states, batch.actions] - values[steps, batch.states])[kept]
            logged = episodes_of(problem, batch)
            for name, (method, params) in FITTED.items():
                given = {**params, **({"gamma": problem.gamma} if method in ("gae", "td_lambda", "shaped") else {})}
                found = np.array([one.advantage for one in credit.assign(logged, method, **given)])
                rows[name].append(float(np.sqrt(np.mean((found - true) ** 2))))
        table[problem.name] = {name: float(np.mean(one)) for name, one in rows.items()}
    return table


TASKS: list[Callable[[], MDP]] = [
    lambda: tally(6, noise=0.3),
    lambda: tally(12, noise=0.3),
    lambda: tally(12, noise=0.3, every=3),
    lambda: key_door(6, noise=1.0, actions=4),
    lambda: lock(4, noise=0.3),
    lambda: walk(4, 12, gamma=1.0),
]
LEARNERS = ("broadcast", "broadcast, leave-one-out", "gae 0.95", "gae 0.5", "gae 0")
RATES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
BATCH, LIMIT, MEMORY, FOLDS = 8, 1200, 8, 4


def learn(problem: MDP, learner: str, rate: float, seed: int, goal: float = 0.9) -> int:
    """Episodes until the policy's exact return reaches `goal` of the way to the best; LIMIT where it doesn't."""
    rng = np.random.default_rng([seed, 11])
    theta = problem.indifferent()
    start, best = problem.objective(theta), problem.best()
    memory: list[tuple[Floats, Floats]] = []
    for done in range(0, LIMIT, BATCH):
        if (problem.objective(theta) - start) >= goal * (best - start):
            return done
        batch = problem.sample(theta, BATCH, rng)
        if learner.startswith("gae"):
            advantages, sums = fitted_gae(problem, batch, memory, float(learner.split()[-1]))
            memory = [*memory, sums][-MEMORY:]
        else:
            advantages = (whole if learner == "broadcast" else left_out)(problem, batch, batch.rewards)
        theta = theta + rate * estimate(problem, theta, batch, advantages)
    return LIMIT


def fitted_gae(
    problem: MDP, batch: Batch, memory: list[tuple[Floats, Floats]], lam: float
) -> tuple[list[Floats], tuple[Floats, Floats]]:
    """GAE with V by ridge on the states' features, fitted to the returns of the last batches and of this one's other
    folds: no episode judges itself, and no episode is played for V alone. Also this batch's sums for the next ones.
    """
    states = len(problem.gains)
    plain = np.eye(states + 1)[:, :states] if problem.features is None else problem.features
    features = np.column_stack([plain, np.ones(states + 1)])
    rewards = rewards_of(batch)
    sums = []
    for row, gained in zip(batch.states, rewards, strict=True):
        seen = features[row[: len(gained)]]
        sums.append((seen.T @ seen, seen.T @ credit.discounted(gained, problem.gamma)))
    penalty = np.diag([1.0] * plain.shape[1] + [1e-6])
    gram = penalty + sum(one for one, _ in [*memory, *sums])
    moments = sum((one for _, one in [*memory, *sums]), np.zeros(len(penalty)))
    advantages: list[Floats] = [np.zeros(0)] * len(rewards)
    for fold in range(FOLDS):
        held = range(fold, len(rewards), FOLDS)
        less = np.linalg.solve(gram - sum(sums[at][0] for at in held), moments - sum(sums[at][1] for at in held))
        table = features @ less
        for at in held:
            valued = np.append(table[batch.states[at, : len(rewards[at])]], 0.0)
            advantages[at] = credit.gae(rewards[at], valued, problem.gamma, lam)
    return advantages, (sum(one for one, _ in sums), sum(one for _, one in sums))


def _mean(job: tuple[int, str, float, range]) -> tuple[float, float]:
    """Mean episodes over seeds, and the share that reached the goal."""
    task, learner, rate, seeds = job
    counts = [learn(TASKS[task](), learner, rate, seed) for seed in seeds]
    return float(np.mean(counts)), float(np.mean([count < LIMIT for count in counts]))


def speed(tuning: int = 3, testing: int = 12) -> tuple[Table, Table]:
    """Mean episodes to the goal and the share of runs that got there.

    Every learner gets its own best learning rate, chosen on `tuning` seeds; the figures are of `testing` other seeds.
    """
    jobs = [(task, learner) for task in range(len(TASKS)) for learner in LEARNERS]
    trials = [(task, learner, rate, range(tuning)) for task, learner in jobs for rate in RATES]
    with ProcessPoolExecutor(2) as pool:
        tried = dict(zip(trials, pool.map(_mean, trials), strict=True))
        chosen = {
            job: min(RATES, key=lambda rate, job=job: tried[(*job, rate, range(tuning))][0])  # type: ignore[misc]
            for job in jobs
        }
        tests = [(task, learner, chosen[task, learner], range(100, 100 + testing)) for task, learner in jobs]
        results = dict(zip(jobs, pool.map(_mean, tests), strict=True))
    counts: Table = {TASKS[task]().name: {} for task, _ in jobs}
    reached: Table = {name: {} for name in counts}
    for (task, learner), (count, share) in results.items():
        counts[TASKS[task]().name][learner] = count
        reached[TASKS[task]().name][learner] = share
    return counts, reached


def measure() -> dict[str, Any]:
    """All figures: tables by problem and method, and the measures drawn from them."""
    errors, spreads = bias()
    rmse = distance()
    episodes, reached = speed()
    ratios = {problem: {name: value / row["broadcast"] for name, value in row.items()} for problem, row in rmse.items()}
    return {
        "bias_sigmas": errors,
        "gradient_spread": spreads,
        "rmse": rmse,
        "rmse_ratio": ratios,
        "episodes": episodes,
        "reached": reached,
        "measures": {
            "bias_sigmas_max": max(abs(one) for row in errors.values() for one in row.values()),
            **{f"rmse_ratio {name}": _geometric([row[name] for row in ratios.values()]) for name in FITTED},
            **{f"episodes_ratio {name}": _geometric(against(episodes, name)) for name in LEARNERS[2:]},
        },
    }


def against(episodes: Table, learner: str) -> list[float]:
    """Episodes of a learner over those of the better of the two broadcasts, for each task."""
    return [row[learner] / min(row[LEARNERS[0]], row[LEARNERS[1]]) for row in episodes.values()]


def _geometric(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def show(title: str, table: Table, form: str = "{:.3f}") -> None:
    """One table, problems across."""
    print(f"\n{title}")
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    width = max(len(name) for name in names) + 2
    print(" " * width + "  ".join(f"{problem:>26}" for problem in table))
    for name in names:
        cells = (form.format(row[name]) if name in row else "-" for row in table.values())
        print(f"{name:<{width}}" + "  ".join(f"{cell:>26}" for cell in cells))


def main() -> dict[str, Any]:
    """Measure, print, return the figures."""
    begun = time.monotonic()
    found = measure()
    show("Gradient bias, in standard errors", found["bias_sigmas"], "{:+.2f}")
    show("Spread of the gradient estimate, 64 episodes", found["gradient_spread"], "{:.4f}")
    show("RMSE to the true advantages, fitted V, 400 episodes", found["rmse"])
    show("... over broadcast's", found["rmse_ratio"])
    show("Episodes to 90 % of the gain, each with its best learning rate", found["episodes"], "{:.0f}")
    show("Share of runs that got there", found["reached"], "{:.2f}")
    for name, value in found["measures"].items():
        print(f"{name}: {value:.3f}")
    print(f"{time.monotonic() - begun:.0f} s")
    return found


if __name__ == "__main__":
    main()
