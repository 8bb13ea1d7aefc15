"""The fitted value function V(state): how much an episode still earns from here, judged by *other* episodes.

Every value is cross-fitted: an episode's values come from a model that never saw that episode's rewards. A value that
knows its own episode's outcome would explain the luck away and bias the gradient; one that doesn't is a baseline.
"""

import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from optimize.arrays import Floats, expect
from optimize.state import State, digest

Predict = Callable[[Floats], Floats]
# (episode's index, values (T,) of its steps) -> new targets (T,)
Refine = Callable[[int, Floats], Floats]

WORD = re.compile(r"\w+")


class ValueModel(Protocol):
    """A regressor that `cross_fit` can use; put an embedding or a network behind it where the default is too weak."""

    def features(self, states: Sequence[State]) -> Floats:
        """Shape (M, F). Called once; must use nothing but the states."""
        ...

    def fit(self, features: Floats, targets: Floats, weights: Floats, episodes: NDArray[np.intp]) -> Predict:
        """A function (K, F) -> (K,) of M training steps. Steps of one entry of `episodes` share their luck."""
        ...


@dataclass(frozen=True)
class Ridge:
    """Weighted ridge regression on hashed text and step features; the penalty is chosen on left-out episodes.

    Features: the words of the task, of the last message and of all messages (signed hashing, Weinberger et al. 2009,
    arXiv 0902.2206), each block of length 1; the step's number and role; and the whole input as one indicator, so that
    states which come often are learnt exactly. `penalties` are in episodes: the largest falls back to the mean.
    """

    dimensions: int = 512
    penalties: tuple[float, ...] = (0.03, 0.3, 3.0, 30.0, 300.0, 1e6)
    folds: int = 3

    def features(self, states: Sequence[State]) -> Floats:
        """Shape (M, dimensions + 1): hashed features, and the logarithm of the step's number."""
        result = np.zeros((len(states), self.dimensions + 1))
        known: dict[str, tuple[NDArray[np.intp], Floats]] = {}
        for row, state in enumerate(states):
            name = f"{state.step} {state.digest}"
            if name not in known:
                known[name] = self._hashed(state)
            columns, values = known[name]
            np.add.at(result[row], columns, values)
            result[row, -1] = np.log1p(state.step)
        return result

    def fit(self, features: Floats, targets: Floats, weights: Floats, episodes: NDArray[np.intp]) -> Predict:
        """The penalty with the least error on left-out episodes, then a fit on all of them."""
        active = np.flatnonzero(np.abs(features).max(axis=0) > 0)
        x = features[:, active]
        parts = episodes % self.folds
        errors = np.zeros(len(self.penalties))
        for part in range(self.folds if len(np.unique(episodes)) >= 2 * self.folds else 0):
            held = parts == part
            if held.any() and not held.all():
                guesses = x[held] @ (fitted := _solve(x[~held], targets[~held], weights[~held], self.penalties))[0]
                errors += weights[held] @ (guesses + fitted[1] - targets[held, None]) ** 2
        # With too few episodes to choose by, the errors are equal: the largest penalty, the mean.
        best = len(self.penalties) - 1 - int(np.argmin(errors[::-1]))
        slope, offset = _solve(x, targets, weights, (self.penalties[best],))

        def predict(rows: Floats) -> Floats:
            result: Floats = rows[:, active] @ slope[:, 0] + offset[0]
            return result

        return predict

    def _hashed(self, state: State) -> tuple[NDArray[np.intp], Floats]:
        columns: list[int] = []
        values: list[float] = []
        texts = {"task": state.task, "last": state.last, "all": state.text}
        blocks = {block: Counter(WORD.findall(text)) for block, text in texts.items()}
        blocks["place"] = Counter([f"step {state.step}", f"role {state.role}"])
        blocks["whole"] = Counter([f"{state.step} {state.digest}", state.digest])
        for block, words in blocks.items():
            counts = np.sqrt(np.fromiter(words.values(), np.float64, len(words)))
            length = float(np.linalg.norm(counts)) or 1.0
            for word, count in zip(words, counts, strict=True):
                code = zlib.crc32(f"{block}:{word}".encode("utf-8", "surrogatepass"))
                columns.append((code >> 1) % self.dimensions)
                values.append(float(count) / length * (1 if code & 1 else -1))
        return np.array(columns, dtype=np.intp), np.array(values)


def cross_fit(
    ids: Sequence[str],
    states: Sequence[Sequence[State]],
    targets: Sequence[Floats],
    model: ValueModel,
    *,
    folds: int = 5,
    refine: Refine | None = None,
    rounds: int = 0,
) -> list[Floats]:
    """V of every step, from models fitted to the other folds' episodes only.

    `ids` (N,), `states` and `targets` (N lists of T_i steps) -> N arrays (T_i,). Each episode weighs the same however
    long it is. With `refine`, targets are bootstrapped from the model's own values `rounds` times, within the training
    episodes. Folds depend on the ids alone, not on the order of the episodes. One episode has no others: 0.
    """
    expect(isinstance(folds, int) and folds >= 2, "folds", "must be a whole number >= 2", folds)
    order = sorted(range(len(ids)), key=lambda index: (digest(ids[index]), ids[index]))
    values = [np.zeros(len(steps)) for steps in states]
    filled = [index for index in order if len(states[index])]
    if len(filled) < 2:
        return values
    flat = model.features([state for index in filled for state in states[index]])
    bounds = np.cumsum([len(states[index]) for index in filled])[:-1]
    rows = dict(zip(filled, np.split(flat, bounds), strict=True))
    folds = min(folds, len(filled))
    for fold in range(folds):
        training = [index for place, index in enumerate(filled) if place % folds != fold]
        predict = _fit(model, training, rows, targets, refine, rounds)
        for index in filled[fold::folds]:
            values[index] = predict(rows[index])
    return values


def _fit(
    model: ValueModel,
    training: Sequence[int],
    rows: dict[int, Floats],
    targets: Sequence[Floats],
    refine: Refine | None,
    rounds: int,
) -> Predict:
    sizes = [len(rows[index]) for index in training]
    x = np.concatenate([rows[index] for index in training])
    weights = np.repeat(1 / np.array(sizes), sizes)
    episodes = np.repeat(np.arange(len(training)), sizes)
    predict = model.fit(x, np.concatenate([targets[index] for index in training]), weights, episodes)
    if refine is None:
        return predict
    for _ in range(rounds):
        current = np.split(predict(x), np.cumsum(sizes)[:-1])
        better = [refine(index, value) for index, value in zip(training, current, strict=True)]
        predict = model.fit(x, np.concatenate(better), weights, episodes)
    return predict


def _solve(x: Floats, y: Floats, weights: Floats, penalties: Sequence[float]) -> tuple[Floats, Floats]:
    """Slopes (F, P) and offsets (P,) of weighted ridge regressions, one for each penalty; offsets are free."""
    total = weights.sum()
    middle = weights @ x / total
    level = float(weights @ y / total)
    centred = x - middle
    weighted = centred * weights[:, None]
    sizes, axes = np.linalg.eigh(weighted.T @ centred)
    moments = axes.T @ (weighted.T @ (y - level))
    slopes: Floats = axes @ (moments[:, None] / (np.maximum(sizes, 0)[:, None] + np.asarray(penalties)[None, :]))
    offsets: Floats = level - middle @ slopes
    return slopes, offsets
