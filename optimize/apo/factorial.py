"""Factorial prompt search: every paid rollout is one (random subset of parts, task) pair and informs every part in it.

A hierarchical Bayesian model (`model.py`) turns the rollouts into beliefs about parts; Thompson draws choose the next
subsets; proposers add parts as failures gather. No argmax over noisy candidates: the reported prompt is the subset with
the highest posterior mean, or the surest part of it, or the seed itself until P(gain > 0) >= 0.9 (`beliefs.py`). What
it reports is still an estimate on search tasks: promotion is for `optimize.gate`, on tasks that no search has seen.

Deterministic given the seed, the outcomes and the proposals; with the logged rows and proposals of a broken run it
arrives at the same state without asking for one of them again.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from scipy.special import ndtr

from collector.errors import BadInput
from optimize.apo.beliefs import Beliefs
from optimize.apo.engine import Evaluate, PartReport, Problem, Progress, Row, SearchResult, Stop
from optimize.apo.model import Evidence, Model, Posterior
from optimize.apo.params import Params
from optimize.apo.parts import Part, atomic, cut, render
from optimize.apo.pool import Pool, Subset
from optimize.apo.state import Failure, Proposer, State
from optimize.apo.templates import guard
from optimize.apo.trial import Trial
from optimize.budget import Budget
from optimize.dataset import Task
from optimize.evaluation import Outcome, Request


async def search(
    seed_template: str,
    tasks: Sequence[Task],
    evaluate: Evaluate,
    propose: Proposer,
    params: Params | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    rows: Sequence[Row] = (),
    proposals: Sequence[Sequence[Part]] = (),
    *,
    budget: Budget | None = None,
    train_texts: Sequence[str] = (),
) -> SearchResult:
    """Searches for the best subset of parts for `tasks`, which must hold no held-out task.

    `evaluate` runs one block of rollouts concurrently and answers in order. `budget` (default: `params.budget`) is
    reserved before each block and refunded for rollouts that were cached: overshoot is 0. `rows` and `proposals` of an
    earlier, broken run are replayed instead of paid. `train_texts`: texts that no instruction may copy.

    Raises BadInput for an empty task list or prompt. A broken agent ends the search early (`stop == "failures"`).
    """
    if not tasks:
        raise BadInput("a search needs at least one task", param="tasks")
    if not seed_template.strip():
        raise BadInput("a search needs a prompt to start from", param="template")
    params = params or Params()
    run = _Search(seed_template, tasks, evaluate, propose, params, budget or Budget(params.budget))
    run.replay = {(row.template_hash, row.task_id, row.replicate): row for row in rows}
    run.replay_proposals = [list(batch) for batch in proposals]
    run.on_progress = on_progress
    run.train_texts = tuple(train_texts)
    return await run.run()


class Factorial:
    """The engine, with `Params` by name."""

    async def search(self, problem: Problem) -> SearchResult:
        """See `search`. Blocks leave no agent idle where more run at once than a block has rollouts."""
        known = {item.name for item in fields(Params)}
        chosen = {name: value for name, value in problem.params.items() if name in known}
        block = None if problem.concurrency <= 4 else problem.concurrency
        params = Params(**{"block": block, **chosen, "budget": problem.budget.rollouts, "seed": problem.seed})
        return await search(
            problem.seed_template,
            problem.tasks,
            problem.evaluate,
            problem.proposer,
            params,
            problem.on_progress,
            problem.rows,
            problem.proposals,
            budget=problem.budget,
            train_texts=problem.train_texts,
        )


def template_hash(template: str) -> str:
    """The first 12 hex digits of the template's sha256: the name under which its rollouts are stored."""
    return hashlib.sha256(template.encode()).hexdigest()[:12]


class _Search:
    """The state of one search. Each method is one step of the loop in `run`."""

    def __init__(
        self,
        seed: str,
        tasks: Sequence[Task],
        evaluate: Evaluate,
        proposer: Proposer,
        params: Params,
        budget: Budget,
    ) -> None:
        self.seed, self.tasks, self.evaluate = seed, list(tasks), evaluate
        self.proposer, self.params, self.budget = proposer, params, budget
        self.replay: dict[tuple[str, str, int], Row] = {}
        self.replay_proposals: list[list[Part]] = []
        self.on_progress: Callable[[Progress], None] | None = None
        self.train_texts: tuple[str, ...] = ()
        self.rng = np.random.default_rng(params.seed)
        self.evidence = Evidence(len(self.tasks))
        skeleton, sentences = cut(seed)
        self.pool = Pool(skeleton, sentences, self.evidence, params.limits)
        self.model = Model(params.priors)
        self.rows: list[Row] = []
        self.subsets: list[Subset] = []
        self.failures: list[tuple[Failure, Subset, int]] = []
        self.shown: list[tuple[Failure, Subset, int]] = []  # to an editor, the longest ago first
        self.proposals: list[tuple[Part, ...]] = []
        self.calls = self.dry = self.paid = 0
        self.last_call = 0
        self.uses = np.zeros(len(self.tasks))
        self.replicates: Counter[tuple[str, str]] = Counter()
        self.history: list[tuple[int, float, float]] = []
        self.index = {task.id: index for index, task in enumerate(self.tasks)}
        self.own = _groups(self.tasks)
        self.started = time.monotonic()
        self.spent = False
        self.blocks = 0
        self.trial: Trial | None = None
        self.last_trial = False
        self.whole = False  # whether the editor's last answer was a whole prompt, which nothing can be combined with
        self.hopeful = 0  # number of rollouts when there was hope last

    async def run(self) -> SearchResult:
        """The loop: seed rollouts, proposals, then fit, stop or draw, run, propose."""
        stop = await self._start()
        if stop is None:
            await self._propose(self.pool.seed)
        beliefs = self._fit()
        while stop is None:
            self._report(beliefs)
            stop = self._why_stop(beliefs)
            if await self._tried(beliefs, stop):
                beliefs = self._fit()
                continue
            if stop is not None:
                break
            await self._roll(self._design(beliefs))
            if self._proposal_due():
                await self._propose(beliefs.leader)
            self._place(beliefs)
            beliefs = self._fit()
        return self._result(beliefs, *stop)

    async def _start(self) -> tuple[Stop, str] | None:
        """The seed's own rollouts, and the headroom check: more of them where all of the first were right."""
        await self._roll([(self.pool.seed, task) for task in self._pick(self.params.init, frozenset(), self.pool.seed)])
        if broken := self._broken():
            return broken
        more = self.params.headroom_rollouts - len(self.rows)
        if self.params.stop_early and self._seed_mean() >= self.params.headroom and more > 0:
            await self._roll([(self.pool.seed, task) for task in self._pick(more, frozenset(), self.pool.seed)])
            if self._seed_mean() >= self.params.headroom:
                mean = self._seed_mean()
                return "headroom", f"the prompt already gets {mean:.2f} on {len(self.rows)} rollouts: nothing to gain"
        return None

    def _seed_mean(self) -> float:
        return float(np.mean([row.score for row in self.rows])) if self.rows else 0.0

    def _fit(self) -> Beliefs:
        posterior = self.model.fit(self.evidence, self.pool.traits(len(self.tasks), self.params.priors))
        self.pool.admit(posterior)
        return Beliefs(posterior, self.pool, self.params)

    def _block(self) -> int:
        if self.params.block is not None:
            return self.params.block
        return 4 if len(self.rows) < 200 else 8 if len(self.rows) < 600 else 12

    def _design(self, beliefs: Beliefs) -> list[tuple[Subset, int]]:
        """The next block: Thompson subsets, each for up to `reps` of the least-used tasks.

        While it is unclear whether the leader is any better than the seed, some rollouts compare just these two: draws
        seldom hold the seed alone, so that its mean, against which all is judged, would stay vague.
        """
        pairs: list[tuple[Subset, int]] = []
        taken: set[int] = set()
        compared = self._compared(beliefs)
        while len(pairs) < self._block():
            subset = compared.pop() if compared else self._drawn(beliefs.posterior)
            count = min(self.params.reps, self._block() - len(pairs))
            chosen = self._pick(count, frozenset(taken), subset)
            taken.update(chosen)
            pairs += [(self._fair(subset, task), task) for task in chosen]
        return pairs

    def _drawn(self, posterior: Posterior) -> Subset:
        values = posterior.draw(self.rng, self.params.thompson)
        return self.pool.probe(self.pool.best(values), values, self.rng)

    def _compared(self, beliefs: Beliefs) -> list[Subset]:
        """The seed or the leader, each in one of `compare` blocks, while the gain is unclear."""
        self.blocks += 1
        if self.blocks % self.params.compare > 1 or len(self.rows) < self.params.compare_after:
            return []
        if beliefs.gain(beliefs.leader)[2] > self.params.clear:
            return []
        return [(self.pool.seed, beliefs.leader)[self.blocks % self.params.compare]]

    def _place(self, beliefs: Beliefs) -> None:
        """Has the strongest part that has not been tried there tried as the last instruction."""
        placed = self.pool.placed()
        if len(placed) >= self.params.places or len(self.rows) < self.params.place_after + 24 * len(placed):
            return
        means = beliefs.posterior.mean
        lines = [
            index
            for index in beliefs.leader
            if self.pool.parts[index].kind in ("instruction", "format")
            and not self.pool.parts[index].last
            and self.pool.parts[index].id not in placed
        ]
        if len(beliefs.leader) > 1 and lines:
            self.pool.place_last(max(lines, key=lambda index: float(means[self.pool.feature(index)])))

    async def _tried(self, beliefs: Beliefs, stop: tuple[Stop, str] | None) -> bool:
        """Compares leader and seed directly where the last share of the budget is reached unsure.

        Draws seldom hold the seed alone, and rules that help only together look useless one by one: what the model does
        not see, a comparison of two fixed prompts on the same tasks may. True if there was one.
        """
        pairs = min(self.params.trial_most, int(self.params.trial * self.budget.rollouts / 2))
        if stop is not None or self.last_trial or self.budget.left > 2 * pairs:
            return False
        pairs = min(pairs, self.budget.left // 2)
        if pairs < 2 or beliefs.leader == self.pool.seed or beliefs.reported != self.pool.seed:
            return False
        self.last_trial = True
        self.trial = await self._trial(beliefs.plain, pairs)
        self.hopeful = len(self.rows)
        return True

    async def _trial(self, leader: Subset, pairs: int) -> Trial:
        before = len(self.rows)
        tasks = self._pick(pairs, frozenset(), leader)
        await self._roll([(subset, task) for task in tasks for subset in (self.pool.seed, self._fair(leader, task))])
        scores = np.array([row.score for row in self.rows[before:]])
        return Trial.of(
            leader, scores[1::2][: len(scores) // 2] - scores[::2][: len(scores) // 2], self.params.trial_sd
        )

    def _pick(self, count: int, taken: frozenset[int], subset: Subset) -> list[int]:
        """`count` tasks, least used first, ties at random; tasks whose own example is in the subset come last."""
        shown = {task for index in subset for task in self.pool.parts[index].tasks}
        dice = self.rng.random(len(self.tasks))

        def rank(task: int) -> tuple[bool, bool, float, float]:
            return task in taken, self.tasks[task].id in shown, float(self.uses[task]), float(dice[task])

        order = sorted(range(len(self.tasks)), key=rank)
        chosen = [order[at % len(order)] for at in range(count)]
        np.add.at(self.uses, chosen, 1)
        return chosen

    def _fair(self, subset: Subset, task: int) -> Subset:
        """The subset without examples made from the task or its group: no task is examined on its own answer."""
        return self.pool.without(subset, self.own[self.tasks[task].group])

    async def _roll(self, pairs: Sequence[tuple[Subset, int]]) -> None:
        """Runs a block, or takes it from the log; learns from what came back, in the order asked."""
        asked = []
        for subset, task in pairs:
            template = self.pool.render(subset)
            key = (template_hash(template), self.tasks[task].id)
            request = Request(template, self.tasks[task], self.replicates[key], subset=self.pool.ids(subset))
            self.replicates[key] += 1
            asked.append((request, subset, task, self.replay.get((*key, request.replicate))))
        granted = self.budget.reserve(sum(row is None or row.paid for *_, row in asked))
        asked = _affordable(asked, granted)
        outcomes = iter(await self._evaluated([request for request, _, _, row in asked if row is None]))
        for request, subset, task, row in asked:
            self._learn(row or self._row(request, next(outcomes)), subset, task)

    async def _evaluated(self, requests: list[Request]) -> list[Outcome]:
        if not requests:
            return []
        outcomes = await self.evaluate(requests)
        self.budget.refund(sum(outcome.cached or outcome.reason == "budget" for outcome in outcomes))
        return outcomes

    def _row(self, request: Request, outcome: Outcome) -> Row:
        return Row(
            template_hash(request.template),
            request.task.id,
            request.replicate,
            request.subset,
            outcome.score if outcome.ok else 0.0,
            outcome.ok,
            outcome.reason,
            outcome.answer,
            outcome.feedback,
            outcome.tokens,
            outcome.seconds,
            paid=not outcome.cached,
            cost_usd=outcome.cost_usd,
        )

    def _learn(self, row: Row, subset: Subset, task: int) -> None:
        if row.reason == "budget":
            self.spent = True
            return
        self.rows.append(row)
        self.subsets.append(subset)
        if row.paid:
            self.paid += 1
            self.budget.settle(row.tokens, row.cost_usd, row.seconds)
        self.evidence.add(self.pool.features(subset), task, row.score)
        if row.score < self.params.success:
            feedback = row.feedback or (f"the rollout failed: {row.reason}" if not row.ok else "")
            failure = Failure(self.tasks[task], row.answer, feedback, row.score, row.subset)
            self.failures.append((failure, subset, task))

    def _proposal_due(self) -> bool:
        wait = self.params.edit_every * 2 ** min(self.dry // 2, 3)
        return self.calls < self.params.edit_calls and len(self.rows) - self.last_call >= wait

    async def _propose(self, subset: Subset) -> None:
        """Asks for parts, with the newest failures where enough have gathered; guards them; counts citations.

        Where failures are rare, half a batch is enough; those that were shown longest ago fill it up.
        """
        batch = self.failures[-self.params.edit_batch :]
        if len(batch) < max(1, self.params.edit_batch // 2):
            batch = []
        elif not self.whole:
            batch = [*batch, *self.shown[: self.params.edit_batch - len(batch)]]
        self.last_call = len(self.rows)
        if self.replay_proposals:
            proposed = self.replay_proposals.pop(0)
        else:
            proposed = await self.proposer.propose(self._state(subset, [failure for failure, _, _ in batch]))
        self.proposals.append(tuple(proposed))
        added, cited = self._harvest(proposed)
        if not batch:
            return
        self.whole = any(part.kind == "rewrite" for part in proposed)
        self.calls += 1
        self.dry = 0 if added else self.dry + 1
        self.failures.clear()
        self.shown = [*(one for one in self.shown if one not in batch), *batch][-4 * self.params.edit_batch :]
        for _, shown, task in batch:
            self.pool.show(shown, task, [index for index, tasks in cited if self.tasks[task].id in tasks])

    def _state(self, subset: Subset, failures: Sequence[Failure]) -> State:
        return State(
            self.seed, self.pool.render(subset), self.pool.ids(subset), tuple(self.pool.parts), tuple(failures)
        )

    def _harvest(self, proposed: Sequence[Part]) -> tuple[int, list[tuple[int, tuple[str, ...]]]]:
        """Adds what passes the guard: how many were new, and `(index, cited task ids)` of all."""
        added, cited = 0, []
        for part in [piece for one in proposed for piece in atomic(one)]:
            reason = self._refusal(part)
            if reason is not None:
                self.pool.reject(part.text, reason)
                continue
            index, new = self.pool.add(replace(part, cites=()))
            added += new
            if index is not None:
                cited.append((index, part.cites))
        return added, cited

    def _refusal(self, part: Part) -> str | None:
        texts = () if part.kind == "demonstration" else self.train_texts
        if part.kind == "rewrite":
            return guard(self.seed, part.text, texts)
        seed = [self.pool.parts[index] for index in self.pool.seed]
        return guard(self.seed, render(self.pool.skeleton, [*seed, part]), texts)

    def _broken(self) -> tuple[Stop, str] | None:
        """An agent that fails (crashes, times out, gives no reward) is not a prompt's fault: stop and say why."""
        recent = self.rows[-24:]
        failed = [row for row in self.rows if not row.ok]
        bad = sum(not row.ok for row in recent)
        if len(recent) < min(8, self.params.init) or bad < 0.75 * len(recent) or 2 * len(failed) < len(self.rows):
            return None
        why = Counter(row.reason or "no reason given" for row in failed).most_common(1)[0][0]
        return "failures", f"{len(failed)} of {len(self.rows)} rollouts failed: {why}"

    def _why_stop(self, beliefs: Beliefs) -> tuple[Stop, str] | None:
        if broken := self._broken():
            return broken
        if self.spent or self.budget.left == 0 or len(self.rows) >= 4 * max(1, self.budget.rollouts):
            return "budget", f"{self.paid} rollouts are spent"
        if not self.params.stop_early:
            return None
        return self._hopeless(beliefs) or self._converged(beliefs)

    def _hopeless(self, beliefs: Beliefs) -> tuple[Stop, str] | None:
        """Whether a gain worth having has been improbable for a while, in the sceptic's eyes."""
        hope = beliefs.hope(beliefs.leader)
        likely = beliefs.posterior.nothing < 0.5 and beliefs.likely(beliefs.leader) >= self.params.likely
        spent = len(self.rows) / max(1, self.budget.rollouts)
        if hope >= self.params.hope * spent**2 or likely or len(self.rows) < self._share(self.params.stop_after):
            self.hopeful = len(self.rows)
        if len(self.rows) - self.hopeful < self._share(self.params.patience):
            return None
        return "no gain", f"P(gain > {beliefs.worth:.2f}) is {hope:.2f} after {len(self.rows)} rollouts"

    def _share(self, share: float) -> float:
        return max(self.params.least, share * self.budget.rollouts)

    def _converged(self, beliefs: Beliefs) -> tuple[Stop, str] | None:
        """Whether stopping now loses next to nothing."""
        if len(self.history) % 4 or len(self.rows) < self.params.converge_after or self.dry < self.params.dried:
            return None
        loss = beliefs.loss(beliefs.leader, np.random.default_rng(len(self.rows)))
        if loss >= self.params.stop_loss:
            return None
        return "converged", f"stopping after {len(self.rows)} rollouts loses {loss:.3f} on average"

    def _report(self, beliefs: Beliefs) -> None:
        best = self._sure(beliefs)
        gain, sd, p_gain = self._told(beliefs, best)
        self.history.append((len(self.rows), gain, p_gain))
        if self.on_progress is None:
            return
        seconds = time.monotonic() - self.started
        self.on_progress(
            Progress(
                rollouts=self.paid,
                budget=self.budget.rollouts,
                parts=len(self.pool.parts),
                calls=self.calls,
                gain=gain,
                gain_sd=sd,
                p_gain=p_gain,
                best_template=self.pool.render(best),
                recent=float(np.mean([row.score for row in self.rows[-20:]])) if self.rows else 0.0,
                seconds=seconds,
                eta_seconds=seconds / self.paid * self.budget.left if self.paid else None,
            )
        )

    def _result(self, beliefs: Beliefs, stop: Stop, reason: str) -> SearchResult:
        best = self._sure(beliefs)
        leader = beliefs.plain if best == self.pool.seed else best
        gain, sd, p_gain = self._told(beliefs, best)
        return SearchResult(
            seed_template=self.seed,
            best_template=self.pool.render(best),
            best_parts=tuple(self.pool.parts[index] for index in best),
            leader_template=self.pool.render(leader),
            value=beliefs.value(leader),
            gain=gain,
            gain_sd=sd,
            p_gain=p_gain,
            rollouts=self.paid,
            stop=stop,
            reason=reason,
            calls=self.calls,
            parts=self._table(beliefs.posterior, best),
            rejected=tuple(self.pool.rejected),
            history=tuple(self.history),
            rows=tuple(self.rows),
            proposals=tuple(self.proposals),
        )

    def _sure(self, beliefs: Beliefs) -> Subset:
        """What may be reported: what the model is sure of, else what a comparison was sure of, else the seed."""
        best = beliefs.reported
        if best == self.pool.seed and self.trial is not None and self.trial.p_above(0.0) >= self.params.confident:
            return self.trial.leader
        return best

    def _told(self, beliefs: Beliefs, best: Subset) -> tuple[float, float, float]:
        """Gain, sd and P(gain > 0) of what is reported, or of what leads while the seed is held."""
        if self.trial is not None and best == self.trial.leader and beliefs.reported != best:
            return self.trial.mean, self.trial.sd, self.trial.p_above(0.0)
        shown = beliefs.plain if best == self.pool.seed else best
        gain, sd, _ = beliefs.gain(shown)
        return gain, sd, beliefs.likely(shown)

    def _table(self, posterior: Posterior, best: Subset) -> tuple[PartReport, ...]:
        reports = []
        uses = Counter(index for subset in self.subsets for index in subset)
        for index, part in enumerate(self.pool.parts):
            weights = np.zeros(self.evidence.features)
            weights[self.pool.feature(index)] = 1.0
            mean, sd = posterior.contrast(weights)
            reports.append(PartReport(part, mean, sd, float(ndtr(mean / sd)), uses[index], index in best))
        return tuple(sorted(reports, key=lambda report: -report.mean))


def _groups(tasks: Sequence[Task]) -> dict[str, frozenset[str]]:
    groups: dict[str, set[str]] = {}
    for task in tasks:
        groups.setdefault(task.group, set()).add(task.id)
    return {group: frozenset(ids) for group, ids in groups.items()}


def _affordable(asked: list[Any], granted: int) -> list[Any]:
    kept = []
    for item in asked:
        if item[-1] is None or item[-1].paid:
            if granted == 0:
                continue
            granted -= 1
        kept.append(item)
    return kept
