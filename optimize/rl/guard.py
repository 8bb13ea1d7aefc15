"""Watches a training run: keeps its curves, and stops it where it collapses."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

# What is kept of TRL's log at each step, under our names.
CURVES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "kl_base": "kl_base",
    "kl_logged": "kl_logged",
    "kl": "kl_penalty",
    "entropy": "entropy",
    "clip_ratio/region_mean": "clip_share",
    "cispo_clip_ratio": "clip_share",
    "written_tokens": "length",
    "reward": "reward",
    "rewards/margins": "margin",
}
OnStep = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Limits:
    """When a run counts as collapsed, `patience` steps in a row: `kl_base` nats a token above `most_kl`, or an entropy
    above `most_entropy` times the first steps' (the answers dissolve). A loss or gradient that is not finite counts at
    once.
    """

    most_kl: float = 4.0
    most_entropy: float = 4.0
    patience: int = 3


class Guard(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """`curves`: one entry a step; `stopped`: why the run was ended early, None where it was not."""

    def __init__(self, limits: Limits, on_step: OnStep | None = None) -> None:
        self.limits = limits
        self.curves: list[dict[str, float]] = []
        self.stopped: str | None = None
        self._on_step = on_step
        self._bad: dict[str, int] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """A step's figures."""
        found = {ours: float(logs[theirs]) for theirs, ours in CURVES.items() if logs and logs.get(theirs) is not None}
        if "loss" not in found:
            return
        self.curves.append({"step": float(state.global_step), **found})
        self.stopped = self.stopped or self._judge(found)
        if self.stopped is not None:
            control.should_training_stop = True
        if self._on_step is not None:
            self._on_step(int(state.global_step), int(state.max_steps), found)

    def _judge(self, found: Mapping[str, float]) -> str | None:
        if not all(math.isfinite(found.get(name, 0.0)) for name in ("loss", "grad_norm")):
            return "the loss or its gradient is not finite"
        first = [one["entropy"] for one in self.curves[:3] if "entropy" in one]
        high = self.limits.most_entropy * max(sum(first) / len(first), 0.5) if first else math.inf
        for name, value, most in (
            ("the divergence from the base model", found.get("kl_base", 0.0), self.limits.most_kl),
            ("the entropy", found.get("entropy", 0.0), high),
        ):
            self._bad[name] = self._bad.get(name, 0) + 1 if value > most else 0
            if self._bad[name] >= self.limits.patience:
                return f"{name} was {value:.3g}, above {most:.3g}, for {self.limits.patience} steps"
        return None
