"""The Python API: a classic in-process script needs nothing but its import changed.

    from optimize.api import APO, PromptTemplate, Trainer, rollout

    @rollout
    async def agent(task, prompt_template):
        prompt = prompt_template.format(**task)
        ...
        return reward

    trainer = Trainer(algorithm=APO(AsyncOpenAI()), initial_resources={"prompt_template": PromptTemplate("...")})
    result = trainer.fit(agent, train_dataset=tasks)

No server is needed. Rollouts, rewards and the optimizer's own calls go to the store in `data_dir` (RATCHET_DATA_DIR, by
default ./data); a script that was killed goes on where it was when it is run again.
"""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from collector.console import console
from collector.errors import BadInput, RatchetError
from optimize.apo.spec import check_params
from optimize.prompt import PromptTemplate

__all__ = ["APO", "FitResult", "HeldOutEvidence", "PromptTemplate", "Trainer", "rollout"]

R = TypeVar("R")
Function = TypeVar("Function", bound=Callable[..., Any])

# Parameters of other trainers that have no meaning here, taken so that their scripts run as they are.
_FOREIGN_APO = {
    "diversity_temperature",
    "rollout_batch_timeout",
    "run_initial_validation",
    "gradient_prompt_files",
    "apply_edit_prompt_files",
    "_poml_trace",
}
_FOREIGN_TRAINER = {
    "adapter",
    "daemon",
    "dev",
    "heartbeat_interval",
    "hooks",
    "llm_proxy",
    "max_rollouts",
    "max_tasks",
    "n_workers",
    "port",
    "runner",
    "store",
    "strategy",
    "tracer",
    "triplet_exporter",
}


def rollout(function: Function | None = None, **_options: Any) -> Any:
    """Marks a function, sync or async, as an agent: `agent(task, **resources)`, which returns the reward."""
    if function is None:
        return rollout
    function.__rollout__ = True  # type: ignore[attr-defined]
    return function


class APO:
    """Automatic prompt optimization.

    `inference_client`: an OpenAI client, sync or async, whose `model` writes critiques and edits; without one, the
    configuration's `optimizer`, else only what needs no language model. `engine`: factorial, beam or gepa. `budget`: in
    rollouts; `budget_tokens` and `budget_seconds` limit more. The parameters of the beam are known by name.
    """

    def __init__(
        self,
        inference_client: Any = None,
        *,
        model: str | None = None,
        engine: str = "factorial",
        budget: int = 400,
        seed: int = 0,
        budget_tokens: int | None = None,
        budget_seconds: float | None = None,
        gradient_model: str | None = None,
        apply_edit_model: str | None = None,
        async_openai_client: Any = None,
        **engine_params: Any,
    ) -> None:
        self.inference_client = inference_client if inference_client is not None else async_openai_client
        self.model = model or apply_edit_model or gradient_model
        self.engine, self.budget, self.seed = engine, budget, seed
        self.budget_tokens, self.budget_seconds = budget_tokens, budget_seconds
        self.engine_params = {name: value for name, value in engine_params.items() if name not in _FOREIGN_APO}
        check_params(self.engine_params)
        self.best_prompt: PromptTemplate | None = None  # of the last fit

    def get_best_prompt(self) -> PromptTemplate:
        """The best prompt of the last fit. Raises RatchetError before one."""
        if self.best_prompt is None:
            raise RatchetError("no prompt was searched for yet: call Trainer.fit first")
        return self.best_prompt


class HeldOutEvidence(Mapping[str, Any]):
    """What the held-out test measured, by key or as attributes: n, before, after, diff, ci95, p_value, alpha,
    candidates_tried, needed_n, method."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"HeldOutEvidence({self._values!r})"


@dataclass(frozen=True)
class FitResult:
    """What a fit came to. `best_prompt` is the candidate unless the held-out test rejected it, then the one given;
    `holdout` is None where no candidate was found; `details` is the result as `ratchet optimize apo --json` has it."""

    best_prompt: PromptTemplate
    verdict: Literal["promote", "shadow", "reject"]
    holdout: HeldOutEvidence | None
    report_path: Path
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict, repr=False)


class Trainer:
    """Fits prompts to tasks.

    `initial_resources`: what the agent takes by name, one of them a PromptTemplate. `n_runners`: agents at once.
    `holdout`: tasks kept for the final test where no val_dataset is given, a share or a count. `data_dir`: the store.
    `timeout`: seconds that one rollout may take. `slot`: the prompt's name in the store.
    """

    def __init__(
        self,
        algorithm: APO | None = None,
        initial_resources: Mapping[str, Any] | None = None,
        *,
        n_runners: int | None = None,
        holdout: int | float = 0.4,
        data_dir: str | Path | None = None,
        timeout: float = 120.0,
        slot: str | None = None,
        **foreign: Any,
    ) -> None:
        if unknown := sorted(set(foreign) - _FOREIGN_TRAINER):
            raise BadInput(f"Trainer has no parameter {unknown[0]!r}", param=unknown[0])
        self.algorithm = algorithm or APO()
        self.initial_resources = dict(initial_resources or {})
        self.concurrency = n_runners or 8
        self.holdout, self.timeout, self.slot = holdout, timeout, slot
        self.data_dir = data_dir

    def fit(
        self, agent: Callable[..., Any], train_dataset: Iterable[Any], val_dataset: Iterable[Any] | None = None
    ) -> FitResult:
        """Search on `train_dataset`, prove on `val_dataset` (else on tasks held out of the former), print and return
        the best prompt.

        Tasks that are in both are left to the proof. Raises BadInput for what is wrong, RatchetError where the agent
        fails whatever its prompt.
        """
        from optimize.fit import fit

        result = _LOOP.run(fit(self, agent, list(train_dataset), list(val_dataset or ())))
        self.algorithm.best_prompt = result.best_prompt
        console.print("Best prompt:", style="bold")
        console.print(str(result.best_prompt), markup=False, highlight=False, soft_wrap=True)
        console.print(f"Report: {result.report_path}", markup=False, highlight=False, soft_wrap=True)
        return result

    def dev(
        self, agent: Callable[..., Any], train_dataset: Iterable[Any], val_dataset: Iterable[Any] | None = None
    ) -> FitResult:
        """The same as `fit`."""
        return self.fit(agent, train_dataset, val_dataset)


class _Loop:
    """One event loop for all fits of the process, in a thread of its own.

    So fit works where a loop runs already, as in a notebook, and an async client of the script, whose connections
    belong to the loop that opened them, still works at the next fit.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Run to the end; Ctrl-C cancels the work first."""
        future = asyncio.run_coroutine_threadsafe(work, self._started())
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            concurrent.futures.wait([future], timeout=10)
            raise

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="fit", daemon=True).start()
            return self._loop


_LOOP = _Loop()
