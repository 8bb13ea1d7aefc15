"""In-process rollouts: a Python function, sync or async, called once a task with the candidate as an argument."""

import asyncio
import hashlib
import inspect
import json
import os
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from optimize.dataset import Task
from optimize.grade import GradeError, finite
from optimize.rollout import Plan, Rollout, Settled, as_they_end, settled_already
from optimize.runner import task_part

# Names of errors, of whichever client library, that say nothing of the prompt: the model's endpoint was not there.
UPSTREAM = frozenset(
    {
        "APIConnectionError",
        "APITimeoutError",
        "ConnectError",
        "ConnectTimeout",
        "ConnectionError",
        "InternalServerError",
        "RateLimitError",
        "RemoteProtocolError",
    }
)

Call = Callable[[Task, str], Any]
Recorded = Callable[[Plan, Rollout, int], Awaitable[None]]


class FunctionRollouts:
    """Calls `call(task, template)`, which returns the reward or an awaitable of it.

    A sync function runs in a thread of its own pool, `concurrency` at once; on a timeout (`timeout` seconds) an async
    one is cancelled, while a thread cannot be ended and only its result is dropped. `record` is told of each rollout
    (plan, rollout, start in ns) before anybody else. A returned None is a missing reward, so a failure.
    """

    def __init__(
        self,
        call: Call,
        *,
        is_async: bool,
        concurrency: int = 4,
        timeout: float = 120.0,
        record: Recorded | None = None,
        run_id: str | None = None,
    ) -> None:
        self._call = call
        self._is_async = is_async
        self._free = asyncio.Semaphore(concurrency)
        self._pool = None if is_async else ThreadPoolExecutor(concurrency, thread_name_prefix="rollout")
        self._timeout = timeout
        self._record = record
        self._run_id = (run_id or secrets.token_hex(4)).replace("-", "")[-8:]

    @property
    def base_url(self) -> str:
        """Not known: the function has clients of its own."""
        return ""

    def close(self) -> None:
        """Forget the threads; those that still run end when their function does."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def run_all(self, plans: Sequence[Plan], on_settled: Settled | None = None) -> list[Rollout]:
        """See Rollouts."""
        return await as_they_end([self._one(plan) for plan in plans], settled_already, on_settled)

    async def _one(self, plan: Plan) -> Rollout:
        async with self._free:
            start_ns, began = time.time_ns(), time.monotonic()
            reward, reason, detail = await self._reward(plan)
            rollout = Rollout(
                task_id=plan.task.id,
                episode_id=plan.episode_id
                or f"run-{self._run_id}-{task_part(plan.task.id)}-{plan.replicate}-{secrets.token_hex(4)}",
                reward=reward,
                ok=reason is None,
                reason=reason,
                answer="",
                seconds=round(time.monotonic() - began, 3),
                detail=detail,
            )
        if self._record is not None:
            await self._record(plan, rollout, start_ns)
        return rollout

    async def _reward(self, plan: Plan) -> tuple[float | None, str | None, str]:
        """`(reward, reason, detail)`."""
        try:
            async with asyncio.timeout(self._timeout):
                value = await self._called(plan)
        except TimeoutError as error:
            if str(error):  # the function's own, not the limit's
                return None, "crash", f"TimeoutError: {error}"
            return None, "timeout", f"ended after {self._timeout:g} s"
        except (Exception, SystemExit) as error:  # noqa: BLE001  # boundary: the user's function may raise anything
            names = {kind.__name__ for kind in type(error).__mro__}
            return None, "upstream" if names & UPSTREAM else "crash", f"{type(error).__name__}: {error}"
        if value is None:
            return None, "no_reward", "the function returned None instead of a reward"
        try:
            return finite(value, "the function"), None, ""
        except GradeError as error:
            return None, "no_reward", error.message

    async def _called(self, plan: Plan) -> Any:
        if self._is_async:
            value = self._call(plan.task, plan.template or "")
        else:
            loop = asyncio.get_running_loop()
            value = await loop.run_in_executor(self._pool, self._call, plan.task, plan.template or "")
        return await value if inspect.isawaitable(value) else value


def identity(function: Callable[..., Any], resources: Sequence[str] = ()) -> str:
    """A hash of what decides the function's results, as far as it can be seen: an edited function is another one.

    The source files of its folder that are imported, the plain values that it refers to by name, OPENAI_MODEL, and the
    names of its further `resources`.
    """
    inner = inspect.unwrap(function)
    code = getattr(inner, "__code__", None)
    digest = hashlib.sha256(json.dumps([list(resources), os.environ.get("OPENAI_MODEL")]).encode())
    digest.update(json.dumps(_referred(inner, code), sort_keys=True).encode())
    try:
        digest.update(inspect.getsource(inner).encode())
    except (OSError, TypeError):
        digest.update(getattr(code, "co_code", b""))
    for path in _beside(getattr(code, "co_filename", None)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _referred(function: Callable[..., Any], code: Any) -> dict[str, Any]:
    """Plain values under names that the function uses: globals of its module, variables that it closes over."""
    if code is None:
        return {}
    found = {name: getattr(function, "__globals__", {}).get(name) for name in code.co_names}
    for name, cell in zip(code.co_freevars, getattr(function, "__closure__", None) or (), strict=False):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return {name: value for name, value in found.items() if isinstance(value, str | int | float | bool)}


def _beside(filename: str | None) -> list[Path]:
    """The imported source files of a function's folder, in order."""
    path = Path(filename or "")
    if not path.is_file():
        return []
    loaded = {Path(str(getattr(module, "__file__", None) or "")) for module in list(sys.modules.values())}
    return sorted(
        {path, *(one for one in loaded if one.parent == path.parent and one.suffix == ".py" and one.is_file())}
    )
