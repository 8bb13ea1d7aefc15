"""Simulated task worlds with a known optimum, and a scripted, imperfect editor. Needs numpy alone.

Base world: 10 useful rules with weights falling as 1 / (rank + 1)^0.7 and 10 distractors; each task needs 2 useful
rules; P(success) = .15 + .75 * (share of its needed rules in the prompt) - .03 * (distractors in it), clipped to
[.02, .98]. The editor reads failures; for each it names a truly missing rule with probability `hit`, else a distractor;
it cites a wrong failure in 20 % of cases, and its full rewrite drops each old rule and the placeholder with
probability .1 each. The other worlds change one thing; a score is 0 for the seed's true value and 1 for the optimum's.
"""

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SEED_PROMPT = "Solve the task below with care.\n\nTask: {input}"
TRAIN, VAL, HELD, TRUTH = 60, 40, 80, 400
FLOOR, TOP = 0.02, 0.98
_SYLLABLES = ["ba", "ke", "di", "fo", "gu", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "zo", "wu"]
_WORDS = ["".join(pair) for pair in itertools.product(_SYLLABLES, repeat=2)]
_FORMS = (
    "Always {0} the {1} before {2} and {3}.",
    "Make sure to {0} every {1} ahead of {2} and {3}.",
    "Before {2} and {3}, {0} the {1}.",
    "The {1} needs to be {0} prior to {2}, then {3}.",
)
_STYLE = re.compile(r"style (zq\d+)")


@dataclass(frozen=True)
class Spec:
    """What makes a world. Names of the fields: see the module's docstring and `World.success`."""

    name: str
    useful: int = 10
    distractors: int = 10
    base: float = 0.15
    gain: float = 0.75
    harm: float = 0.03
    cost: float = 0.0  # of every rule in the prompt, useful or not
    hit: float = 0.5
    miscite: float = 0.2
    drop: float = 0.1  # of each old rule, and of the placeholder, in a rewrite
    train: int = TRAIN
    val: int = VAL
    need: int = 2
    interact: bool = False
    spread: float = 0.0  # share of tasks that are impossible, and as many trivial
    noise: float | None = None  # graded rewards with this sd instead of successes
    free: bool = False  # rules in varying words, two in a sentence at times
    gate: bool = False  # one more rule without which the others count 0.4, and 0.7 where it does not stand last
    opaque: bool = False  # a rewrite's quality is one number; nothing can be harvested
    chain: bool = False  # a rule does nothing before the one it builds on is there
    dilute: int = 0  # above this many rules each further one takes from all


SPECS = {
    spec.name: spec
    for spec in [
        Spec("base"),
        Spec("clean", hit=0.9, miscite=0.05),
        Spec("weak", hit=0.2),
        Spec("interact", interact=True),
        Spec("ceiling", base=0.82, gain=0.12),
        Spec("length", cost=0.015),
        Spec("graded", noise=0.15),
        Spec("hetero", spread=0.2),
        Spec("free", free=True),
        Spec("format", gate=True),
        Spec("K30", useful=30),
        Spec("small", train=20, val=20),
        Spec("harm", harm=0.12, hit=0.3),
        Spec("opaque", opaque=True),
        Spec("patch", drop=0.0),
        Spec("chain", chain=True),
        Spec("dilute", dilute=6),
        Spec("null", base=0.5, gain=0.0, harm=0.0),
        Spec("null-low", base=0.15, gain=0.0, harm=0.0),
        Spec("null-high", base=0.8, gain=0.0, harm=0.0),
    ]
}
SCORED = tuple(name for name in SPECS if not name.startswith("null"))
PUBLISHED = SCORED[:15]  # the worlds of the comparison; `chain` and `dilute` were made to break the idea
NULLS = tuple(name for name in SPECS if name.startswith("null"))


@dataclass(frozen=True)
class Edit:
    """What the editor made of some failures: the rules it names, each with the tasks it cites, and its full rewrite."""

    units: tuple[tuple[str, tuple[str, ...]], ...]
    rewrite: str
    whole: bool = False  # the rewrite replaces everything; there are no units


@dataclass
class World:
    """One world, drawn from `spec` with `seed`. `rollouts` counts what was paid."""

    spec: Spec
    seed: int
    rollouts: int = 0
    _quality: dict[str, float] = field(default_factory=dict)
    _seen: dict[str, "Found"] = field(default_factory=dict)
    _ends: tuple[float, float] | None = None  # the values of the seed and of the optimum

    def __post_init__(self) -> None:
        spec, rng = self.spec, np.random.default_rng([self.seed, 77])
        self.rules = spec.useful + spec.distractors + spec.gate
        order = rng.permutation(spec.useful)
        weights = 1.0 / np.arange(1, spec.useful + 1) ** 0.7
        self.probability = (weights / weights.sum())[order]
        self.train = [f"train-{index}" for index in range(spec.train)]
        self.val = [f"val-{index}" for index in range(spec.val)]
        self.held = [f"held-{index}" for index in range(HELD)]
        truth = [f"truth-{index}" for index in range(TRUTH)]
        names = [*self.train, *self.val, *self.held, *truth]
        needs = np.zeros((len(names), spec.useful))
        for row in needs:
            row[rng.choice(spec.useful, spec.need, replace=False, p=self.probability)] = 1.0
        self.needs = dict(zip(names, needs, strict=True))
        self._truth = needs[-TRUTH:]
        kinds = rng.random(len(names))
        fixed = np.where(kinds < spec.spread, FLOOR, np.where(kinds > 1 - spec.spread, TOP, np.nan))
        self.fixed = {name: value for name, value in zip(names, fixed, strict=True) if not np.isnan(value)}
        self._fixed = fixed[-TRUTH:]
        pairs = rng.permutation(spec.useful)
        self.together = [tuple(pairs[k : k + 2]) for k in (0, 2)] if spec.interact else []
        self.clash = [tuple(pairs[k : k + 2]) for k in (4, 6)] if spec.interact else []
        self.builds_on = {int(b): int(a) for a, b in itertools.pairwise(order[:4])} if spec.chain else {}

    @property
    def tasks(self) -> list[str]:
        """What a search may use."""
        return [*self.train, *self.val]

    def found(self, template: str) -> "Found":
        """What of this world is in a prompt."""
        if template not in self._seen:
            self._seen[template] = self._read(template)
        return self._seen[template]

    def _read(self, template: str) -> "Found":
        places = {rule: template.find(_key(rule)) for rule in range(self.rules)}
        rules = frozenset(rule for rule, place in places.items() if place >= 0)
        last = max(rules, key=lambda rule: places[rule], default=None)
        style = _STYLE.search(template)
        quality = self._quality.get(style.group(1), 0.0) if style else 0.0
        return Found(rules, last, quality, "{input}" in template)

    def _success(self, found: "Found", needs: Array, fixed: Array) -> Array:
        """P(success) (T,) of a prompt on tasks with the needs (T, useful); `fixed` (T,) is NaN where they decide."""
        spec = self.spec
        if not found.whole:
            return np.full(len(needs), FLOOR)
        if spec.opaque:
            return np.full(len(needs), spec.base + spec.gain * found.quality)
        working = np.zeros(spec.useful)
        working[[rule for rule in found.rules if rule < spec.useful]] = 1.0
        for a, b in self.together:
            if not working[a] * working[b]:
                working[[a, b]] = 0.0
        for rule in sorted(self.builds_on, key=self._depth):
            working[rule] *= working[self.builds_on[rule]]
        share = needs @ working / spec.need
        bad = sum(spec.useful <= rule < spec.useful + spec.distractors for rule in found.rules)
        clashes = sum(bool(working[a] * working[b]) for a, b in self.clash)
        effect = spec.gain * share * self._gate(found) * self._dilution(found)
        p = spec.base + effect - spec.harm * bad - spec.cost * len(found.rules) - 0.15 * clashes
        return np.where(np.isnan(fixed), np.clip(p, FLOOR, TOP), fixed)

    def _depth(self, rule: int) -> int:
        return 1 + self._depth(self.builds_on[rule]) if rule in self.builds_on else 0

    def _gate(self, found: "Found") -> float:
        if not self.spec.gate:
            return 1.0
        gate = self.rules - 1
        return 0.4 if gate not in found.rules else 1.0 if found.last == gate else 0.7

    def _dilution(self, found: "Found") -> float:
        return min(1.0, self.spec.dilute / max(1, len(found.rules))) if self.spec.dilute else 1.0

    def success(self, template: str, task: str) -> float:
        """The expected reward of a prompt on one task."""
        fixed = np.array([self.fixed.get(task, np.nan)])
        return float(self._success(self.found(template), self.needs[task][None], fixed)[0])

    def value(self, template: str) -> float:
        """The expected reward over 400 other tasks of the same kind."""
        return float(self._success(self.found(template), self._truth, self._fixed).mean())

    def optimum(self) -> float:
        """The greatest value of any prompt: exact where rules don't trade off, and by enumeration where they do."""
        spec = self.spec
        if spec.opaque:
            return spec.base + spec.gain
        wanted = self._truth[np.isnan(self._fixed)].sum(axis=0)
        ranked = [int(rule) for rule in np.argsort(-wanted)]
        drops = itertools.product(*[((), (a,), (b,), (a, b)) for a, b in self.clash])
        gate = frozenset((self.rules - 1,)) if spec.gate else frozenset()
        sets = [
            frozenset(ranked[:size]) - {rule for drop in choice for rule in drop} | gate
            for choice in drops
            for size in range(1, spec.useful + 1)
        ]
        last = self.rules - 1 if spec.gate else None
        return max(
            float(self._success(Found(rules, last, 0.0, True), self._truth, self._fixed).mean()) for rules in sets
        )

    def score(self, template: str) -> float:
        """0 for the seed's value, 1 for the optimum's; in a null world the value less the seed's."""
        floor, top = self._ends = self._ends or (self.value(SEED_PROMPT), self.optimum())
        gain = self.value(template) - floor
        return gain / (top - floor) if top - floor > 1e-9 else gain

    def reward(self, template: str, task: str, replicate: int, run: str = "") -> float:
        """One paid rollout; its luck depends on what is asked alone, not on when."""
        self.rollouts += 1
        name = f"{self.seed}|{template}|{task}|{replicate}|{run}"
        luck = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()[:8]))
        p = self.success(template, task)
        if self.spec.noise is not None:
            return float(np.clip(p + self.spec.noise * luck.standard_normal(), 0.0, 1.0))
        return float(luck.random() < p)


@dataclass(frozen=True)
class Found:
    """What a world sees in a prompt: its rules, which stands last, a style's quality, the placeholder."""

    rules: frozenset[int]
    last: int | None
    quality: float
    whole: bool


class Editor:
    """The scripted optimizer model of a world. Every engine gets the same."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = np.random.default_rng([world.seed, 5])
        self.calls = 0

    def edit(self, template: str, failures: Sequence[tuple[str, str]]) -> Edit:
        """Reads failures, `(task, the prompt it failed under)`, and edits `template`."""
        self.calls += 1
        if self.world.spec.opaque:
            return self._restyled(template)
        named: dict[int, list[str]] = {}
        for task, prompt in failures:
            cited = task
            if self.rng.random() < self.world.spec.miscite:
                cited = failures[int(self.rng.integers(len(failures)))][0]
            named.setdefault(self._rule(task, prompt), []).append(cited)
        units = self._worded(named)
        return Edit(units, self._rewritten(template, [text for text, _ in units]))

    def _rule(self, task: str, prompt: str) -> int:
        spec, found = self.world.spec, self.world.found(prompt)
        gate = self.world.rules - 1
        if spec.gate and gate not in found.rules and self.rng.random() < 0.15:
            return gate
        missing = [rule for rule in np.flatnonzero(self.world.needs[task]) if rule not in found.rules]
        if missing and self.rng.random() < spec.hit:
            return int(self.rng.choice(missing))
        return spec.useful + int(self.rng.integers(spec.distractors))

    def _worded(self, named: dict[int, list[str]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """One sentence a rule; in the free world any of its wordings, and now and then two rules in one sentence."""
        units = [(rule_text(rule, self._form()), tuple(cites)) for rule, cites in named.items()]
        if self.world.spec.free and len(units) > 1 and self.rng.random() < 0.3:
            (one, cites), (other, more) = units.pop(), units.pop()
            units.append((f"{one[:-1]}, and {other[0].lower()}{other[1:]}", cites + more))
        return tuple(units)

    def _form(self) -> int:
        return int(self.rng.integers(len(_FORMS))) if self.world.spec.free else 0

    def _rewritten(self, template: str, added: Sequence[str]) -> str:
        """The whole prompt again: old rules may be dropped, the placeholder too; new rules go to the end."""
        spec = self.world.spec
        kept = [line for line in template.splitlines() if line.startswith("- ") and self.rng.random() >= spec.drop]
        lines = [*kept, *(f"- {text}" for text in added)]
        gate = _key(self.world.rules - 1)
        if spec.gate and self.rng.random() < 0.5:
            lines.sort(key=lambda line: gate in line)
        tail = [] if self.rng.random() < spec.drop else ["", "Task: {input}"]
        return "\n".join(["Solve the task below with care.", "", *lines, *tail])

    def _restyled(self, template: str) -> Edit:
        quality = self.world.found(template).quality + self.rng.normal(0.02, 0.12)
        name = f"zq{len(self.world._quality)}"
        self.world._quality[name] = float(np.clip(quality, 0.0, 1.0))
        tail = "" if self.rng.random() < self.world.spec.drop else "\n\nTask: {input}"
        words = " ".join(self.rng.choice(_WORDS, 8))
        return Edit((), f"Work in style {name} while you {words}.{tail}", whole=True)


def rule_text(rule: int, form: int = 0) -> str:
    """A one-sentence instruction with words of its own."""
    return _FORMS[form].format(*(_word(rule, place) for place in range(4)))


def _word(rule: int, place: int) -> str:
    """The x after the number keeps the words of rule 1 out of those of rule 12."""
    return f"{_WORDS[(rule * 4 + place * 7) % len(_WORDS)]}{rule}x"


def _key(rule: int) -> str:
    return _word(rule, 1)


def summary(values: Sequence[float], rng: Any = None) -> tuple[float, float, float]:
    """Mean and 95 % interval (Student's t) of a measure over seeds."""
    from scipy import stats

    data = np.asarray(values, dtype=float)
    mean = float(data.mean())
    if len(data) < 2 or data.std() == 0:
        return mean, mean, mean
    half = float(stats.t.ppf(0.975, len(data) - 1) * data.std(ddof=1) / np.sqrt(len(data)))
    return mean, mean - half, mean + half
