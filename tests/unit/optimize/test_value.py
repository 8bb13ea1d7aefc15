import random
from typing import Any

import numpy as np
import pytest

from collector.model import Step
from optimize.state import State, observe
from optimize.value import Ridge, cross_fit


def seen(text: str, number: int = 0, task: str = "task") -> State:
    messages = [{"role": "user", "content": task}, {"role": "tool", "content": text}]
    return observe(Step("s", number, "main", None, {}, messages, [], None, None, []))


def world(count: int, seed: int = 0, noise: float = 0.3) -> tuple[list[str], list[list[State]], list[Any], list[Any]]:
    """Episodes whose second state tells their mean return: (ids, states, targets, true values)."""
    dice = random.Random(seed)
    ids, states, targets, truth = [], [], [], []
    for number in range(count):
        good = dice.random() < 0.5
        reward = float(good) + dice.gauss(0, noise)
        ids.append(f"e{number}")
        states.append([seen("start"), seen("it went well" if good else "it went badly", 1)])
        targets.append(np.full(2, reward))
        truth.append(np.array([0.5, float(good)]))
    return ids, states, targets, truth


def test_values_come_near_the_truth() -> None:
    ids, states, targets, truth = world(200)
    values = cross_fit(ids, states, targets, Ridge())
    assert np.sqrt(np.mean((np.concatenate(values) - np.concatenate(truth)) ** 2)) < 0.08


def test_an_episodes_own_rewards_never_move_its_values() -> None:
    ids, states, targets, _ = world(30)
    before = cross_fit(ids, states, targets, Ridge())
    for index in (0, 7, 29):
        moved = list(targets)
        moved[index] = targets[index] + 1000
        after = cross_fit(ids, states, moved, Ridge())
        np.testing.assert_array_equal(after[index], before[index])
        assert not np.allclose(np.concatenate(after), np.concatenate(before))


def test_nor_when_the_targets_are_bootstrapped() -> None:
    ids, states, targets, _ = world(30)

    def values(gained: list[Any]) -> list[Any]:
        def refine(index: int, valued: Any) -> Any:
            return np.array([valued[1], gained[index][1]])

        return cross_fit(ids, states, gained, Ridge(), refine=refine, rounds=3)

    moved = list(targets)
    moved[4] = targets[4] + 1000
    np.testing.assert_array_equal(values(moved)[4], values(targets)[4])


def test_the_order_of_episodes_does_not_matter() -> None:
    ids, states, targets, _ = world(40)
    order = random.Random(3).sample(range(40), 40)
    shuffled = cross_fit(
        [ids[at] for at in order], [states[at] for at in order], [targets[at] for at in order], Ridge()
    )
    straight = cross_fit(ids, states, targets, Ridge())
    for at, values in zip(order, shuffled, strict=True):
        np.testing.assert_array_equal(values, straight[at])


def test_text_that_says_nothing_falls_back_to_the_mean() -> None:
    dice = random.Random(0)
    ids = [f"e{number}" for number in range(120)]
    states = [[seen(" ".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=8)))] for _ in ids]
    targets = [np.array([5 + dice.gauss(0, 1)]) for _ in ids]
    values = np.concatenate(cross_fit(ids, states, targets, Ridge()))
    assert np.sqrt(np.mean((values - 5) ** 2)) < 0.35  # the returns' own spread is 1


def test_one_episode_alone_has_value_zero_and_two_have_each_others() -> None:
    assert cross_fit(["a"], [[seen("x")]], [np.array([3.0])], Ridge())[0].tolist() == [0.0]
    pair = cross_fit(["a", "b"], [[seen("x")], [seen("y")]], [np.array([3.0]), np.array([7.0])], Ridge())
    assert [values[0] for values in pair] == pytest.approx([7.0, 3.0], abs=1e-3)


def test_long_episodes_weigh_no_more_than_short_ones() -> None:
    ids = [f"e{number}" for number in range(40)]
    lengths = [20 if number % 2 else 1 for number in range(40)]
    states = [[seen("same")] * length for length in lengths]
    targets = [np.full(length, float(length == 20)) for length in lengths]
    values = np.concatenate(cross_fit(ids, states, targets, Ridge()))
    assert np.abs(values - 0.5).max() < 0.1


def test_a_state_knows_nothing_of_its_answer_or_of_the_future() -> None:
    asked = [{"role": "user", "content": "Q"}]
    first = Step("a", 0, None, None, {}, asked, [{"role": "assistant", "content": "yes"}], 1, 1, [{"value": 1}])
    second = Step("b", 0, None, None, {}, asked, [{"role": "assistant", "content": "no"}], 9, 9, [])
    assert observe(first) == observe(second)


def test_an_input_without_messages_or_with_pictures_is_a_state_too() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:..."}}
    empty = observe(Step("a", 0, None, None, {}, [], [], None, None, []))
    shown = observe(Step("a", 0, None, None, {}, [{"role": "user", "content": [picture, "look"]}], [], None, None, []))
    assert (empty.task, empty.last, empty.text) == ("", "", "")
    assert shown.task.endswith("look")
    assert empty.digest != shown.digest
    assert np.isfinite(Ridge().features([empty, shown])).all()
