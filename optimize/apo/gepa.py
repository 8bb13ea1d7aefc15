"""The reflective optimizer GEPA (Agrawal et al. 2025) as an engine: its core, our rollouts, budget and guards.

GEPA is synchronous and may spend past its own limit; it runs in a thread, and every rollout it asks for is paid through
the account of this search, which grants no more than there is.
"""

import asyncio
import concurrent.futures
import json
import logging
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar

from collector.errors import BadInput
from optimize.apo.account import Account, Ended, template_id
from optimize.apo.beam import halves, rewritten
from optimize.apo.engine import Problem, SearchResult, Stop
from optimize.apo.templates import guard
from optimize.dataset import Task
from optimize.evaluation import Outcome, Request

log = logging.getLogger(__name__)
R = TypeVar("R")
COMPONENT = "prompt"
MINIBATCH = 8
IDLE = 30  # iterations without a new rollout that end the search: nothing new comes any more
REFUSED = -1e6  # the score of a prompt that a guard refused: never an improvement


class Gepa:
    """The engine. Raises BadInput where the package `gepa` is not installed."""

    def __init__(self) -> None:
        try:
            import gepa  # noqa: F401
        except ImportError:
            message = "the engine gepa needs its package: pip install 'agent-ratchet[gepa]'"
            raise BadInput(message, param="engine") from None

    async def search(self, problem: Problem) -> SearchResult:
        """Mutate on half of the tasks, keep a Pareto front on the other half. Raises BadInput without a model."""
        if problem.complete is None:
            raise BadInput("gepa needs a language model: set optimizer.model in the configuration", param="engine")
        bridge = Bridge(problem, Account(problem))
        try:
            stop, reason = await bridge.run()
        except Ended as ended:
            stop, reason = ended.stop, ended.reason
        return bridge.account.result(bridge.best(), bridge.val, stop, reason)


class Bridge:
    """GEPA's adapter, language model and stop condition: they run in its thread and work in our event loop."""

    propose_new_texts = None

    def __init__(self, problem: Problem, account: Account) -> None:
        self.problem, self.account = problem, account
        self.train, self.val = halves(problem.tasks, problem.seed)
        self._loop = asyncio.get_running_loop()
        self._waiting: concurrent.futures.Future[Any] | None = None
        self._over = False
        self._idle, self._paid = 0, -1
        self._parent = problem.seed_template  # what the next new prompt is made from

    async def run(self) -> tuple[Stop, str]:
        """GEPA to its end, in a thread; the thread ends with us."""
        seed = self.problem.seed_template
        await self.account.run([(seed, task) for task in self.val])  # what GEPA asks for first
        if (self.account.mean(seed, self.val) or 0.0) >= 1.0:
            return "headroom", f"the prompt already gets 1.00 on {len(self.val)} tasks: nothing to gain"
        work = asyncio.create_task(asyncio.to_thread(self._optimize))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            self._over = True
            if self._waiting is not None:
                self._waiting.cancel()
            await asyncio.gather(work, return_exceptions=True)
            raise
        return "no gain", f"{IDLE} iterations asked for no new rollout"

    def _optimize(self) -> None:
        from gepa.api import optimize

        mine: Any = self  # GEPA's protocols are met by duck typing
        optimize(
            seed_candidate={COMPONENT: self.problem.seed_template},
            trainset=self.train,
            valset=self.val,
            adapter=mine,
            reflection_lm=mine.reflect,
            reflection_minibatch_size=min(self.problem.params.get("minibatch", MINIBATCH), len(self.train)),
            stop_callbacks=[mine.stops],
            logger=mine,
            seed=self.problem.seed,
            raise_on_exception=True,
        )

    def best(self) -> str:
        """Of the prompts that met all comparison tasks the one with the highest mean; the first of equals."""
        templates = self.account.templates
        whole = [
            text for one, text in templates.items() if all((one, task.id) in self.account.outcomes for task in self.val)
        ]
        seed = self.problem.seed_template
        return max([seed, *whole], key=lambda text: self.account.mean(text, self.val) or 0.0)

    # What GEPA asks for, in its thread

    def evaluate(self, batch: Sequence[Task], candidate: Mapping[str, str], capture_traces: bool = False) -> Any:
        """A rollout a task; a prompt that a guard refuses gets none, and a score that never wins."""
        from gepa.core.adapter import EvaluationBatch

        template = candidate[COMPONENT]
        if not self._taken(template):
            refused = [Outcome(Request(template, task), REFUSED, ok=False) for task in batch]
            return EvaluationBatch([""] * len(batch), [REFUSED] * len(batch), refused if capture_traces else None)
        if capture_traces:
            self._parent = template
        outcomes = self._await(self.account.run([(template, task) for task in batch]))
        if len(batch) == len(self.val):
            self.account.reasons[template_id(template)] = "met all comparison tasks"
            self._loop.call_soon_threadsafe(self.account.report, self.best(), self.val)
        scores = [outcome.score for outcome in outcomes]
        return EvaluationBatch([one.answer for one in outcomes], scores, outcomes if capture_traces else None)

    def make_reflective_dataset(
        self, candidate: Mapping[str, str], eval_batch: Any, components_to_update: Sequence[str]
    ) -> dict[str, list[dict[str, Any]]]:
        """What the model reads of the rollouts."""
        records = [
            {
                "Inputs": one.request.task.json,
                "Generated Outputs": one.answer,
                "Feedback": one.feedback or f"reward {one.score:g}, 1 is best",
            }
            for one in eval_batch.trajectories
        ]
        return dict.fromkeys(components_to_update, records)

    def reflect(self, prompt: str | list[dict[str, Any]]) -> str:
        """The optimizer's model; its new prompt in a code fence, where GEPA looks for one, whatever form it came in."""
        if self.problem.complete is None:
            return ""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        self.account.calls += 1
        reply = self._await(self.problem.complete(json.loads(json.dumps(messages))))
        return f"```\n{rewritten(reply, self._parent) or self._parent}\n```"

    def stops(self, gepa_state: Any) -> bool:
        """Whether iterations have gone by that asked for nothing new."""
        paid = len(self.account.outcomes)
        self._idle = 0 if paid != self._paid else self._idle + 1
        self._paid = paid
        return self._over or self._idle >= IDLE

    def log(self, message: str) -> None:
        """GEPA's own words."""
        log.debug("%s", message)

    def _taken(self, template: str) -> bool:
        if template_id(template) in self.account.templates:
            return True
        problem = self.problem
        why = guard(problem.seed_template, template, problem.train_texts)
        if why is not None:
            if (template, why) not in self.account.rejected:
                self.account.rejected.append((template, why))
            return False
        return self.account.adopt(template, self._parent)

    def _await(self, work: Awaitable[R]) -> R:
        async def done() -> R:
            if self._over:
                raise concurrent.futures.CancelledError
            return await work

        waiting = self._waiting = asyncio.run_coroutine_threadsafe(done(), self._loop)
        result: R = waiting.result()
        return result
