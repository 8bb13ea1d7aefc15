"""Simplification, whatever the engine: the prompt that a search found, in fewer words where those earn as much.

One call of the optimizer's model asks for a shorter version. It meets tasks beside the long one, and takes its place
if it earns no less on them; the held-out test judges it then. (Parts that earn nothing are left out by the factorial
search itself.)
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from optimize.apo.account import template_id
from optimize.apo.beam import rewritten
from optimize.apo.engine import Candidate, Engine, Problem, Row, SearchResult
from optimize.apo.parts import words
from optimize.apo.result import lineage
from optimize.apo.templates import guard
from optimize.dataset import Task
from optimize.evaluation import Outcome, Request

log = logging.getLogger(__name__)

MARK = ("shorter",)  # in place of part ids, in the log of rollouts
LEAST_WORDS = 40  # a prompt of fewer words is short
SAVES = 0.8  # of the words at most may be left
PAIRS, LEAST_PAIRS = 20, 10
LARGE = 200  # rollouts of a budget from which PAIRS are kept for this; of a smaller one it takes what the search leaves

REQUEST = """This prompt of an AI agent works, but it is long. It stands between the lines:
----
{prompt}
----

Write it in as few words as you can, so that everything it asks for is still asked for: the same rules, names, numbers \
and formats, every variable in braces, every example as it is, and nothing new.

Reply with the prompt only."""


class Shortened:
    """An engine that has another one search, and then says its prompt in fewer words."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner

    async def search(self, problem: Problem) -> SearchResult:
        """See the module. Without a language model, or a usable version of its, what the other engine found."""
        if problem.complete is None:
            return await self.inner.search(problem)
        left = problem.budget.left
        part = problem.budget.part(left - PAIRS if left >= LARGE else left)
        rows = [row for row in problem.rows if row.subset != MARK]
        found = await self.inner.search(replace(problem, budget=part, rows=rows))
        if not found.changed or found.stop == "failures":
            return found
        text = await _version(problem, found.best_template)
        return found if text is None else await _compared(problem, found, text)


async def _version(problem: Problem, long: str) -> str | None:
    """A shorter version that may be tried, if the model has one."""
    if problem.complete is None or len(words(long)) < LEAST_WORDS or problem.budget.left < LEAST_PAIRS:
        return None
    try:
        reply = await problem.complete([{"role": "user", "content": REQUEST.format(prompt=long)}])
    except Exception as error:  # noqa: BLE001 (boundary: a foreign client may raise anything; what was found stands)
        log.warning("the optimizer model gave no shorter prompt: %s: %s", type(error).__name__, error)
        return None
    text = rewritten(reply, long)
    if text is None or len(words(text)) > SAVES * len(words(long)):
        return None
    return text if guard(long, text, problem.train_texts) is None else None


async def _compared(problem: Problem, found: SearchResult, text: str) -> SearchResult:
    """The result with the shorter prompt in its place where that earns no less on common tasks; told either way."""
    tasks = _tasks(problem, found)
    pairs = [Request(prompt, task, subset=MARK) for task in tasks for prompt in (found.best_template, text)]
    outcomes = await _paid(problem, found, pairs)
    n = len(outcomes) // 2
    if not n:
        return found
    old, new = (sum(one.score for one in outcomes[at : 2 * n : 2]) / n for at in (0, 1))
    told = f"{len(words(text))} words instead of {len(words(found.best_template))}, {new:.2f} instead of {old:.2f}"
    told = f"{told} on {n} tasks"
    known = found.candidates or lineage(found)
    parent = next((one.id for one in reversed(known) if one.template == found.best_template), None)
    one = Candidate(template_id(text), parent, text, new, n, f"shorter: {told}")
    rows = [_row(outcome) for outcome in outcomes]
    return replace(
        found,
        best_template=text if new >= old else found.best_template,
        reason=f"{found.reason}; a shorter version {'took its place' if new >= old else 'earned less'}: {told}",
        rollouts=problem.budget.spent,
        rows=(*found.rows, *rows),
        candidates=(*known, one),
    )


def _tasks(problem: Problem, found: SearchResult) -> list[Task]:
    """Tasks for the comparison: none that an example in the prompt was made of, those that it has met already first."""
    shown = {task for part in found.best_parts for task in part.tasks}
    met = {row.task_id for row in found.rows if row.template_hash == template_id(found.best_template)}
    free = [task for task in problem.tasks if task.id not in shown]
    return sorted(free, key=lambda task: task.id not in met)[:PAIRS]


async def _paid(problem: Problem, found: SearchResult, requests: Sequence[Request]) -> list[Outcome]:
    """Outcomes of as many pairs as the budget has room for. What the search has met is not paid again, and what this
    job paid for here before it was broken off counts once more."""
    met = {(row.template_hash, row.task_id, row.replicate) for row in found.rows}
    before = {
        (row.template_hash, row.task_id, row.replicate) for row in problem.rows if row.subset == MARK and row.paid
    }
    budget, asked, price = problem.budget, list[Request](), 0
    for pair in zip(requests[::2], requests[1::2], strict=True):
        more = sum(_key(one) not in met for one in pair)
        if price + more > budget.left:
            break
        asked, price = [*asked, *pair], price + more
    if len(asked) < 2 * LEAST_PAIRS or budget.reserve(price) < price:
        return []
    outcomes = await problem.evaluate(asked)
    for outcome in outcomes:
        if _key(outcome.request) in met:
            continue
        if outcome.cached and _key(outcome.request) not in before:
            budget.refund(1)
        else:
            budget.settle(outcome.tokens, outcome.cost_usd, outcome.seconds)
    return outcomes


def _key(request: Request) -> tuple[str, str, int]:
    return template_id(request.template), request.task.id, request.replicate


def _row(outcome: Outcome) -> Row:
    return Row(
        *_key(outcome.request),
        MARK,
        outcome.score,
        outcome.ok,
        outcome.reason,
        outcome.answer,
        outcome.feedback,
        outcome.tokens,
        outcome.seconds,
        not outcome.cached,
        outcome.cost_usd,
    )
