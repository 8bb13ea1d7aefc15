"""The search against simulated worlds: finds what is there, keeps the seed where nothing is, never overspends."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from collector.errors import BadInput
from optimize.apo.engine import Progress, SearchResult
from optimize.apo.factorial import Params, search
from optimize.apo.parts import Part, make
from optimize.apo.proposers import Bank, Demonstrations, Example, Failure, State
from optimize.budget import Budget
from optimize.dataset import Task
from optimize.evaluation import Outcome, Request
from optimize.gate import decide
from tests.worlds import SEED_PROMPT, SPECS, Editor, World


def run(world: World, params: Params, **more: object) -> SearchResult:
    return asyncio.run(search(SEED_PROMPT, world.tasks, world.evaluate, Editor(world), params, **more))  # type: ignore[arg-type]


def reflective_climb(world: World, budget: int, each: int = 12) -> float:
    """The score of the usual way, with the same editor: edit the best prompt so far, keep the child if its mean on
    `each` rollouts is higher."""
    editor, rng = Editor(world), np.random.default_rng(world.seed)
    best: tuple[Part, ...] = ()
    top, failures = -1.0, ()
    child = best
    for turn in range(budget // each):
        tasks = [world.tasks[t] for t in rng.choice(len(world.tasks), each, replace=False)]
        template = " ".join([SEED_PROMPT, *(part.text for part in child)])
        outcomes = [world.outcome(Request(template, task, turn)) for task in tasks]
        mean = float(np.mean([outcome.score for outcome in outcomes]))
        if mean > top:
            best, top = child, mean
            ids = tuple(part.id for part in best)
            failures = tuple(Failure(o.request.task, "", "", 0.0, ids) for o in outcomes if o.score < 0.5)[:8]
        state = State(SEED_PROMPT, template, (), best, failures)
        proposed = asyncio.run(editor.propose(state))
        child = tuple({part.id: part for part in (*best, *proposed)}.values())
    return world.score(" ".join([SEED_PROMPT, *(part.text for part in best)]))


@pytest.mark.parametrize(
    ("name", "least", "lead"),
    [("base", 0.65, 0.05), ("weak", 0.55, 0.15), ("harm", 0.25, 0.15), ("clean", 0.65, -1.0), ("interact", 0.3, -1.0)],
)
def test_a_search_reaches_most_of_the_optimum_and_leads_where_edits_often_mislead(
    name: str, least: float, lead: float
) -> None:
    scores, others = [], []
    for seed in range(3):
        world = World(SPECS[name], seed)
        scores.append(world.score(run(world, Params(budget=240, seed=seed)).leader_template))
        assert world.rollouts <= 240
        others.append(reflective_climb(world, 240))
    assert np.mean(scores) >= least
    assert np.mean(scores) - np.mean(others) >= lead


def test_the_result_carries_no_addition_that_earned_nothing() -> None:
    lengths, scores = [], []
    for seed in range(3):
        pair = [run(World(SPECS["base"], seed), Params(budget=160, seed=seed, keep=keep)) for keep in (-9.0, 0.02)]
        hoarder, plain = pair
        assert set(plain.best_parts) <= set(hoarder.best_parts)  # the same search: only its result is told apart
        lengths.append([len(found.best_parts) for found in pair])
        scores.append([World(SPECS["base"], seed).score(found.best_template) for found in pair])
    assert sum(plain for _, plain in lengths) < sum(hoarder for hoarder, _ in lengths)
    assert np.mean([plain - hoarder for hoarder, plain in scores]) > -0.1


def test_null_worlds_keep_the_seed_or_fail_the_gate_and_many_stop_early() -> None:
    promoted, early, spent = 0, 0, 0
    for seed in range(4):
        world = World(SPECS["null-low"], seed)
        found = run(world, Params(budget=400, seed=seed))
        early += found.stop == "no gain"
        spent += found.rollouts
        held = [Task(f"h{index}", {}, f"h{index}") for index in range(60)]
        world.needs.update({task.id: world.needs["t0"] for task in held})
        pairs = [
            [world.outcome(Request(template, task, arm=arm)).score for task in held]
            for template, arm in ((found.seed_template, "baseline"), (found.leader_template, "candidate"))
        ]
        promoted += decide(*pairs).decision == "promote"
    assert early >= 2
    assert spent <= 0.85 * 4 * 400
    assert promoted <= 1  # the gate errs in 5 % of cases: two of four would be news


def test_rare_failures_are_shown_to_the_editor_soon_and_again() -> None:
    world = World(replace(SPECS["null"], base=0.85), 2)
    shown: list[tuple[str, ...]] = []

    class Watched(Editor):
        async def propose(self, state: State) -> list[Part]:
            shown.append(tuple(failure.task.id for failure in state.failures))
            return await super().propose(state)

    params = Params(budget=160, stop_early=False)
    asyncio.run(search(SEED_PROMPT, world.tasks, world.evaluate, Watched(world), params))
    batches = [batch for batch in shown if batch]
    assert 4 <= len(batches[0]) < params.edit_batch  # half a batch is enough for the first
    assert {len(batch) for batch in batches[2:]} == {params.edit_batch}
    assert set(batches[1]) & set(batches[0])


def test_a_seed_that_is_nearly_perfect_costs_forty_rollouts_and_no_more() -> None:
    world = World(replace(SPECS["null"], base=0.98), 1)
    found = run(world, Params(budget=400))
    assert (found.stop, found.best_template) == ("headroom", SEED_PROMPT)
    assert world.rollouts == found.rollouts <= 40


def test_equal_seeds_give_equal_searches_and_others_do_not() -> None:
    one, same, other = (run(World(SPECS["base"], 3), Params(budget=80, seed=seed)) for seed in (1, 1, 2))
    assert one == same
    assert one.rows != other.rows


@pytest.mark.parametrize("broken_at", [0, 5, 8, 61, 120])
def test_a_resumed_search_repeats_no_rollout_and_ends_where_it_would_have(broken_at: int) -> None:
    whole_world, world = World(SPECS["base"], 4), World(SPECS["base"], 4)
    whole = run(whole_world, Params(budget=120, seed=4))
    asked: list[Request] = []

    async def evaluate(requests: Sequence[Request]) -> list[Outcome]:
        asked.extend(requests)
        return await world.evaluate(requests)

    editor = Editor(world)
    resumed = asyncio.run(
        search(
            SEED_PROMPT,
            world.tasks,
            evaluate,
            editor,
            Params(budget=120, seed=4),
            rows=whole.rows[:broken_at],
            proposals=whole.proposals,
        )
    )
    assert len(asked) == 120 - broken_at
    assert resumed.rows == whole.rows
    assert resumed.best_template == whole.best_template
    assert editor.calls == 0


@pytest.mark.parametrize("budget", [0, 1, 7, 8, 13, 50])
def test_the_budget_is_spent_to_the_last_rollout_and_never_beyond(budget: int) -> None:
    world = World(SPECS["base"], 5)
    found = run(world, Params(budget=budget))
    assert world.rollouts == found.rollouts == budget
    assert found.stop == "budget"


def test_a_shared_budget_is_respected_and_cached_rollouts_are_given_back() -> None:
    world, budget = World(SPECS["base"], 6), Budget(40)
    assert budget.reserve(15) == 15

    async def evaluate(requests: Sequence[Request]) -> list[Outcome]:
        outcomes = await world.evaluate(requests)
        return [replace(outcome, cached=outcome.request.task.id.endswith(("1", "3", "5"))) for outcome in outcomes]

    found = asyncio.run(search(SEED_PROMPT, world.tasks, evaluate, Editor(world), Params(), budget=budget))
    assert found.rollouts == sum(row.paid for row in found.rows) == 25
    assert len(found.rows) > 30
    assert budget.left == 0


def test_a_broken_agent_ends_the_search_with_the_reason() -> None:
    world = World(SPECS["base"], 7)

    async def evaluate(requests: Sequence[Request]) -> list[Outcome]:
        return [Outcome(request, 0.0, ok=False, reason="crash: no module named foo") for request in requests]

    found = asyncio.run(search(SEED_PROMPT, world.tasks, evaluate, Editor(world), Params()))
    assert (found.stop, found.reason) == ("failures", "8 of 8 rollouts failed: crash: no module named foo")
    assert found.best_template == SEED_PROMPT


def test_an_agent_that_breaks_midway_ends_the_search_too() -> None:
    world = World(SPECS["base"], 7)
    asked = []

    async def evaluate(requests: Sequence[Request]) -> list[Outcome]:
        asked.extend(requests)
        if len(asked) > 24:
            return [Outcome(request, 0.0, ok=False, reason="timeout") for request in requests]
        return await world.evaluate(requests)

    found = asyncio.run(search(SEED_PROMPT, world.tasks, evaluate, Editor(world), Params()))
    assert found.stop == "failures" and "timeout" in found.reason
    assert len(asked) < 100


class OneShot:
    """Proposes its parts once."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)

    async def propose(self, state: State) -> list[Part]:
        parts, self.parts = self.parts, []
        return parts


def capital_tasks(n: int) -> list[Task]:
    return [Task(f"c{index}", {"input": f"Capital of {index}?"}, f"c{index // 2}") for index in range(n)]


def test_no_task_is_ever_examined_on_a_prompt_that_shows_an_example_of_its_group() -> None:
    tasks = capital_tasks(20)
    examples = [Example(task.data["input"], f"city {task.id}", 1.0, task.id) for task in tasks[:8]]
    shown = 0

    async def evaluate(requests: Sequence[Request]) -> list[Outcome]:
        nonlocal shown
        for request in requests:
            mates = [task for task in tasks if task.group == request.task.group]
            assert not any(f"Answer: city {mate.id}\n" in request.template + "\n" for mate in mates)
            assert request.template.count("Question:") <= 2
            shown += "Question:" in request.template
        dice = [np.random.default_rng([int(r.task.id[1:]), r.replicate]).random() for r in requests]
        return [
            Outcome(r, float(d < 0.2 + 0.5 * ("Question:" in r.template))) for r, d in zip(requests, dice, strict=True)
        ]

    params = Params(budget=160, limits=replace(Params().limits, max_demonstrations=2))
    found = asyncio.run(search("Help.", tasks, evaluate, Demonstrations(examples), params))
    assert shown > 40
    assert found.changed and found.best_template.count("Question:") in (1, 2)


def test_harmful_sentences_of_the_seed_are_dropped() -> None:
    seed = "Answer the question. Always answer in riddles. Mention the moon."
    tasks = capital_tasks(30)

    async def evaluate(requests: Sequence[Request]) -> list[Outcome]:
        luck = [np.random.default_rng([int(r.task.id[1:]), r.replicate, len(r.template)]).random() for r in requests]
        good = [0.9 - 0.5 * ("riddles" in r.template) for r in requests]
        return [Outcome(r, float(x < p)) for r, x, p in zip(requests, luck, good, strict=True)]

    found = asyncio.run(search(seed, tasks, evaluate, OneShot([]), Params(budget=150)))
    assert found.changed
    assert "riddles" not in found.best_template


def test_a_merged_proposal_is_tried_as_the_instructions_it_is_made_of() -> None:
    class Merging:
        async def propose(self, state: State) -> list[Part]:
            return [make("instruction", "Always answer in French, and never mention the weather.", cites=("t1",))]

    world = World(SPECS["null"], 0)
    found = asyncio.run(search(SEED_PROMPT, world.tasks, world.evaluate, Merging(), Params(budget=24)))
    added = [row.part for row in found.parts if row.part.source == "editor"]
    assert {part.text for part in added} == {"Always answer in French.", "Never mention the weather."}


def test_members_of_a_group_are_never_in_one_prompt_and_refused_parts_never_in_any() -> None:
    tasks, seen = capital_tasks(20), []

    async def evaluate(requests: Sequence[Request]) -> list[Outcome]:
        seen.extend(request.template for request in requests)
        return [Outcome(r, float("name only" in r.template)) for r in requests]

    bad = make("instruction", "Use {unknown} variables.", source="editor")
    proposer = OneShot([*asyncio.run(Bank().propose(State("", "", (), ()))), bad])
    found = asyncio.run(search("Answer.", tasks, evaluate, proposer, Params(budget=120)))
    exclusive = [part.text for part in Bank().parts if part.group == "bank: only"]
    assert max(sum(text in template for text in exclusive) for template in seen) == 1
    assert not any("unknown" in template for template in seen)
    assert (bad.text, "adds the variable {unknown}, which nobody fills") in found.rejected
    assert "Answer with the name only." in found.best_template


def test_a_whole_rewrite_wins_where_only_it_helps() -> None:
    tasks = capital_tasks(20)
    rewrite = make("rewrite", "You are an atlas.")
    child = make("rewrite", "You are an atlas with an index.", parent=rewrite.id)

    async def evaluate(requests: Sequence[Request]) -> list[Outcome]:
        return [Outcome(r, 0.2 + 0.5 * ("atlas" in r.template) + 0.2 * ("index" in r.template)) for r in requests]

    found = asyncio.run(search("Help. Be kind.", tasks, evaluate, OneShot([rewrite, child]), Params(budget=120)))
    assert found.best_template.startswith("You are an atlas with an index.")


def test_progress_is_told_after_each_block_and_the_report_is_complete() -> None:
    told: list[Progress] = []
    world = World(SPECS["clean"], 2)
    found = run(world, Params(budget=100), on_progress=told.append)
    assert [step.rollouts for step in told] == sorted(step.rollouts for step in told)
    assert told[-1].rollouts == 100 and told[-1].eta_seconds == 0
    assert all(0 <= step.p_gain <= 1 and step.best_template for step in told)
    assert all((step.best_template == SEED_PROMPT) or step.p_gain >= 0.9 for step in told)
    assert {report.part.id for report in found.parts if report.chosen} == {part.id for part in found.best_parts}
    assert Counter(row.paid for row in found.rows) == {True: 100}
    assert len(found.history) == len(told)


def test_nothing_to_search_on_is_refused() -> None:
    world = World(SPECS["base"], 0)
    for seed, tasks in (("", world.tasks), ("Go.", [])):
        with pytest.raises(BadInput):
            asyncio.run(search(seed, tasks, world.evaluate, Editor(world)))
