"""What a job searches with: its tasks, who makes the rollouts, where the prompt comes from, whom to ask for edits."""

import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from collector.client import Client
from collector.errors import BadInput
from collector.settings import Settings
from optimize.apo.examples import gather
from optimize.apo.origin import Origin, find, live
from optimize.apo.proposers import Bank, Demonstrations, Example, Proposer
from optimize.apo.spec import ApoSpec
from optimize.dataset import Task, load_tasks, split
from optimize.evaluate import context_hash
from optimize.grade import check_tasks, grader
from optimize.llm import Ask, Reply, completer
from optimize.logged import gather as gather_logged
from optimize.logged import load, models, save
from optimize.patience import patiently
from optimize.resend import Resend
from optimize.rollout import Rollouts
from optimize.runner import Runner

Free = Callable[[str], Sequence[Proposer]]


@dataclass(frozen=True)
class Setup:
    """The ingredients of one job.

    `context` is all that decides a reward beside prompt and task; `origin` finds the prompt that each slot starts from;
    `free` makes the proposers that need no language model, for that prompt; `ask` is the optimizer's model, None where
    there is none.
    """

    search: Sequence[Task]
    held: Sequence[Task]
    rollouts: Rollouts
    context: str
    origin: Callable[[], Awaitable[dict[str, Origin]]]
    free: Free
    ask: Ask | None
    notes: tuple[str, ...] = ()  # what a reader of the result has to know of them


def agent_setup(
    spec: ApoSpec, client: Client, base_url: str, settings: Settings, api_key: str | None, job_id: str
) -> Setup:
    """The user's command, once a task, with the candidate pinned in its URL. Raises BadInput for what is wrong."""
    search, held = spec.load()
    if spec.grader is not None:
        check_tasks(spec.grader, [*search, *held])
    runner = Runner(
        spec.command,
        client,
        base_url,
        api_key=api_key,
        grade=None if spec.grader is None else grader(spec.grader, settings.optimizer),
        grade_source="llm" if (spec.grader or "").startswith("judge:") else "code",
        concurrency=spec.concurrency,
        timeout=spec.timeout,
        cwd=Path(spec.cwd),
        env={**os.environ, "OPENAI_MODEL": spec.model} if spec.model else None,
        sandbox=spec.sandbox,
        run_id=job_id,
    )

    async def origin() -> dict[str, Origin]:
        return await find(client, runner, spec.slots, search)

    return Setup(
        search,
        held,
        runner,
        context_hash(spec.command, spec.grader, spec.model, Path(spec.cwd), adapters(client)),
        origin,
        traffic(client, spec, search, held),
        through_proxy(client, base_url, settings, api_key, job_id, priced=spec.budget_usd is not None),
    )


async def replay_setup(
    spec: ApoSpec, client: Client, base_url: str, settings: Settings, api_key: str | None, job_id: str
) -> Setup:
    """Logged requests of the slot sent again. Raises BadInput where there is nothing to send, or no such slot."""
    kept = Path(settings.store.data_dir) / "jobs" / f"{job_id}.tasks.jsonl"
    judge = spec.grader or ""
    logged = load(kept)
    if logged is None:
        known = load_tasks(Path(spec.cwd) / spec.tasks) if spec.tasks else []
        logged = await gather_logged(client, spec.slot, judge, known=known, force=spec.force)
        save(logged, kept)
    search, held = split(logged.tasks, spec.holdout, spec.seed)
    resend = Resend(
        client,
        base_url,
        spec.slot,
        grader(judge, settings.optimizer),
        api_key=api_key or os.environ.get("OPENAI_API_KEY"),
        grade_source="llm" if judge.startswith("judge:") else "code",
        concurrency=spec.concurrency,
        timeout=spec.timeout,
        run_id=job_id,
        priced=spec.budget_usd is not None,
    )

    async def origin() -> dict[str, Origin]:
        found = await live(client, spec.slot)
        if found is None:
            raise BadInput(f"there is no slot {spec.slot} yet: see `ratchet slots discover`", param="slot")
        return {spec.slot: found}

    return Setup(
        search,
        held,
        resend,
        context_hash(("replay",), judge, models(logged.tasks), Path(spec.cwd), adapters(client)),
        origin,
        traffic(client, spec, search, held),
        through_proxy(client, base_url, settings, api_key, job_id, priced=spec.budget_usd is not None),
        logged.notes,
    )


def traffic(client: Client, spec: ApoSpec, search: Sequence[Task], held: Sequence[Task]) -> Free:
    """The bank of format instructions, and demonstrations from the store's best episodes."""

    def free(template: str) -> Sequence[Proposer]:
        async def successes() -> list[Example]:
            return await gather(client, spec.slot, template, search, held)

        return [Bank(), Demonstrations(source=successes, seed=spec.seed)]

    return free


def through_proxy(
    client: Client, base_url: str, settings: Settings, api_key: str | None, job_id: str, *, priced: bool
) -> Ask | None:
    """The optimizer's model, called through the proxy as an episode of the job's own unless it has its own address.

    `priced`: look up in the store what each call cost.
    """
    optimizer = settings.optimizer
    if not optimizer.model:
        return None
    key = optimizer.api_key or api_key or os.environ.get("OPENAI_API_KEY")
    if optimizer.api_base:
        return completer(optimizer.api_base, optimizer.model, key)
    episode = f"{job_id}-editor"
    ask = completer(f"{base_url.rstrip('/')}/e/{episode}/v1", optimizer.model, key)

    async def ask_and_look(messages: list[dict[str, str]]) -> Reply:
        reply = await ask(messages)
        return Reply(reply.text, reply.tokens, await patiently(lambda: _price(client, episode)))

    return ask_and_look if priced else ask


def _price(client: Client, episode: str) -> float | None:
    """What the newest call of an episode cost, as far as the store knows by now."""
    client.flush()
    newest = client.spans(1, episode_id=episode)["spans"]
    return newest[0].get("cost_usd") if newest else None


def adapters(client: Client) -> str:
    """The adapters in force: with other weights, an agent is another agent."""
    live = [(slot["slot"], slot["live"]) for slot in client.slots() if slot["kind"] == "adapter"]
    return ",".join(
        f"{name}@{version}:{share}" for name, arms in sorted(live) for version, share in sorted(arms.items())
    )
