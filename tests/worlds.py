"""Simulated task worlds with a closed-form optimum, and a scripted, imperfect editor: a search can be scored exactly.

Base world: 10 useful rules with weights falling as 1 / (rank + 1)^0.7 and 10 distractors; each task needs 2 useful
rules; P(success) = .15 + .75 * (share of its needed rules in the prompt, by weight 1 each) - .03 * (distractors in the
prompt), clipped to [.02, .98]. A rule with a higher weight is needed by more tasks. The other worlds change one thing.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from optimize.apo.parts import Part, make
from optimize.apo.proposers import State
from optimize.dataset import Task
from optimize.evaluation import Outcome, Request

SEED_PROMPT = "Solve the task below with care."
_SYLLABLES = ["ba", "ke", "di", "fo", "gu", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "zo", "wu"]
_WORDS = ["".join(pair) for pair in itertools.product(_SYLLABLES, repeat=2)]


def rule_text(rule: int) -> str:
    """A one-line instruction with words of its own."""
    words = [_WORDS[(rule * 4 + k * 7) % len(_WORDS)] + str(rule) for k in range(4)]
    return f"Always {words[0]} the {words[1]} before {words[2]} and {words[3]}."


@dataclass(frozen=True)
class Spec:
    """What makes a world."""

    name: str = "base"
    useful: int = 10
    distractors: int = 10
    base: float = 0.15
    gain: float = 0.75
    harm: float = 0.03
    hit: float = 0.5  # the editor names a rule that is truly missing
    miscite: float = 0.2
    tasks: int = 100
    need: int = 2
    interact: bool = False
    spread: float = 0.0  # share of tasks that are impossible, and as many trivial
    noise: float | None = None  # graded rewards with this sd instead of successes


SPECS = {
    spec.name: spec
    for spec in [
        Spec(),
        Spec("clean", hit=0.9, miscite=0.05),
        Spec("weak", hit=0.2),
        Spec("harm", harm=0.12, hit=0.3),
        Spec("interact", interact=True),
        Spec("ceiling", base=0.82, gain=0.12),
        Spec("hetero", spread=0.2),
        Spec("graded", noise=0.15),
        Spec("small", tasks=40),
        Spec("null", base=0.5, gain=0.0, harm=0.0),
        Spec("null-low", base=0.15, gain=0.0, harm=0.0),
        Spec("null-high", base=0.8, gain=0.0, harm=0.0),
    ]
}


class World:
    """One world, drawn from `spec` with `seed`; evaluates prompts and knows what each is truly worth."""

    def __init__(self, spec: Spec, seed: int) -> None:
        self.spec = spec
        self.seed = seed
        rng = np.random.default_rng([seed, 77])
        self.rules = [rule_text(rule) for rule in range(spec.useful + spec.distractors)]
        weights = 1.0 / np.arange(1, spec.useful + 1) ** 0.7
        order = rng.permutation(spec.useful)
        self.probability = (weights / weights.sum())[order]
        self.tasks = [Task(f"t{index}", {"input": f"task {index}"}, f"t{index}") for index in range(spec.tasks)]
        self.needs = {
            task.id: tuple(rng.choice(spec.useful, spec.need, replace=False, p=self.probability)) for task in self.tasks
        }
        kinds = rng.permutation(spec.tasks)
        few = int(spec.spread * spec.tasks)
        self.fixed = {f"t{index}": 0.02 for index in kinds[:few]} | {
            f"t{index}": 0.98 for index in kinds[few : 2 * few]
        }
        pairs = rng.permutation(spec.useful)
        self.together = [tuple(sorted(pairs[k : k + 2])) for k in (0, 2)] if spec.interact else []
        self.clash = [tuple(sorted(pairs[k : k + 2])) for k in (4, 6)] if spec.interact else []
        self.rollouts = 0

    def present(self, template: str) -> frozenset[int]:
        """The rules in a prompt."""
        return frozenset(rule for rule, text in enumerate(self.rules) if text in template)

    def success(self, rules: frozenset[int], task_id: str) -> float:
        """The expected reward of a prompt with these rules on a task."""
        spec = self.spec
        if task_id in self.fixed:
            return self.fixed[task_id]
        working = {rule for rule in rules if rule < spec.useful}
        for a, b in self.together:
            if not {a, b} <= working:
                working -= {a, b}
        share = sum(rule in working for rule in self.needs[task_id]) / spec.need
        clashes = sum({a, b} <= working for a, b in self.clash)
        bad = sum(rule >= spec.useful for rule in rules)
        return float(np.clip(spec.base + spec.gain * share - spec.harm * bad - 0.15 * clashes, 0.02, 0.98))

    def value(self, rules: frozenset[int]) -> float:
        """The expected reward over all tasks."""
        return float(np.mean([self.success(rules, task.id) for task in self.tasks]))

    def optimum(self) -> float:
        """The best value of any set of rules: exact, since only clashing pairs trade off."""
        useful = frozenset(range(self.spec.useful))
        drops = itertools.product(*[((), (a,), (b,), (a, b)) for a, b in self.clash])
        return max(self.value(useful - {rule for drop in choice for rule in drop}) for choice in drops)

    def score(self, template: str) -> float:
        """0 for the seed's value, 1 for the optimum's. In a null world: 0."""
        floor, top = self.value(frozenset()), self.optimum()
        return (self.value(self.present(template)) - floor) / (top - floor) if top - floor > 1e-9 else 0.0

    async def evaluate(self, requests: Sequence[Request]) -> list[Outcome]:
        """One rollout a request; its luck depends on the request alone, not on when it is asked."""
        return [self.outcome(request) for request in requests]

    def outcome(self, request: Request) -> Outcome:
        """The rollout of one request."""
        self.rollouts += 1
        name = f"{self.seed}|{request.template}|{request.task.id}|{request.replicate}|{request.arm}"
        luck = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()[:8]))
        p = self.success(self.present(request.template), request.task.id)
        if self.spec.noise is not None:
            score = float(np.clip(p + self.spec.noise * luck.standard_normal(), 0.0, 1.0))
        else:
            score = float(luck.random() < p)
        return Outcome(request, score, answer="yes" if score > 0.5 else "no", feedback="" if score > 0.5 else "wrong")


class Editor:
    """Reads failures; names a rule that is truly missing with probability `hit`, else a distractor; miscites some."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = np.random.default_rng([world.seed, 5])
        self.calls = 0

    async def propose(self, state: State) -> list[Part]:
        """One rule a failure, with the failure that it answers."""
        if not state.failures:
            return []
        self.calls += 1
        spec = self.world.spec
        texts = {part.id: part.text for part in state.parts}
        cites: dict[str, list[str]] = {}
        for failure in state.failures:
            inside = {texts[part_id] for part_id in failure.subset}
            missing = [rule for rule in self.world.needs[failure.task.id] if self.world.rules[rule] not in inside]
            if missing and self.rng.random() < spec.hit:
                rule = int(self.rng.choice(missing))
            else:
                rule = spec.useful + int(self.rng.integers(spec.distractors))
            cited = failure.task.id
            if self.rng.random() < spec.miscite:
                cited = state.failures[int(self.rng.integers(len(state.failures)))].task.id
            cites.setdefault(self.world.rules[rule], []).append(cited)
        return [replace(make("instruction", text), cites=tuple(tasks)) for text, tasks in cites.items()]
