import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from collector.client import Client
from collector.errors import Unavailable
from optimize import patience
from optimize.dataset import Task, make_task
from optimize.grade import grader
from optimize.rollout import Plan, Rollout
from optimize.runner import Runner
from tests.patience import within
from tests.unit.optimize.world import AGENT, World, script

TASK = make_task({"id": "one", "question": "Say yes.", "expected": "yes"})


@pytest.fixture
def world() -> Iterator[World]:
    made = World(lambda system, user: "yes")
    yield made
    made.close()


def runner(world: World, command: list[str], **options: Any) -> Runner:
    return Runner(command, cast(Client, world), world.url, **{"grade": grader("exact"), "timeout": 20.0, **options})


def run(world: World, command: list[str], task: Task = TASK, **options: Any) -> Rollout:
    return asyncio.run(runner(world, command, **options).run(task))


def test_an_unmodified_agent_runs_in_its_own_episode_and_its_answer_is_graded(tmp_path: Path, world: World) -> None:
    done = run(world, script(tmp_path))
    assert (done.ok, done.reason, done.reward, done.score, done.answer) == (True, None, 1.0, 1.0, "yes")
    assert done.episode_id.startswith("run-")
    assert [span["episode_id"] for span in world.spans_] == [done.episode_id]
    assert (done.calls, done.input_tokens, done.output_tokens) == (1, 5, 1)
    posted = list(world.rewards.values())
    assert [(one["episode_id"], one["value"], one["source"]) for one in posted] == [(done.episode_id, 1.0, "code")]


def test_a_pin_sends_the_calls_to_that_version(tmp_path: Path, world: World) -> None:
    world.add_version("greeter", kind="prompt", template="Be brief.")
    asyncio.run(runner(world, script(tmp_path)).run(TASK, pin="greeter@1"))
    assert world.spans_[0]["input_messages"][0]["content"] == "Be brief."


def test_the_agent_gets_the_task_and_the_addresses_in_its_environment(tmp_path: Path, world: World) -> None:
    source = (
        "import json, os, sys; line = sys.stdin.readline(); e = os.environ\n"
        "print(json.dumps([line, e['RATCHET_TASK'], e['RATCHET_EPISODE'], e['RATCHET_URL'], e['OPENAI_BASE_URL'],"
        " e['OPENAI_API_BASE'], e['OPENAI_API_KEY'], sys.stdin.read()]))\n"
    )
    done = run(world, script(tmp_path, source), env={"PATH": os.environ["PATH"]})
    line, task, episode, url, base, old_base, key, rest = json.loads(done.answer)
    assert json.loads(line) == json.loads(task) == TASK.data
    assert (line[-1], rest) == ("\n", "")
    assert (episode, url, key) == (done.episode_id, world.url, "ratchet")
    assert base == old_base == f"{world.url}/e/{episode}/v1"


def test_a_key_of_the_user_reaches_the_agent(tmp_path: Path, world: World) -> None:
    run(world, script(tmp_path), api_key="rk-mine")
    assert world.keys == ["Bearer rk-mine"]


def test_what_the_agent_posts_itself_is_the_reward_and_the_grader_stays_silent(tmp_path: Path, world: World) -> None:
    body = "{'episode_id': os.environ['RATCHET_EPISODE'], 'value': 0.25}"
    source = AGENT + f"post(os.environ['RATCHET_URL'] + '/reward', {body})\n"
    done = run(world, script(tmp_path, source))
    assert (done.ok, done.reward) == (True, 0.25)
    assert len(world.rewards) == 1


def test_no_reward_is_a_failure_and_stays_missing(tmp_path: Path, world: World) -> None:
    done = run(world, script(tmp_path), grade=None)
    assert (done.ok, done.reason, done.reward, done.score) == (False, "no_reward", None, 0.0)
    assert not world.rewards


def test_a_broken_grader_is_a_failure_with_its_reason(tmp_path: Path, world: World) -> None:
    done = run(world, script(tmp_path), make_task({"id": "x", "question": "?"}))
    assert (done.ok, done.reason, done.reward) == (False, "grader", None)
    assert "neither `expected` nor `answer`" in done.detail


def test_a_crash_is_a_failure_that_tells_the_end_of_stderr(tmp_path: Path, world: World) -> None:
    done = run(world, script(tmp_path, "import sys; sys.stderr.write('x' * 5000 + 'out of cheese'); sys.exit(3)"))
    assert (done.ok, done.reason, done.reward) == (False, "crash", None)
    assert done.detail.startswith("exit code 3: x")
    assert done.detail.endswith("out of cheese")
    assert not world.rewards


def test_a_command_that_cannot_start_is_a_failure(world: World) -> None:
    done = run(world, ["/no/such/agent"])
    assert (done.ok, done.reason) == (False, "crash")
    assert "/no/such/agent" in done.detail


def test_a_crash_while_nobody_listens_is_told_apart(tmp_path: Path, world: World) -> None:
    made = Runner(script(tmp_path), cast(Client, world), "http://127.0.0.1:1", grade=grader("exact"))
    assert asyncio.run(made.run(TASK)).reason == "proxy_unreachable"


def test_an_agent_that_never_reads_stdin_and_floods_its_pipes_does_not_block(tmp_path: Path, world: World) -> None:
    task = make_task({"id": "big", "text": "y" * 300_000, "expected": "no"})
    source = "import sys\nfor _ in range(300): sys.stdout.write('o' * 10_000); sys.stderr.write('e' * 10_000)"
    done = run(world, script(tmp_path, source), task, timeout=60)
    assert (done.ok, done.reward) == (True, 0.0)
    assert len(done.answer) == 1 << 20


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"


def gone(pids: list[int]) -> bool:
    until = time.monotonic() + 30
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.01)
    return not any(alive(pid) for pid in pids)


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"])
open({path!r}, "a").write(f"{{os.getpid()}} {{child.pid}} ")
{end}
"""


def test_a_timeout_ends_the_whole_group_even_where_it_ignores_being_asked(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimize.process.TERM_SECONDS", 0.1)
    command = script(tmp_path, STUBBORN.format(path=str(tmp_path / "pids"), end="time.sleep(60)"))
    enough = within(1.0)  # for the agent to start its child
    done = run(world, command, timeout=enough)
    assert (done.ok, done.reason, done.reward) == (False, "timeout", None)
    assert done.seconds < enough + within(5)
    assert gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])


def test_a_child_that_outlives_its_agent_is_ended_and_does_not_hold_the_rollout(tmp_path: Path, world: World) -> None:
    command = script(tmp_path, STUBBORN.format(path=str(tmp_path / "pids"), end="print('yes')"))
    done = run(world, command)
    assert (done.ok, done.answer) == (True, "yes")
    assert done.seconds < within(5)
    assert gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])


def test_a_cancelled_run_leaves_nothing_running(tmp_path: Path, world: World) -> None:
    path = tmp_path / "pids"
    made = runner(world, script(tmp_path, STUBBORN.format(path=str(path), end="time.sleep(60)")), concurrency=2)

    async def interrupted() -> None:
        task = asyncio.create_task(made.run_all([Plan(make_task({"id": index})) for index in range(6)]))
        async with asyncio.timeout(60):
            while not path.exists() or len(path.read_text().split()) < 4:
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(interrupted())
    pids = [int(pid) for pid in path.read_text().split()]
    assert len(pids) == 4
    assert gone(pids)


def test_no_more_agents_run_at_once_than_asked_for_and_results_keep_the_order(tmp_path: Path) -> None:
    running: list[int] = []
    most = [0]

    def model(system: str, user: str) -> str:
        running.append(1)
        most[0] = max(most[0], len(running))
        time.sleep(0.02)
        running.pop()
        return user

    world = World(model)
    try:
        tasks = [make_task({"id": str(index), "question": str(index), "expected": str(index)}) for index in range(9)]
        batches: list[int] = []

        async def settled(batch: list[tuple[int, Rollout]]) -> None:
            batches.append(len(batch))

        made = runner(world, script(tmp_path), concurrency=2)
        done = asyncio.run(made.run_all([Plan(task) for task in tasks], settled))
    finally:
        world.close()
    assert [rollout.answer for rollout in done] == [task.id for task in tasks]
    assert all(rollout.reward == 1.0 for rollout in done)
    assert most[0] <= 2
    assert sum(batches) == 9
    assert len(world.rewards) == 9
    assert len({rollout.episode_id for rollout in done}) == 9


def test_a_collector_that_restarts_is_waited_for(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PAUSES", (0.01,) * 4)
    world.outage = 3
    assert run(world, script(tmp_path)).reward == 1.0
    world.outage = 99
    with pytest.raises(Unavailable):
        run(world, script(tmp_path))


def test_a_task_id_of_any_kind_makes_a_valid_episode(tmp_path: Path, world: World) -> None:
    task = make_task({"id": "São Tomé / 10% " + "x" * 200, "question": "?", "expected": "yes"})
    done = run(world, script(tmp_path), task)
    assert done.ok
    assert len(done.episode_id) <= 128
    assert done.episode_id.isascii()


def test_a_sandboxed_agent_works_in_an_empty_room_under_limits_without_the_users_keys(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "import json, os, resource\nopen('trace', 'w').write('x')\n"
        "print(json.dumps([os.getcwd(), os.environ['HOME'], os.environ.get('SECRET'), os.listdir('.'),"
        " resource.getrlimit(resource.RLIMIT_FSIZE)[0], os.environ['OPENAI_BASE_URL']]))"
    )
    script(tmp_path, source)
    env = {"PATH": os.environ["PATH"], "SECRET": "hush", "HOME": str(tmp_path)}
    command = [script(tmp_path, source)[0], "agent.py"]
    done = run(world, command, sandbox=True, cwd=tmp_path, env=env)
    assert done.ok, done.detail
    cwd, home, secret, files, limit, base = json.loads(done.answer)
    assert os.path.realpath(home) == os.path.realpath(cwd) != os.path.realpath(tmp_path)
    assert (secret, files, limit) == (None, ["trace"], 256 << 20)
    assert base.endswith("/v1")
    assert not Path(cwd).exists()
