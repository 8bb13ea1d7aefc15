"""Beam search by textual gradients, after ProTeGi (Pryzant et al. 2023): critique failures, edit, keep the best few.

Parameters carry the names of Agent Lightning's APO. Unlike it, no prompt is evaluated twice on a task, an edit that
loses a variable is refused before it costs a rollout, and what wins on the search's own tasks still has to pass the
held-out gate.
"""

import json
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from collector.errors import BadInput, RatchetError
from optimize.apo.account import Account, Ended, template_id
from optimize.apo.engine import Problem, SearchResult, Stop
from optimize.dataset import Task, split
from optimize.evaluation import Outcome

log = logging.getLogger(__name__)
CHARS = 1200  # of a task, an answer or a feedback that the critic reads
PATIENCE = 3  # calls of the model in a row that may fail

CRITIC = "You review how an AI agent's prompt led to its results. Be concrete and brief."
CRITIQUE = """The agent's prompt, between the lines:
----
{prompt}
----

What it did with the prompt on a few tasks (reward 1 is best):
{rollouts}

Which weaknesses of the prompt explain the low rewards? Give at most three, each with the kind of instruction that \
would have helped. Speak of tasks of this kind, not of these very tasks."""

EDITOR = "You edit the prompts of AI agents."
EDIT = """The prompt to edit, between the lines:
----
{prompt}
----

What a reviewer says of it:
{critique}

{style} Keep every variable in braces exactly as it is: {variables}. Copy nothing out of the tasks. Reply with the \
whole new prompt and nothing else."""
STYLES = (
    "Rewrite it so that every weakness is mended.",
    "Mend the most important weakness only, with as small a change as you can.",
)

_FENCE = re.compile(r"```[\w-]*\n(.*?)```", re.DOTALL)
_PREAMBLE = re.compile(
    r"^\s*(?:sure|certainly|here|below|okay|ok|the (?:new|improved|revised|edited)|(?:improved|revised|new) prompt)\b"
    r"[^\n]*:\s*\n",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Params:
    """As in Agent Lightning's APO, with its defaults."""

    beam_width: int = 4
    branch_factor: int = 4
    beam_rounds: int = 3
    gradient_batch_size: int = 4
    val_batch_size: int = 16


class Beam:
    """The engine."""

    async def search(self, problem: Problem) -> SearchResult:
        """Search on half of the tasks, compare on the other half. Raises BadInput where there is no language model."""
        if problem.complete is None:
            raise BadInput("the beam needs a language model: set optimizer.model in the configuration", param="engine")
        known = {item.name for item in fields(Params)}
        params = Params(**{name: value for name, value in problem.params.items() if name in known})
        return await _Search(problem, params).run()


class _Search:
    def __init__(self, problem: Problem, params: Params) -> None:
        self.problem, self.params = problem, params
        self.account = Account(problem)
        self.train, self.val = halves(problem.tasks, problem.seed)
        self.dice = random.Random(f"beam-{problem.seed}")  # noqa: S311  # a reproducible order
        self.failed = 0
        self.best = problem.seed_template

    async def run(self) -> SearchResult:
        """Rounds of branching and selecting; the beam's leader meets all comparison tasks each time."""
        try:
            await self._on_all(self.problem.seed_template)
            stop, reason = await self._rounds()
        except Ended as ended:
            stop, reason = ended.stop, ended.reason
        return self.account.result(self.best, self.val, stop, reason)

    async def _rounds(self) -> tuple[Stop, str]:
        beam = [self.problem.seed_template]
        if (self.account.mean(beam[0], self.val) or 0.0) >= 1.0:
            return "headroom", f"the prompt already gets 1.00 on {len(self.val)} tasks: nothing to gain"
        for _ in range(self.params.beam_rounds):
            width = self.params.beam_width
            parents = [beam[at % len(beam)] for at in range(width)]
            children = [
                child
                for parent in parents
                for _ in range(self.params.branch_factor)
                for child in await self._branch(parent)
            ]
            beam = await self._select([*beam, *children])
            await self._on_all(beam[0])
        return "rounds", f"{self.params.beam_rounds} rounds are done"

    async def _branch(self, parent: str) -> list[str]:
        """A child by a critique of a few rollouts; none where the model is silent or a guard refuses."""
        tasks = self.dice.sample(self.train, min(self.params.gradient_batch_size, len(self.train)))
        style = self.dice.choice(STYLES)
        outcomes = await self.account.run([(parent, task) for task in tasks])
        critique = await self._ask(CRITIC, CRITIQUE.format(prompt=parent, rollouts=told(outcomes)))
        if critique is None:
            return []
        variables = ", ".join(re.findall(r"\{+\w+\}+", parent)) or "there are none"
        request = EDIT.format(prompt=parent, critique=critique, style=style, variables=variables)
        reply = await self._ask(EDITOR, request)
        child = None if reply is None else rewritten(reply, parent)
        return [child] if child is not None and self.account.adopt(child, parent) else []

    async def _ask(self, role: str, request: str) -> str | None:
        """The model's reply; None where it gave none. Raises Ended after a few of those in a row."""
        if self.problem.complete is None:
            return None
        self.account.calls += 1
        try:
            reply = await self.problem.complete(
                [{"role": "system", "content": role}, {"role": "user", "content": request}]
            )
        except RatchetError as error:
            log.warning("the optimizer's model gave no reply: %s", error)
            self.failed += 1
            if self.failed >= PATIENCE:
                raise Ended("no gain", f"the optimizer's model gave no reply: {error.message}") from None
            return None
        self.failed = 0
        return reply

    async def _select(self, prompts: Sequence[str]) -> list[str]:
        """The best few on one batch of comparison tasks."""
        batch = self.dice.sample(self.val, min(self.params.val_batch_size, len(self.val)))
        known = list(dict.fromkeys(prompts))
        await self.account.run([(prompt, task) for prompt in known for task in batch])
        ranked = sorted(known, key=lambda prompt: -(self.account.mean(prompt, batch) or 0.0))
        for place, prompt in enumerate(ranked):
            kept = place < self.params.beam_width
            self.account.reasons[template_id(prompt)] = (
                "kept in the beam" if kept else "left the beam: others scored more"
            )
        return ranked[: self.params.beam_width]

    async def _on_all(self, prompt: str) -> None:
        """The prompt on all comparison tasks; strictly better than the best so far, it takes its place."""
        await self.account.run([(prompt, task) for task in self.val])
        if (self.account.mean(prompt, self.val) or 0.0) > (self.account.mean(self.best, self.val) or 0.0):
            self.best = prompt
        self.account.report(self.best, self.val)


def halves(tasks: Sequence[Task], seed: int) -> tuple[list[Task], list[Task]]:
    """Tasks to learn from and tasks to compare on; the same ones for both where they cannot be split."""
    try:
        return split(list(tasks), 0.5, seed)
    except BadInput:
        return list(tasks), list(tasks)


def told(outcomes: Sequence[Outcome]) -> str:
    """Rollouts in words, numbered."""
    return "\n\n".join(f"[{number}]\n{_one(outcome)}" for number, outcome in enumerate(outcomes, start=1))


def _one(outcome: Outcome) -> str:
    lines = [f"task: {_short(outcome.request.task.json)}", f"reward: {outcome.score:g}"]
    lines += [f"answer: {_short(outcome.answer)}"] if outcome.answer else []
    return "\n".join([*lines, f"feedback: {_short(outcome.feedback)}"] if outcome.feedback else lines)


def _short(text: str) -> str:
    return text if len(text) <= CHARS else f"{text[: CHARS // 2]} ... {text[-CHARS // 2 :]}"


def rewritten(reply: str, parent: str) -> str | None:
    """The new prompt in a reply: prose, fenced, or JSON (`{"prompt": ...}`, or edits as a list); None for none."""
    fenced = _FENCE.findall(reply)
    text = max(fenced, key=len) if fenced else _PREAMBLE.sub("", reply)
    try:
        return _of_json(json.loads(text), parent)
    except ValueError:
        pass
    text = re.sub(r"</?(?:prompt|new_prompt|system)>", "", text).strip().strip("-").strip()
    return text or None


def _of_json(value: object, parent: str) -> str | None:
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, dict):
        texts = [
            value[name] for name in ("prompt", "new_prompt", "template", "text") if isinstance(value.get(name), str)
        ]
        lists = [item for item in value.values() if isinstance(item, list)]
        return texts[0].strip() or None if texts else _of_json(lists[0], parent) if lists else None
    if isinstance(value, list):
        added = [item["text"].strip() for item in value if isinstance(item, dict) and isinstance(item.get("text"), str)]
        return "\n".join([parent, *added]) if added else None
    return None
