"""The interleaved rounds: every scenario on every target, one after the other, all of them kept running."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import uvloop

from bench.gateway.load import Seen, drive
from bench.gateway.payloads import Scenario
from bench.gateway.process import Target

SETTLED = 40.0  # seconds that a recording target gets until what it recorded is loaded
_PAUSE = 0.25
_QUIET = 0.03  # of a core: less than this is idling

Say = Callable[[str], None]


@dataclass
class Samples:
    """What the rounds gave: `values[scenario][target][measure][round]`, and why some gave nothing."""

    values: dict[str, dict[str, dict[str, dict[int, float]]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    loads: list[float] = field(default_factory=list)

    def of(self, scenario: str, target: str, measure: str) -> dict[int, float]:
        """The values of a measure by round; empty where it was not measured."""
        return self.values.get(scenario, {}).get(target, {}).get(measure, {})

    def listed(self) -> dict[str, dict[str, dict[str, list[float]]]]:
        """Everything, each measure as the list of its rounds' values, to four digits."""
        return {
            scenario: {
                target: {name: [float(f"{value:.4g}") for value in found.values()] for name, found in row.items()}
                for target, row in rows.items()
            }
            for scenario, rows in self.values.items()
        }

    def add(self, scenario: str, target: str, at: int, measures: dict[str, float]) -> None:
        """One round's figures."""
        row = self.values.setdefault(scenario, {}).setdefault(target, {})
        for name, value in measures.items():
            row.setdefault(name, {})[at] = value


def turns(targets: Sequence[Target], at: int) -> list[Target]:
    """The targets in the order of a round: each begins in its turn, so that none always follows the same one."""
    start = at % len(targets) if targets else 0
    return [*targets[start:], *targets[:start]]


def measure(samples: Samples, targets: Sequence[Target], scenario: Scenario, at: int, scale: float) -> None:
    """One scenario of one round, on all targets."""
    for target in turns(targets, at):
        if f"{target.name} {scenario.name}" in samples.failures:
            continue
        try:
            seen, cpu = loaded(target, scenario, scale)
        except (TimeoutError, ConnectionError) as error:
            samples.failures[f"{target.name} {scenario.name}"] = str(error) or "calls stayed unanswered"
            continue
        samples.loads.append(os.getloadavg()[0])
        if seen.failed or not seen.walls:
            samples.failures[f"{target.name} {scenario.name}"] = seen.error or "no call was answered"
            continue
        costs = {name: used / seen.sent / 1e3 for name, used in cpu.items()}
        samples.add(scenario.name, target.name, at, {**seen.measures, **costs})


def loaded(target: Target, scenario: Scenario, scale: float = 1.0) -> tuple[Seen, dict[str, int]]:
    """Load a target and let it settle: what was seen, and the nanoseconds of CPU that its whole tree took for it
    (`cpu_us`), and its parts (`cpu_worker_us` ...), until its records were where they belong."""
    before = _used(target, target.meter.read())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        seen = runner.run(drive(target.address, scenario, scale))
    target.sent += seen.sent
    after = settle(target)
    return seen, {name: used - before.get(name, 0) for name, used in after.items()}


def _used(target: Target, total: int) -> dict[str, int]:
    """The counters as they were last read; none for the upstream called directly."""
    if target.process is None:
        return {}
    return {"cpu_us": total, **{f"cpu_{name}_us": target.meter.share(mark) for name, mark in target.parts.items()}}


def settle(target: Target) -> dict[str, int]:
    """The CPU counters once the target idles and its lag is drained; the asking itself comes after the reading.

    Raises TimeoutError when it does not settle.
    """
    if target.process is None:
        return {}
    deadline = time.monotonic() + SETTLED
    time.sleep(target.drain)
    target.flush()
    while time.monotonic() < deadline:
        used = _used(target, _idle(target, deadline))
        if target.loaded():
            return used
    raise TimeoutError(f"{target.name} has not loaded what it recorded within {SETTLED:g} s")


def _idle(target: Target, deadline: float) -> int:
    used = target.meter.read()
    while time.monotonic() < deadline:
        time.sleep(_PAUSE)
        before, used = used, target.meter.read()
        if used - before < _QUIET * _PAUSE * 1e9:
            break
    return used
