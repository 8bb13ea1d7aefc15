"""Which of several targets a call goes to: entries of one name share its calls by weight, and those that failed rest.

Smooth weighted round robin (as nginx's upstream module does it): over any run of calls each entry gets its share, and
none gets it in a row. A worker balances what it serves itself; workers don't know of each other's failures.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

BUSY = frozenset((429, 503))  # nothing was done, so nothing is billed, and another target may have room
T = TypeVar("T")


@dataclass
class Member(Generic[T]):
    """One entry: its share of the calls, and until when it rests after a failure."""

    target: T
    weight: float = 1.0
    current: float = 0.0
    resting_until: float = 0.0


@dataclass
class Group(Generic[T]):
    """The entries of one model name, and the models to fall back to when none of them answers."""

    members: Sequence[Member[T]]
    fallbacks: Sequence[str] = ()

    def pick(self, now: float, failed: T | None = None) -> T | None:
        """The next target; None where each one rests or has just failed."""
        free = [one for one in self.members if one.resting_until <= now and one.target is not failed]
        if not free:
            return None
        for member in free:
            member.current += member.weight
        chosen = max(free, key=lambda member: member.current)
        chosen.current -= sum(member.weight for member in free)
        return chosen.target

    def rest(self, target: T, until: float) -> None:
        """Leaves a target out until then."""
        for member in self.members:
            if member.target is target:
                member.resting_until = until


class Balance(Generic[T]):
    """The groups of a configuration, by model name."""

    def __init__(self, groups: Mapping[str, Group[T]], cooldown: float) -> None:
        self._groups = groups
        self._shared = {name for name, group in groups.items() if len(group.members) > 1 or group.fallbacks}
        self._cooldown = cooldown

    def shared(self, model: str | None) -> bool:
        """Whether another target can take over a call for the model."""
        return model in self._shared

    def first(self, model: str) -> T | None:
        """Where a call for the model goes. Where all rest, the next in turn: trying costs less than refusing."""
        group = self._groups.get(model)
        if group is None or model not in self._shared:
            return group.members[0].target if group is not None and group.members else None
        now = time.monotonic()
        return group.pick(now) or self._fallback(group, now, None) or group.pick(float("inf"))

    def after(self, model: str, failed: T) -> T | None:
        """Where a call goes after `failed`, which rests from now on, could not take it; None: nowhere else."""
        now = time.monotonic()
        for group in self._groups.values():
            group.rest(failed, now + self._cooldown)
        group = self._groups[model]
        return group.pick(now, failed) or self._fallback(group, now, failed)

    def _fallback(self, group: Group[T], now: float, failed: T | None) -> T | None:
        for name in group.fallbacks:
            target = self._groups[name].pick(now, failed) if name in self._groups else None
            if target is not None:
                return target
        return None
