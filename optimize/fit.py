"""From a script's function, resources and data sets to a job, and back."""

import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collector import settings
from collector.client import Client, open_client
from collector.console import console
from collector.errors import BadInput
from optimize.apo.examples import labelled
from optimize.apo.job import run_setup
from optimize.apo.origin import Origin
from optimize.apo.proposers import Bank, Demonstrations
from optimize.apo.result import ApoResult, holdout
from optimize.apo.setup import Setup
from optimize.apo.spec import ApoSpec
from optimize.dataset import Task, make_task, split
from optimize.function import FunctionRollouts, identity
from optimize.inference import asker
from optimize.jobs import decoded, new_job_id
from optimize.llm import Ask, completer
from optimize.patience import patiently
from optimize.prompt import PromptTemplate
from optimize.rollout import Plan, Rollout
from optimize.screen import Screen, show_result
from optimize.spans import SpanWriter

if TYPE_CHECKING:
    from optimize.api import APO, FitResult, Trainer

MODEL = "gpt-5-mini"
SHOTS = 6  # tasks with a known answer that may become examples in the prompt


async def fit(trainer: "Trainer", agent: Callable[..., Any], train: list[Any], val: list[Any]) -> "FitResult":
    """The whole way. See `Trainer.fit`."""
    from optimize.api import FitResult, HeldOutEvidence

    flags = {"store.data_dir": None if trainer.data_dir is None else str(trainer.data_dir)}
    config = settings.load(flags=flags)
    bound = bind(agent, trainer.initial_resources)
    data = datasets(train, val, trainer.holdout, trainer.algorithm.seed)
    client = open_client(data_dir=config.store.data_dir)
    try:
        done = await _job(trainer, bound, data, client, config)
    finally:
        client.close()
    best = done.seed_template if done.verdict == "reject" else done.best_template
    evidence = None if done.gate is None else HeldOutEvidence(holdout(done.gate))
    prompt = bound.prompt if best == bound.prompt.neutral() else PromptTemplate.from_neutral(best, bound.prompt.engine)
    return FitResult(prompt, done.verdict, evidence, done.report or Path(), done.reason, done.as_dict())


@dataclass(frozen=True)
class Bound:
    """An agent with its resources: `prompt` is the one to improve, under `name`."""

    agent: Callable[..., Any]
    name: str
    prompt: PromptTemplate
    others: Mapping[str, Any]

    @property
    def slot(self) -> str:
        """The prompt's name in the store."""
        own = getattr(self.agent, "__name__", type(self.agent).__name__)
        return re.sub(r"[^A-Za-z0-9_-]", "_", f"{own}-{self.name}")[-64:]

    @property
    def is_async(self) -> bool:
        """Whether calling the agent gives an awaitable."""
        call = getattr(self.agent, "__call__", None)  # noqa: B004  # the method is looked at, not called
        return inspect.iscoroutinefunction(self.agent) or inspect.iscoroutinefunction(call)

    def call(self, task: Any, template: str) -> Any:
        """Call the agent on a task with a candidate, by the names of its parameters."""
        resources = {**self.others, self.name: PromptTemplate.from_neutral(template, self.prompt.engine)}
        parameters = list(inspect.signature(self.agent).parameters.values())[1:]
        if any(one.kind is one.VAR_KEYWORD for one in parameters):
            return self.agent(task, **resources)
        taken = {one.name: resources[one.name] for one in parameters if one.name in resources}
        if self.name in taken:
            return self.agent(task, **taken)
        return self.agent(task, resources[self.name])

    def context(self) -> str:
        """What decides a reward beside prompt and task, as far as it can be seen from here: see `identity`."""
        return identity(self.agent, sorted(self.others))


def bind(agent: Callable[..., Any], resources: Mapping[str, Any]) -> Bound:
    """Raises BadInput where the agent is no function, or there is not one prompt to improve that it takes."""
    if not callable(agent):
        raise BadInput(f"the agent must be a function, not {type(agent).__name__}", param="agent")
    prompts = {name: value for name, value in resources.items() if isinstance(value, PromptTemplate)}
    if len(prompts) != 1:
        named = ", ".join(prompts) or "none"
        raise BadInput(f"initial_resources must hold one PromptTemplate, here: {named}", param="initial_resources")
    ((name, prompt),) = prompts.items()
    if len(inspect.signature(agent).parameters) < 2:
        raise BadInput(f"the agent must take a task and {name}", param="agent")
    return Bound(agent, name, prompt, {other: value for other, value in resources.items() if other != name})


@dataclass(frozen=True)
class Data:
    """Tasks to search on, tasks held out, and the script's own object behind each task's id."""

    search: list[Task]
    held: list[Task]
    originals: Mapping[str, Any]

    def digest(self) -> str:
        """Names exactly these tasks, split in this way."""
        known = [[task.id for task in self.search], [task.id for task in self.held]]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def datasets(train: Sequence[Any], val: Sequence[Any], share: int | float, seed: int) -> Data:
    """Split by group; what is in both sets is left to the held-out side, unless nothing would be left to search on.

    Raises BadInput where there are too few tasks.
    """
    originals: dict[str, Any] = {}
    searchable, provable = _tasks(train, originals), _tasks(val, originals)
    kept = {task.id for task in provable}
    groups = {task.group for task in provable}
    search = [task for task in searchable if task.id not in kept and task.group not in groups]
    if provable and search:
        return Data(search, provable, originals)
    everything = list({task.id: task for task in [*searchable, *provable]}.values())
    if len(everything) < 2:
        raise BadInput(
            f"{len(everything)} tasks are too few: some are searched on, others held out", param="train_dataset"
        )
    return Data(*split(everything, share, seed), originals)


def _tasks(items: Sequence[Any], originals: dict[str, Any]) -> list[Task]:
    tasks: dict[str, Task] = {}
    for item in items:
        task = make_task(_data(item))
        number = sum(known == task.id or known.startswith(f"{task.id}#") for known in tasks)
        task = replace(task, id=f"{task.id}#{number + 1}") if number else task
        tasks[task.id] = task
        originals[task.id] = item
    return list(tasks.values())


def _data(item: Any) -> dict[str, Any]:
    """The JSON of a task: a mapping, a dataclass, a pydantic model, or anything else as {"task": ...}."""
    if isinstance(item, Mapping):
        found: Any = dict(item)
    elif is_dataclass(item) and not isinstance(item, type):
        found = asdict(item)
    elif hasattr(item, "model_dump"):
        found = item.model_dump()
    else:
        found = {"task": item}
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


async def _job(trainer: "Trainer", bound: Bound, data: Data, client: Client, config: settings.Settings) -> ApoResult:
    algorithm = trainer.algorithm
    template = bound.prompt.neutral()
    fingerprint = hashlib.sha256(f"{template}\n{data.digest()}\n{bound.context()}".encode()).hexdigest()
    spec = ApoSpec(
        slot=trainer.slot or bound.slot,
        tasks="",
        command=(),
        budget=algorithm.budget,
        holdout=len(data.held),
        seed=algorithm.seed,
        engine=algorithm.engine,
        concurrency=trainer.concurrency,
        timeout=trainer.timeout,
        tasks_sha256=fingerprint,
        mode="function",
        budget_tokens=algorithm.budget_tokens,
        budget_seconds=algorithm.budget_seconds,
        engine_params=algorithm.engine_params,
        gate=config.gate.method,
    )
    job_id = _broken_off(client, spec) or new_job_id()
    spans = SpanWriter(client, config.store.data_dir, emails=config.store.redaction.emails)

    async def record(plan: Plan, rollout: Rollout, start_ns: int) -> None:
        await spans.rollout(spec.slot, plan, rollout, start_ns)
        if rollout.reward is not None:
            key = f"{rollout.episode_id}:reward"
            reward = {"episode_id": rollout.episode_id, "value": rollout.reward, "idempotency_key": key}
            await patiently(lambda: client.reward(reward))

    async def origin() -> dict[str, Origin]:
        added = await patiently(lambda: client.add_version(spec.slot, kind="prompt", template=template))
        return {spec.slot: Origin(template, int(added["version"]), adopted=False)}

    rollouts = FunctionRollouts(
        lambda task, text: bound.call(data.originals[task.id], text),
        is_async=bound.is_async,
        concurrency=trainer.concurrency,
        timeout=trainer.timeout,
        record=record,
        run_id=job_id,
    )
    ask = _ask(algorithm, config, spans, f"{job_id}-editor")
    shots = Demonstrations(labelled(data.search), limit=SHOTS, seed=spec.seed)
    setup = Setup(data.search, data.held, rollouts, bound.context(), origin, lambda found: [Bank(), shots], ask)
    try:
        with Screen(console, job_id, "run the script again") as screen:
            done = await run_setup(spec, setup, client, settings=config, job_id=job_id, on_progress=screen.update)
    finally:
        rollouts.close()
        spans.close()
    show_result(done, console)
    return done


def _broken_off(client: Client, spec: ApoSpec) -> str | None:
    """The newest job that was asked the very same and did not come to an end."""
    same = {name: value for name, value in spec.as_dict().items() if name not in ("started_ns", "cwd")}
    for job in client.jobs():
        known = decoded(job, "spec")
        if job["status"] in ("running", "cancelled") and {name: known.get(name) for name in same} == same:
            return str(job["job_id"])
    return None


def _ask(algorithm: "APO", config: settings.Settings, spans: SpanWriter, episode: str) -> Ask | None:
    """The script's client, else the configuration's model, else nobody."""
    named = algorithm.model or config.optimizer.model
    if algorithm.inference_client is not None:
        model = named or os.environ.get("OPENAI_MODEL") or MODEL
        return asker(algorithm.inference_client, model, spans, episode)
    if not named:
        return None
    base = config.optimizer.api_base or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    return completer(base, named, config.optimizer.api_key or os.environ.get("OPENAI_API_KEY"))
