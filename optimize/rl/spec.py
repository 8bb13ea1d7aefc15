"""What a training job was asked to do: all that a resumed job needs, and no secret."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from collector.errors import BadInput
from collector.registry import check_slot_name
from optimize.dataset import Task, load_tasks, split
from optimize.rl.methods import method

Promote = Literal["auto", "canary", "never"]
CANARY_SHARE = 0.1


@dataclass(frozen=True)
class RlSpec:
    """`model` is the base: the demo model's name, or a folder of safetensors. `tasks` None: from traces alone.

    `credit` None: chosen by the method and the episodes. `samples`: rollouts of each training task a round;
    `temperature`: what those agents find in OPENAI_TEMPERATURE. `holdout` and `validation`: counts or shares of tasks.
    """

    model: str
    slot: str
    method: str = "rft"
    credit: str | None = None
    tasks: str | None = None
    command: tuple[str, ...] = ()
    grader: str | None = None
    from_traces: bool = False
    rounds: int = 1
    samples: int = 4
    temperature: float = 1.0
    holdout: int | float = 0.4
    validation: int | float = 0.25
    epochs: float = 2.0
    batch_size: int = 16
    learning_rate: float | None = None
    rank: int = 8
    beta: float = 0.0
    max_stale: int = 0
    seed: int = 0
    promote: Promote = "auto"
    concurrency: int = 4
    timeout: float = 120.0
    sandbox: bool = False
    roles: tuple[str, ...] = ()
    tasks_sha256: str | None = None
    cwd: str = field(default_factory=lambda: str(Path.cwd()))
    started_ns: int = field(default_factory=time.time_ns)

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {**asdict(self), "command": list(self.command), "roles": list(self.roles)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "RlSpec":
        """The spec of a stored job. Raises BadInput where it is none."""
        known = {item.name for item in fields(cls)}
        lists = {name: tuple(found.get(name) or ()) for name in ("command", "roles")}
        try:
            return cls(**{**{name: value for name, value in found.items() if name in known}, **lists})
        except TypeError as error:
            raise BadInput(f"the job's spec cannot be read: {error}") from None

    def load(self) -> tuple[list[Task], list[Task], list[Task]]:
        """`(training, validation, held-out)` tasks, all empty without tasks. Raises BadInput."""
        if self.tasks is None:
            return [], [], []
        from optimize.apo.spec import file_sha256

        path = Path(self.cwd) / self.tasks
        tasks = load_tasks(path)
        if self.tasks_sha256 not in (None, file_sha256(path)):
            raise BadInput(f"{path} is not the file that the job began with: start a new job", param="tasks")
        rest, held = split(tasks, self.holdout, self.seed)
        training, validation = split(rest, self.validation, self.seed)
        return training, validation, held


def check(spec: RlSpec) -> None:
    """Raise BadInput for what can be seen to be wrong before anything runs."""
    from optimize.credit import METHODS

    check_slot_name(spec.slot)
    method(spec.method)
    if spec.credit is not None and spec.credit not in METHODS:
        raise BadInput(f"unknown credit {spec.credit!r}; known: {', '.join(METHODS)}", param="credit")
    if spec.promote not in ("auto", "canary", "never"):
        raise BadInput(f"--promote is auto, canary or never, not {spec.promote!r}", param="promote")
    if not spec.from_traces and (spec.tasks is None or not spec.command):
        raise BadInput("give --tasks and the agent after --, or --from-traces", param="tasks")
    if spec.command and spec.tasks is None:
        raise BadInput("an agent needs --tasks to run on", param="tasks")
    if spec.tasks is not None and not spec.command:
        raise BadInput("--tasks needs the agent's command after --, for example: -- python agent.py", param="command")
    if spec.rounds < 1 or (spec.rounds > 1 and not spec.command):
        raise BadInput("--rounds is 1 or more, and more than 1 needs tasks and an agent to run", param="rounds")
