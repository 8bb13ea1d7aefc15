"""Adapters swapped under load: how long until the new version answers, and what fails meanwhile. Part of
`python -m bench.rl`; alone: `python -m bench.swaps`.

The whole way, on a tiny model: three clients talk to the proxy without end, each episode two calls; a promotion has the
engine load the version, tries it out, routes new episodes to it, and unloads the one before after its last episode.
"""

import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console

from tests.faults.test_adapter_swap import swap_under_load, two_adapters

SWAPS = 100


def measure(count: int = SWAPS) -> dict[str, float]:
    """Seconds from promotion to the version's first answer, and how many calls failed or episodes mixed versions."""
    with tempfile.TemporaryDirectory() as home, two_adapters(Path(home)) as server:
        delays, load = swap_under_load(server, count)
    return {
        "swap to first new-version answer, seconds, median": statistics.median(delays),
        "swap to first new-version answer, seconds, 95th percentile": statistics.quantiles(delays, n=20)[-1],
        "swap to first new-version answer, seconds, most": max(delays),
        f"failed requests during {count} swaps": float(len(load.failed)),
        f"episodes of two versions during {count} swaps": float(sum(len(one) > 1 for one in load.seen.values())),
        f"episodes during {count} swaps": float(len(load.seen)),
    }


if __name__ == "__main__":
    Console().print(json.dumps(measure(), indent=2))
