"""Which CPU does what: the gateway's tree has one for itself, upstream and load generator share another."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Cores:
    """`target` for the gateway under test, `load` for upstream and load generator, `every` for starting up, `pair` for
    two workers: empty where two CPUs would not leave upstream and load generator one each."""

    load: set[int]
    target: set[int]
    every: set[int]
    pair: set[int]


def cores() -> Cores:
    """The CPUs of this process divided. Raises SystemExit where there is only one."""
    every = sorted(os.sched_getaffinity(0))
    if len(every) < 2:
        raise SystemExit("bench-gateway needs two CPUs: one for the gateway, one for upstream and load generator")
    load = {every[0], *every[3:4]}
    return Cores(load, {every[1]}, set(every), set(every[1:3]) if len(every) >= 4 else set())
