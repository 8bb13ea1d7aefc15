"""Which credit method suits some episodes, and the commands that tell it."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from collector.errors import BadInput
from collector.model import Episode
from optimize import commands  # noqa: F401  # mounts the commands
from optimize.compare import compare, recommend
from optimize.credit import CAUTIOUS, PROVEN, TRUSTED, assign, foresight
from optimize.credit_cli import episodes_app, optimize_app
from tests.unit.collector.rows import call, write
from tests.unit.optimize.test_credit_episodes import advantages, crowd, episode, step


def blind(count: int = 24) -> list[Episode]:
    """Episodes whose steps tell nothing of how they end."""
    dice = random.Random(1)
    return [
        episode(f"e{at}", step(0), step(1, f"n{at}"), step(2, f"m{at}"), reward=dice.random()) for at in range(count)
    ]


def test_where_the_value_function_foresees_returns_it_is_recommended_and_removes_noise() -> None:
    found = compare(crowd(48))
    assert found.foresight >= PROVEN and found.recommended == "gae" and (found.value_r2 or 0) > 0.3
    assert found.removed["broadcast"] == 0
    assert found.removed["gae"] > found.removed["leave_one_out"] > 0
    json.dumps(found.as_dict())


def test_where_nothing_tells_the_end_the_value_function_is_not_trusted() -> None:
    found = compare(blind())
    assert found.foresight < PROVEN and found.recommended != "gae"
    assert found.value_r2 is not None and found.value_r2 < 0.2


def test_gaes_own_lambda_is_small_where_the_value_foresees_and_cautious_where_not() -> None:
    for some, lam in ((crowd(48), TRUSTED), (blind(), CAUTIOUS)):
        assert advantages(assign(some, "gae"), "e0") == advantages(assign(some, "gae", lam=lam), "e0")


def test_foresight_of_noise_is_no_better_than_chance() -> None:
    dice = np.random.default_rng(0)
    found = [
        foresight([np.array([0.0, 0.0, dice.normal()]) for _ in range(40)], [dice.normal(size=3) for _ in range(40)], 1)
        for _ in range(100)
    ]
    assert abs(float(np.mean(found))) < 0.5 and np.mean(np.array(found) >= PROVEN) < 0.1


def test_a_value_that_knows_the_outcome_is_foresight() -> None:
    dice = np.random.default_rng(0)
    ends = dice.choice([0.0, 1.0], 40)
    rewards = [np.array([0.0, 0.0, end]) for end in ends]
    assert foresight(rewards, [np.array([0.5, end, end]) for end in ends], 1.0) > PROVEN
    assert foresight(rewards[:1], [np.zeros(3)], 1.0) == 0.0


def test_too_few_rewards_are_refused() -> None:
    with pytest.raises(BadInput, match="too few"):
        compare(crowd(4))


@pytest.mark.parametrize(
    ("seen", "method"),
    [
        ((1.0, 9.0, 1.0, 1.0), "leave_one_out"),
        ((3.0, 3.0, 0.0, 0.0), "gae"),
        ((3.0, 0.0, 0.0, 0.9), "gigpo"),
        ((3.0, 0.0, 0.9, 0.0), "leave_one_out"),
        ((3.0, 0.0, 0.0, 0.0), "discounted"),
    ],
)
def test_the_recommendation_follows_from_what_the_episodes_are_like(seen: tuple[float, ...], method: str) -> None:
    assert recommend(*seen)[0] == method


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("collector.settings.DEFAULT_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("RATCHET_URL", raising=False)
    monkeypatch.setenv("RATCHET_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    dice = random.Random(0)
    lines: list[Any] = []
    for number in range(40):
        end = dice.choice([0.0, 1.0])
        for at, text in enumerate(("go", f"it is {'good' if end else 'bad'}")):
            messages = json.dumps([{"role": "user", "content": "task"}, {"role": "tool", "content": text}])
            lines.append(call(10 * number + at, episode_id=f"e{number}", input_messages=messages))
        reward = {"reward_id": f"r{number}", "target_kind": "episode", "target_id": f"e{number}", "name": "reward",
                  "value": end + 0.1 * dice.random(), "source": "code", "ts_ns": number}  # fmt: skip
        lines.append(("reward", reward))
    write(tmp_path, *lines)
    return tmp_path


def test_the_command_compares_on_stored_episodes(store: Path) -> None:
    told = CliRunner().invoke(optimize_app, ["credit", "--compare", "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["rewarded"] == 40 and found["recommended"] == "gae"
    shown = CliRunner().invoke(optimize_app, ["credit", "--compare"])
    assert "40 of 40 episodes" in shown.stdout and "gae" in shown.stdout
    assert CliRunner().invoke(optimize_app, ["credit"]).exit_code == 2


def test_an_episode_is_shown_with_what_each_step_was_worth(store: Path) -> None:
    told = CliRunner().invoke(episodes_app, ["show", "e1", "--credit", "gae", "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert [type(one["credit"]) for one in found["steps"]] == [float, float]
    shown = CliRunner().invoke(episodes_app, ["show", "e1", "--credit", "gae"])
    assert "credit" in shown.stdout and "reward" in shown.stdout
    plain = json.loads(CliRunner().invoke(episodes_app, ["show", "e1", "--json"]).stdout)
    assert all(one.get("credit") is None for one in plain["steps"])


@pytest.mark.parametrize("arguments", [["e1", "--credit", "magic"], ["e1", "--credit", "gae", "--limit", "1"]])
def test_what_cannot_be_credited_is_said(store: Path, arguments: list[str]) -> None:
    assert CliRunner().invoke(episodes_app, ["show", *arguments]).exit_code == 2
