"""Credit of logged episodes: rewards gathered, tasks and anchors found, roles kept apart."""

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from collector.errors import BadInput
from collector.model import Episode, Step
from optimize import credit
from optimize.credit import METHODS, StepCredit, assign
from optimize.value import Ridge


def step(number: int, text: str = "", *, role: str | None = "main", task: str = "task", **rewards: float) -> Step:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": task}]
    messages += [{"role": "tool", "content": line} for line in text.splitlines()]
    given = [{"name": name, "value": value} for name, value in rewards.items()]
    return Step(f"span-{task}-{number}-{text}", number, role, "m", {}, messages, [], 1, 1, given)


def episode(name: str, *steps: Step, reward: float | None = None, **others: float) -> Episode:
    named = {**({} if reward is None else {"reward": reward}), **others}
    return Episode(name, list(steps), [{"name": one, "value": value} for one, value in named.items()], reward)


def advantages(found: list[StepCredit], name: str) -> list[float | None]:
    return [one.advantage for one in found if one.episode_id == name]


def crowd(count: int = 24, seed: int = 0) -> list[Episode]:
    """Episodes of two tasks; the tool's answer in the middle tells how it ends."""
    dice = random.Random(seed)
    made = []
    for number in range(count):
        found = dice.random() < 0.5
        task = f"task {number % 2}"
        news = f"the key is {'here' if found else 'lost'}"
        steps = [step(0, task=task), step(1, news, task=task)]
        steps += [step(2 + at, news + "\nwalking" * (at + 1), task=task) for at in range(dice.randint(0, 2))]
        made.append(episode(f"e{number}", *steps, reward=float(found) + dice.gauss(0, 0.1)))
    return made


def test_step_and_episode_rewards_add_up_and_the_last_step_earns_the_episodes() -> None:
    one = episode("e", step(0, reward=0.5), step(1, cost=2.0), reward=1.0)
    found = assign([one], "discounted", gamma=0.5, weights={"reward": 1.0, "cost": -0.25})
    assert [item.advantage for item in found] == [0.5 + 0.5 * 0.5, 0.5]
    assert [item.return_ for item in found] == [0.75, 0.5]
    assert found[0] == StepCredit("e", "span-task-0-", 0, "main", "discounted", 0.75, 0.75)
    assert advantages(assign([one], "broadcast"), "e") == [1.5, 1.5]


def test_of_several_rewards_of_one_name_the_latest_counts() -> None:
    rewards = [{"name": "reward", "value": 1.0, "ts_ns": 5}, {"name": "reward", "value": 3.0, "ts_ns": 2}]
    assert advantages(assign([Episode("e", [step(0)], rewards, None)], "broadcast"), "e") == [1.0]


def test_an_episode_of_which_only_the_sum_is_known_has_that_reward() -> None:
    assert advantages(assign([Episode("e", [step(0)], [], 0.25)], "broadcast"), "e") == [0.25]


@pytest.mark.parametrize("method", METHODS)
def test_an_episode_without_reward_gets_none_and_changes_nobody_else(method: str) -> None:
    some = crowd()
    silent = episode("silent", step(0, task="task 0"), step(1, task="task 0"), mood=3.0)
    idle = episode("idle", reward=1.0)
    found = assign([silent, *some, idle], method)
    assert [(one.advantage, one.return_) for one in found[:2]] == [(None, None), (None, None)]
    assert found[2:] == assign(some, method)
    assert len(found) == 2 + sum(len(one.steps) for one in some)
    assert all(one.advantage is not None and math.isfinite(one.advantage) for one in found[2:])


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_episodes_and_the_arrival_of_spans_change_nothing(method: str) -> None:
    some = crowd()
    dice = random.Random(1)
    shuffled = [replace(one, steps=dice.sample(one.steps, len(one.steps))) for one in dice.sample(some, len(some))]
    expected = {(one.episode_id, one.step): one for one in assign(some, method)}
    for one in assign(shuffled, method):
        twin = expected[(one.episode_id, one.step)]
        assert one.advantage == pytest.approx(twin.advantage, abs=1e-9)
        assert one.span_id == twin.span_id


@pytest.mark.parametrize("method", METHODS)
def test_only_the_chosen_roles_learn_but_all_earn(method: str) -> None:
    some = [
        episode(f"e{at}", step(0, role="planner"), step(1, f"plan {at % 2}", role="coder", reward=at % 2), reward=1.0)
        for at in range(8)
    ]
    found = assign(some, method, roles={"planner"})
    assert all((one.advantage is None) == (one.role == "coder") for one in found)
    assert all(one.return_ is not None for one in found)
    if method != "gigpo":  # there the comparison itself is among learners
        assert [one for one in found if one.role == "planner"] == [
            one for one in assign(some, method) if one.role == "planner"
        ]


def test_groups_are_the_tasks_by_default_or_what_key_says() -> None:
    some = [episode(f"{task}{at}", step(0, task=task), reward=float(at)) for task in "ab" for at in range(3)]
    by_task = assign(some, "leave_one_out")
    assert [one.advantage for one in by_task] == [-1.5, 0.0, 1.5] * 2
    lumped = [one.advantage for one in assign(some, "leave_one_out", key=lambda _: "all")]
    np.testing.assert_allclose(lumped, credit.leave_one_out([0, 1, 2, 0, 1, 2]))
    paired = {one.episode_id: one.episode_id[1] for one in some}
    assert [one.advantage for one in assign(some, "group", key=paired)] == [0.0] * 6
    with pytest.raises(BadInput, match="must name a group"):
        assign(some, "group", key={"a0": 1})


def test_a_task_seen_once_has_no_baseline() -> None:
    assert advantages(assign([episode("e", step(0), reward=3.0)], "group"), "e") == [0.0]


def test_gigpo_compares_steps_that_saw_the_same_whatever_the_spaces_and_the_call_ids() -> None:
    def asked(number: int, call: str, gap: str) -> Step:
        tool = {"id": call, "function": {"name": "look", "arguments": "{}"}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "text", "text": f"Find{gap}it"}]},
            {"role": "assistant", "content": None, "tool_calls": [tool]},
            {"role": "tool", "content": f"Door{gap} A", "tool_call_id": call},
        ]
        return Step(f"{call}{number}", number, "main", "m", {}, messages, [], 1, 1, [])

    some = [
        episode("good", asked(0, "call-1", " "), step(1, "only here"), reward=1.0),
        episode("bad", asked(0, "call-2", "\n "), step(1, "only there"), reward=0.0),
    ]
    found = assign(some, "gigpo", gamma=1.0, weight=2.0, key=lambda _: 0)
    np.testing.assert_allclose([one.advantage for one in found], [3.0, 1.0, -3.0, -1.0], atol=1e-6)
    merged = assign(some, "gigpo", gamma=1.0, key=lambda _: 0, anchor=lambda _, step: step.step)
    np.testing.assert_allclose([one.advantage for one in merged], [2.0, 2.0, -2.0, -2.0], atol=1e-6)


def test_gae_puts_the_credit_where_the_news_came() -> None:
    some = crowd(60)
    found = assign(some, "gae", lam=0.0)
    news = [one.advantage for one in found if one.step == 0]
    after = [one.advantage for one in found if one.step >= 2]
    ends = {one.episode_id: one.reward or 0.0 for one in some}
    assert np.corrcoef(news, [ends[one.episode_id] for one in found if one.step == 0])[0, 1] > 0.9
    assert float(np.abs(np.array(after, float)).mean()) < 0.5 * float(np.abs(np.array(news, float)).mean())


def test_gae_with_lambda_one_is_the_return_minus_the_value_and_so_is_the_default_shaping() -> None:
    some = crowd()
    whole = assign(some, "gae", lam=1.0, gamma=0.9)
    shaped = assign(some, "shaped", gamma=0.9)
    np.testing.assert_allclose([one.advantage for one in whole], [one.advantage for one in shaped], atol=1e-9)
    assert [one.return_ for one in whole] == [one.advantage for one in assign(some, "discounted", gamma=0.9)]


def test_shaping_takes_a_potential_of_ones_own() -> None:
    one = episode("e", step(0), step(1), reward=1.0)
    assert advantages(assign([one], "shaped", potential=lambda _, step: 0.25 * step.step), "e") == [1.0, 0.75]


def test_td_lambda_returns_lie_between_the_reward_and_the_value() -> None:
    found = assign(crowd(60), "td_lambda", lam=0.0, rounds=5)
    ends = [one for one in found if one.step >= 2]
    assert all(one.return_ is not None and one.advantage is not None for one in ends)
    spread = float(np.std([one.advantage for one in found if one.step > 0]))
    assert spread < float(np.std([one.advantage for one in assign(crowd(60), "broadcast")]))


def test_standardised_advantages_count_each_episode_once() -> None:
    def lone(length: int) -> list[float | None]:
        some = [
            episode("long", *(step(at) for at in range(length)), reward=1.0),
            episode("short", step(0), reward=0.0),
            episode("other", step(0), reward=0.5),
        ]
        return advantages(assign(some, "broadcast", standardise=True), "short")

    assert lone(1) == pytest.approx(lone(50))
    found = assign(crowd(), "discounted", standardise=True)
    per_episode = {one.episode_id: [x.advantage for x in found if x.episode_id == one.episode_id] for one in found}
    assert np.mean([np.mean(np.array(one, float)) for one in per_episode.values()]) == pytest.approx(0, abs=1e-9)
    assert np.mean([np.mean(np.array(one, float) ** 2) for one in per_episode.values()]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "params", "said"),
    [
        ("ppo", {}, "unknown method 'ppo'; known: broadcast, discounted, leave_one_out, group, gae"),
        ("discounted", {"lam": 0.5}, "discounted takes no 'lam'; it takes: gamma, weights"),
        ("discounted", {"gamma": 2.0}, "gamma must lie between 0 and 1"),
        ("gae", {"folds": 1}, "folds must be a whole number >= 2"),
        ("broadcast", {"weights": {"reward": math.nan}}, "weights must be finite"),
        ("broadcast", {"roles": "main"}, "roles must be a collection"),
    ],
)
def test_what_is_not_known_is_refused(method: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        assign(crowd(4), method, **params)


def test_a_reward_that_is_not_finite_and_an_episode_given_twice_are_refused() -> None:
    with pytest.raises(BadInput, match=r"rewards\.reward must be finite"):
        assign([episode("e", step(0), reward=math.nan)], "broadcast")
    with pytest.raises(BadInput, match="some given twice"):
        assign([episode("e", step(0)), episode("e", step(0))], "broadcast")


@pytest.mark.parametrize("method", METHODS)
def test_no_episodes_give_no_credit(method: str) -> None:
    assert assign([], method) == []


def test_the_value_function_can_be_replaced() -> None:
    class Constant(Ridge):
        def fit(self, *_: Any) -> Any:
            return lambda rows: np.full(len(rows), 0.5)

    found = assign([episode(name, step(0), reward=1.0) for name in "ab"], "gae", value=Constant())
    assert [one.advantage for one in found] == [0.5, 0.5]
