"""Bounds on time for a machine that may have other work: as strict as the promise on a quiet one."""

import os


def within(seconds: float) -> float:
    """The seconds that a promise of `seconds` may take here: as many times as there are more processes that want to run
    than processors."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
