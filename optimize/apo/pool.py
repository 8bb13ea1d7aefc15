"""The known parts of a search: de-duplicated, grouped, with their citations, and the best subset for given values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from optimize.apo.model import Array, Evidence, Posterior, Priors, Trait
from optimize.apo.parts import Part, Skeleton, made_of, render, same_as, words

Subset = tuple[int, ...]  # indices of parts, ascending
DEMONSTRATIONS = "demonstration"
PROVEN = 1.0  # standard deviations above 0


@dataclass(frozen=True)
class Limits:
    """What a prompt may hold: demonstrations at most, parts known at most, reward that a token must be worth."""

    max_demonstrations: int = 4
    max_parts: int = 120
    token_price: float = 2e-5


@dataclass(frozen=True)
class Shown:
    """A failure that was shown to a proposer: the prompt's parts, the task, and the parts that were cited for it."""

    subset: frozenset[int]
    task: int
    cited: frozenset[int]
    known: int  # number of parts when it was shown


class Pool:
    """Parts by index. Feature j of the model is part j, except one gate: "has any demonstration"."""

    def __init__(self, skeleton: Skeleton, sentences: Sequence[Part], evidence: Evidence, limits: Limits) -> None:
        self.skeleton = skeleton
        self.limits = limits
        self.parts: list[Part] = []
        self.evidence = evidence
        self.rejected: list[tuple[str, str]] = []
        self._feature: list[int] = []
        self._gate = evidence.grow()
        self._shown: list[Shown] = []
        self._born: list[int] = []
        self._tokens: list[int] = []
        self._tied: set[int] = set()  # parts with more than one feature: their own, and an ancestor's or the gate
        self._admitted: set[int] = set()
        self._pinned = [Part(f"pinned-{index}", "sentence", text) for index, text in enumerate(skeleton.pinned)]
        for part in sentences:
            self._append(part)
        self.seed: Subset = tuple(range(len(sentences)))

    def add(self, part: Part) -> tuple[int | None, bool]:
        """`(index, new)` of the part, or of a known one that says the same; `(None, False)` where nothing is added.

        Text of an editor is matched with all its words (IDF-weighted); curated parts and demonstrations exactly.
        """
        known = [known for known in self.parts if known.kind != "rewrite" and not known.last]
        if part.source == "editor" and part.kind not in ("demonstration", "rewrite"):
            if same_as(part.text, self._pinned) is not None:
                return self._no(part, "says what the prompt says already")
            same = same_as(part.text, [other for other in known if other.kind != "demonstration"])
            if same is None and made_of(part.text, known):
                return self._no(part, "is made of known parts")
        else:
            same = next((one for one in self.parts if words(one.text) == words(part.text) and not one.last), None)
        if same is not None:
            return self.parts.index(same), False
        if len(self.parts) >= self.limits.max_parts:
            return self._no(part, f"{self.limits.max_parts} parts are known already")
        self._join_group(part)
        return self._append(part), True

    def place_last(self, index: int) -> None:
        """Adds the same part once more, to stand last: its feature is what that adds. The two exclude each other."""
        part = self.parts[index]
        group = part.group or f"place of {part.id}"
        self.parts[index] = replace(part, group=group)
        self._append(replace(part, id=f"{part.id}-last", group=group, parent=part.id, last=True))

    def probe(self, subset: Subset, values: Array, rng: np.random.Generator) -> Subset:
        """The subset, in half of all cases with the part at the end that gains most by it in a draw of `values`."""
        twins = [index for index, part in enumerate(self.parts) if part.last and self._base(index) in subset]
        best = max(twins, key=lambda index: float(values[self._feature[index]]), default=None)
        if best is None or values[self._feature[best]] < 0 or rng.random() < 0.5:
            return subset
        if any(self.parts[index].last for index in subset):
            return subset
        return tuple(sorted({*subset, best} - {self._base(best)}))

    def admit(self, posterior: Posterior) -> None:
        """A place counts for the best subset from the time on when its effect is no noise any more."""
        self._admitted = {
            index
            for index, part in enumerate(self.parts)
            if part.last and posterior.mean[self._feature[index]] > PROVEN * posterior.sd(self._feature[index])
        }

    def placed(self) -> set[str]:
        """The ids of the parts that may stand last."""
        return {part.parent for part in self.parts if part.last and part.parent is not None}

    def find(self, part_id: str) -> int | None:
        """The index of the part with this id."""
        return next((index for index, part in enumerate(self.parts) if part.id == part_id), None)

    def show(self, subset: Subset, task: int, cited: Sequence[int]) -> None:
        """Remembers that a failure was shown to an editor, and that it proposed the parts `cited` for it."""
        self._shown.append(Shown(frozenset(subset), task, frozenset(cited), len(self._born)))
        for index in cited:
            self.evidence.cite(self._feature[index], task)

    def reject(self, text: str, reason: str) -> None:
        """Keeps a proposal that was refused, with its reason, for the report."""
        self.rejected.append((text, reason))

    def _no(self, part: Part, reason: str) -> tuple[None, bool]:
        self.reject(part.text, reason)
        return None, False

    def _append(self, part: Part) -> int:
        self.parts.append(part)
        self._tokens.append(part.tokens)
        if part.parent is not None or part.kind == DEMONSTRATIONS:
            self._tied.add(len(self.parts) - 1)
        self._feature.append(self.evidence.grow())
        self._born.append(len(self._shown))
        return len(self.parts) - 1

    def _join_group(self, part: Part) -> None:
        """A replacement for a part that stood alone puts both in one group."""
        if part.group is None or not part.group.startswith("instead of "):
            return
        target = self.find(part.group.removeprefix("instead of "))
        if target is not None and self.parts[target].group is None:
            self.parts[target] = replace(self.parts[target], group=part.group)

    def feature(self, index: int) -> int:
        """The model's feature of a part."""
        return self._feature[index]

    def features(self, subset: Subset) -> list[int]:
        """The model's features of a subset: its parts, their ancestors, and the gate if it has demonstrations."""
        if self._tied.isdisjoint(subset):
            return [self._feature[index] for index in subset]
        chosen = set(subset)
        for index in subset:
            parent = self.parts[index].parent
            while parent is not None and (above := self.find(parent)) is not None:
                chosen.add(above)
                parent = self.parts[above].parent
        features = sorted(self._feature[index] for index in chosen)
        if any(self.parts[index].kind == DEMONSTRATIONS for index in subset):
            features.insert(0, self._gate)
        return features

    def traits(self, tasks: int, priors: Priors) -> list[Trait]:
        """One a feature, from the citations so far. `tasks` is the number of tasks of the search."""
        harvested = len({shown.task for shown in self._shown})
        scores = self._scores()
        traits = [Trait("gate")]
        for index, part in enumerate(self.parts):
            cited = len(self.evidence.cited[self._feature[index]])
            kappa = min(priors.cited_most, priors.cited_factor * cited / max(5, harvested))
            traits.append(Trait(_class(part), scores[index], kappa, cited / tasks))
        return traits

    def _scores(self) -> Array:
        """Standardised log citation rates while absent; 0 for parts that no editor proposed."""
        rates = np.full(len(self.parts), np.nan)
        for index, part in enumerate(self.parts):
            if part.source == "editor" and not part.last:
                absent = [shown for shown in self._shown[self._born[index] :] if index not in shown.subset]
                cites = sum(index in shown.cited for shown in absent)
                rates[index] = math.log((cites + 0.5) / (len(absent) + 10.0))
        known = rates[~np.isnan(rates)]
        if len(known) < 2 or known.std() < 1e-9:
            return np.zeros(len(self.parts))
        scores: Array = np.where(np.isnan(rates), 0.0, (rates - known.mean()) / known.std())
        return scores

    def best(self, values: Array) -> Subset:
        """The subset with the highest sum of `values` (one a feature) less the price of its tokens."""
        net = np.array([values[self._feature[index]] for index in range(len(self.parts))])
        for index, part in enumerate(self.parts):
            if part.last:
                net[index] += values[self._feature[self._base(index)]] if index in self._admitted else -np.inf
        net -= self.limits.token_price * np.array(self._tokens)
        chosen = self._lines(net, ("instruction", "format")) + self._shots(net, float(values[self._gate]))
        sentences = self._lines(net, ("sentence",))
        rewrite, worth = self._rewrite(values)
        if rewrite is not None and worth > sum(net[index] for index in sentences):
            chosen = [*chosen, rewrite]
        else:
            chosen = self._exclusive([*chosen, *sentences], net)
        subset = tuple(sorted(chosen))
        return (
            subset
            if self._pinned or self.render(subset).strip()
            else (max(self.seed, key=lambda index: float(net[index])),)
        )

    def _lines(self, net: Array, kinds: tuple[str, ...]) -> list[int]:
        wanted = [index for index, part in enumerate(self.parts) if part.kind in kinds and net[index] > 0]
        return self._one_last(self._exclusive(wanted, net), net)

    def _base(self, index: int) -> int:
        """The part that a `last` one is made from."""
        parent = self.parts[index].parent
        return next(at for at, part in enumerate(self.parts) if part.id == parent)

    def _one_last(self, chosen: Sequence[int], net: Array) -> list[int]:
        """Only one part can stand last: the one that gains most by it; the others go back to where they stood."""
        lasts = [index for index in chosen if self.parts[index].last]
        best = max(lasts, key=lambda index: float(net[index] - net[self._base(index)]), default=None)
        back = [self._base(index) for index in lasts if index != best]
        kept = [index for index in chosen if not self.parts[index].last or index == best]
        return kept + [index for index in back if net[index] > 0]

    def _exclusive(self, indices: Sequence[int], net: Array) -> list[int]:
        """The indices with at most one member of each group: the best."""
        best: dict[str, int] = {}
        for index in indices:
            group = self.parts[index].group
            if group is not None and (group not in best or net[index] > net[best[group]]):
                best[group] = index
        return [index for index in indices if best.get(self.parts[index].group or "", index) == index]

    def _shots(self, net: Array, gate: float) -> list[int]:
        order = sorted(
            (index for index, part in enumerate(self.parts) if part.kind == DEMONSTRATIONS),
            key=lambda index: -net[index],
        )[: self.limits.max_demonstrations]
        shots = [index for place, index in enumerate(order) if place == 0 or net[index] > 0]
        return shots if shots and gate + sum(net[index] for index in shots) > 0 else []

    def _rewrite(self, values: Array) -> tuple[int | None, float]:
        best, worth = None, 0.0
        for index, part in enumerate(self.parts):
            if part.kind == "rewrite":
                value = float(sum(values[feature] for feature in self.features((index,))))
                if best is None or value > worth:
                    best, worth = index, value
        return best, worth

    def render(self, subset: Subset) -> str:
        """The template of a subset."""
        return render(self.skeleton, [self.parts[index] for index in subset])

    def ids(self, subset: Subset) -> tuple[str, ...]:
        """The ids of a subset's parts."""
        return tuple(self.parts[index].id for index in subset)

    def without(self, subset: Subset, tasks: frozenset[str]) -> Subset:
        """The subset less the parts made of data of these tasks: nobody is examined on an example it was shown."""
        return tuple(index for index in subset if not tasks.intersection(self.parts[index].tasks))


def _class(part: Part) -> str:
    if part.last:
        return "last"
    return "added" if part.kind in ("instruction", "format") else part.kind
