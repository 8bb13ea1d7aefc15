"""A child process: readiness, restarts, last words, stopping."""

import asyncio
import os
import signal
import sys
import time

import pytest

from collector.errors import Unavailable
from proxy import child as module
from proxy.child import Child, Command

SERVES = "import sys, time; print('ready', flush=True); sys.stdin.read(); time.sleep(60)"


def python(code: str, stdin: bytes = b"") -> Command:
    return Command([sys.executable, "-c", code], stdin)


def until_ready(child: Child) -> "asyncio.Future[bool]":
    return asyncio.ensure_future(child.said_ready.wait())


async def until(condition: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.005)


def test_a_child_is_ready_when_it_says_so_and_ends_on_sigterm() -> None:
    async def main() -> None:
        child = Child("thing", lambda: python(SERVES), until_ready)
        assert await child.start(60) is True
        assert child.pid is not None
        assert await child.stop(30) is True
        assert child.pid is None
        assert child.restarts == 0

    asyncio.run(main())


def test_a_child_that_is_slow_to_start_is_kept() -> None:
    async def main() -> None:
        child = Child("thing", lambda: python("import time; time.sleep(60)"), until_ready)
        assert await child.start(0.05) is False
        assert child.pid is not None
        await child.stop(30)

    asyncio.run(main())


def test_a_child_that_dies_at_start_is_reported_with_its_last_lines() -> None:
    code = "import sys; sys.stderr.write('line\\n' * 50 + 'no such slot: capital\\n'); sys.exit(3)"

    async def main() -> None:
        with pytest.raises(Unavailable) as caught:
            await Child("worker0", lambda: python(code), until_ready).start(60)
        assert "worker0 did not start (exit code 3)" in caught.value.message
        assert caught.value.message.endswith("no such slot: capital")
        assert caught.value.message.count("line\n") == module.TAIL_LINES - 1

    asyncio.run(main())


def test_what_dies_is_restarted_with_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_DELAY", 0.01)
    counted: list[int] = []

    async def main() -> None:
        born: list[float] = []

        def command() -> Command:
            born.append(time.monotonic())
            return python(SERVES if len(born) in (1, 4) else "raise SystemExit(1)")

        child = Child("thing", command, until_ready, lambda: counted.append(child.restarts))
        await child.start(60)
        first = child.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: len(born) == 4 and child.said_ready.is_set())
        assert child.pid not in (None, first)
        assert child.restarts == 3
        await child.stop(30)

    asyncio.run(main())
    assert counted == [1, 2, 3]


def test_a_restart_that_is_impossible_just_now_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_DELAY", 0.01)
    commands = [python(SERVES), Command(["/no/such/program"], b""), python(SERVES)]

    async def main() -> None:
        child = Child("thing", lambda: commands.pop(0), until_ready)
        await child.start(60)
        child.signal(signal.SIGKILL)
        await until(lambda: not commands and child.said_ready.is_set())
        assert child.restarts == 2
        await child.stop(30)

    asyncio.run(main())


def test_a_child_that_ignores_sigterm_is_killed_after_its_patience() -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"

    async def main() -> None:
        child = Child("thing", lambda: python(code), until_ready)
        await child.start(60)
        assert await child.stop(0.1) is False
        assert child.pid is None

    asyncio.run(main())


def test_stopping_while_a_restart_waits_starts_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_DELAY", 30.0)
    starts: list[int] = []

    async def main() -> None:
        def command() -> Command:
            starts.append(1)
            return python(SERVES)

        child = Child("thing", command, until_ready)
        await child.start(60)
        child.signal(signal.SIGKILL)
        await until(lambda: child.restarts == 1)
        assert await child.stop(5) is True

    asyncio.run(main())
    assert len(starts) == 1


def test_stdin_carries_the_payload_and_ctrl_c_does_not_reach_the_child() -> None:
    code = (
        "import os, sys; payload = sys.stdin.read(); own = os.getsid(0) == os.getpid();"
        "sys.stderr.write(f'{len(payload)} {own}'); sys.exit(7)"
    )

    async def main() -> None:
        with pytest.raises(Unavailable, match=r"300000 True"):
            await Child("thing", lambda: python(code, b"x" * 300_000), until_ready).start(60)

    asyncio.run(main())
