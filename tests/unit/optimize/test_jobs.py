import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from collector.client import Client
from collector.errors import Conflict, NotFound
from optimize import jobs
from optimize.jobs import Job, JobCancelled, JobLock, cancel, decoded
from tests.unit.optimize.world import World


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(jobs, "REPORT_SECONDS", 0.0)
    made = World(lambda system, user: "")
    yield made
    made.close()


def job(world: World) -> Job:
    return Job(cast(Client, world), "job-1", "apo", "s", {"budget": 40})


def test_a_jobs_state_is_its_latest_event(world: World) -> None:
    async def work() -> None:
        made = job(world)
        await made.start()
        await made.report(rollouts=3)
        await made.report(best="x")
        await made.finish("done", {"promoted": True})

    asyncio.run(work())
    state = world.job("job-1")
    assert (state["status"], state["kind"], state["slot"]) == ("done", "apo", "s")
    assert decoded(state, "spec") == {"budget": 40}
    assert decoded(state, "progress") == {"rollouts": 3, "best": "x"}
    assert decoded(state, "result") == {"promoted": True}
    assert decoded(world.events_[0], "result") == {}


def test_progress_is_not_written_more_often_than_anybody_looks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "REPORT_SECONDS", 60.0)

    async def work() -> None:
        made = job(world)
        await made.start()
        for index in range(50):
            await made.report(rollouts=index)
        await made.finish("done")

    asyncio.run(work())
    assert [event["status"] for event in world.events_] == ["running", "done"]
    assert decoded(world.job("job-1"), "progress") == {"rollouts": 49}


def test_a_cancelled_job_learns_of_it_even_where_progress_was_written_later(world: World) -> None:
    async def work() -> None:
        made = job(world)
        await made.start()
        cancel(cast(Client, world), "job-1")
        await made._write("running")  # what a report that began before the cancellation does
        await made.report(rollouts=1)

    with pytest.raises(JobCancelled):
        asyncio.run(work())


def test_a_resumed_job_is_not_stopped_by_an_old_cancellation(world: World) -> None:
    async def work() -> None:
        await job(world).start()
        cancel(cast(Client, world), "job-1")
        time.sleep(0.001)
        again = job(world)
        await again.start()
        await again.report(rollouts=1)

    asyncio.run(work())
    assert world.job("job-1")["status"] == "running"


def test_only_a_running_job_can_be_cancelled(world: World) -> None:
    asyncio.run(job(world).finish("done"))
    with pytest.raises(Conflict, match="job-1 is done"):
        cancel(cast(Client, world), "job-1")
    with pytest.raises(NotFound):
        cancel(cast(Client, world), "job-2")


def test_one_process_at_a_time_works_on_a_job_and_death_frees_it(tmp_path: Path) -> None:
    source = (
        "import sys, time\nfrom pathlib import Path\nfrom optimize.jobs import JobLock\n"
        "with JobLock(Path(sys.argv[1]), 'job-1'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", source, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(Conflict, match="another process"), JobLock(tmp_path, "job-1"):
                pass
            with JobLock(tmp_path, "job-2"):
                pass
        finally:
            holder.kill()
    with JobLock(tmp_path, "job-1"):
        pass
    with JobLock(tmp_path, "job-1"):
        pass
