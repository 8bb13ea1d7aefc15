"""What a prompt search was asked to do: all that a resumed job needs, and no secret."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from collector.errors import BadInput
from collector.registry import check_slot_name
from optimize.dataset import Task, load_tasks, split
from optimize.gate import Method

Promote = Literal["auto", "canary", "never"]
Mode = Literal["agent", "replay", "function"]
ENGINES = ("factorial", "beam", "gepa")
# By name: the beam's are those of Agent Lightning's APO; `minibatch` is gepa's reflection_minibatch_size.
ENGINE_PARAMS = ("beam_width", "branch_factor", "beam_rounds", "gradient_batch_size", "val_batch_size", "minibatch")
CANARY_SHARE = 0.1
MIN_BUDGET = 20


@dataclass(frozen=True)
class ApoSpec:
    """`budget` is in rollouts of the search; the held-out test adds `replicates` times two a held-out task. The other
    budgets, where given, are for both together. `holdout`: count or share.

    `slot`: one name, or several joined by commas, which are then searched and promoted together. `mode`: agent runs
    `command` on the tasks, replay sends logged requests again (`force`: of several-step episodes too), function calls a
    function of the process that began the job.
    """

    slot: str
    tasks: str
    command: tuple[str, ...]
    grader: str | None = None
    budget: int = 400
    holdout: int | float = 0.4
    seed: int = 0
    engine: str = "factorial"
    promote: Promote = "auto"
    concurrency: int = 4
    timeout: float = 120.0
    sandbox: bool = False
    model: str | None = None  # OPENAI_MODEL as the agent sees it
    cwd: str = field(default_factory=lambda: str(Path.cwd()))
    tasks_sha256: str | None = None
    mode: Mode = "agent"
    force: bool = False
    budget_tokens: int | None = None
    budget_usd: float | None = None
    budget_seconds: float | None = None
    replicates: int = 1
    runner: str = "local"
    engine_params: dict[str, Any] = field(default_factory=dict)
    gate: Method = "fixed"  # how the held-out test judges: chosen before anything is known
    started_ns: int = field(default_factory=time.time_ns)

    @property
    def slots(self) -> tuple[str, ...]:
        """The slots, of which `slot` is the list, joined by commas."""
        return tuple(self.slot.split(","))

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {**asdict(self), "command": list(self.command)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "ApoSpec":
        """The spec of a stored job. Raises BadInput where it is none."""
        known = {item.name for item in fields(cls)}
        try:
            spec = cls(**{name: value for name, value in found.items() if name in known})
            return cls(**{**asdict(spec), "command": tuple(spec.command)})
        except TypeError as error:
            raise BadInput(f"the job's spec cannot be read: {error}") from None

    def load(self) -> tuple[list[Task], list[Task]]:
        """`(search, held-out)` tasks. Raises BadInput where the file is wrong, or is not the one the job began with."""
        path = Path(self.cwd) / self.tasks
        tasks = load_tasks(path)
        if self.tasks_sha256 not in (None, file_sha256(path)):
            raise BadInput(f"{path} is not the file that the job began with: start a new job", param="tasks")
        return split(tasks, self.holdout, self.seed)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_params(params: Mapping[str, Any]) -> None:
    """Raise BadInput where an engine's parameter is unknown, or no number from 1 on."""
    for name, value in params.items():
        if name not in ENGINE_PARAMS:
            raise BadInput(f"no engine has a parameter {name!r}; there are: {', '.join(ENGINE_PARAMS)}", param=name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadInput(f"{name} must be a whole number from 1 on, not {value!r}", param=name)


def _check_slots(spec: ApoSpec) -> None:
    for slot in spec.slots:
        check_slot_name(slot)
    if len(set(spec.slots)) < len(spec.slots):
        raise BadInput(f"a slot is named twice in {spec.slot!r}", param="slot")
    if len(spec.slots) > 1 and spec.mode == "replay":
        raise BadInput("--replay sends single requests again, so it takes one slot", param="slot")


def check(spec: ApoSpec) -> None:
    """Raise BadInput for what can be seen to be wrong before anything runs."""
    _check_slots(spec)
    if spec.engine not in ENGINES:
        raise BadInput(f"there is no engine {spec.engine!r}; there are: {', '.join(ENGINES)}", param="engine")
    check_params(spec.engine_params)
    if spec.runner == "ray":
        raise BadInput("--runner ray: this build runs agents on one machine; leave out --runner", param="runner")
    if spec.runner != "local":
        raise BadInput(f"--runner is local, not {spec.runner!r}", param="runner")
    if spec.replicates < 1:
        raise BadInput(f"--replicates is at least 1, not {spec.replicates}", param="replicates")
    if spec.gate not in ("fixed", "anytime"):
        raise BadInput(f"--gate is fixed or anytime, not {spec.gate!r}", param="gate")
    if spec.promote not in ("auto", "canary", "never"):
        raise BadInput(f"--promote is auto, canary or never, not {spec.promote!r}", param="promote")
    if spec.budget < MIN_BUDGET:
        raise BadInput(f"a search needs a budget of at least {MIN_BUDGET} rollouts, not {spec.budget}", param="budget")
    if spec.mode == "replay" and spec.grader is None:
        raise BadInput("--replay needs --grader: new answers have no reward of their own", param="grader")
    if spec.mode == "agent" and not spec.command:
        raise BadInput("give the agent's command after --, for example: -- python agent.py", param="command")
