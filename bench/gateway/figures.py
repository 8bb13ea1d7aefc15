"""From the rounds' samples to the figures with bounds. Pure."""

from bench.gateway.rounds import Samples
from bench.gateway.stats import Figure, figure, ratio

# measure -> (sign, bound)
MUST = {
    "cpu_json_small_vs_floor": ("<=", 1.0),
    "cpu_json_6kb_vs_floor": ("<=", 1.4),
    "cpu_sse_unpaced_vs_floor": ("<=", 1.3),
    "cpu_sse_paced_vs_floor": ("<=", 1.3),
    "cpu_json_vs_tensorzero": ("<=", 1.0),
    "cpu_sse_vs_tensorzero": ("<=", 0.7),
    "rps_vs_litellm": (">=", 30.0),
    "ttft_added_vs_litellm": ("<=", 1 / 20),
    "recording_on_off_rps": (">=", 0.85),
    "rss_50k_vs_5k": ("<=", 1.05),
    "boot_seconds": ("<=", 2.0),
}
# measure -> (scenario, figure, against whom)
_RATIOS = {
    "cpu_json_small_vs_floor": ("json_c16", "cpu_us", "floor"),
    "cpu_json_6kb_vs_floor": ("json_6kb", "cpu_us", "floor"),
    "cpu_sse_unpaced_vs_floor": ("sse_unpaced", "cpu_us", "floor"),
    "cpu_sse_paced_vs_floor": ("sse_paced", "cpu_us", "floor"),
    "cpu_json_c1_vs_floor": ("json_c1", "cpu_us", "floor"),
    "cpu_json_vs_tensorzero": ("json_c16", "cpu_us", "tensorzero"),
    "cpu_json_6kb_vs_tensorzero": ("json_6kb", "cpu_us", "tensorzero"),
    "cpu_sse_vs_tensorzero": ("sse_unpaced", "cpu_us", "tensorzero"),
    "cpu_sse_paced_vs_tensorzero": ("sse_paced", "cpu_us", "tensorzero"),
    "cpu_json_vs_portkey": ("json_c16", "cpu_us", "portkey"),
    "cpu_sse_vs_portkey": ("sse_unpaced", "cpu_us", "portkey"),
    "cpu_json_vs_litellm": ("json_c16", "cpu_us", "litellm"),
    "cpu_sse_vs_litellm": ("sse_unpaced", "cpu_us", "litellm"),
    "rps_vs_floor": ("json_c16", "rps", "floor"),
    "rps_vs_litellm": ("json_c16", "rps", "litellm"),
    "recording_on_off_rps": ("sustained", "rps", "unrecorded"),
    "recording_on_off_cpu": ("sustained", "cpu_us", "unrecorded"),
}
OURS = "ours"
DIRECT = "direct"


def compared(samples: Samples) -> dict[str, Figure]:
    """Every ratio that both sides were measured for."""
    found = {
        name: ratio(samples.of(scenario, OURS, measure), samples.of(scenario, against, measure))
        for name, (scenario, measure, against) in _RATIOS.items()
    }
    found["ttft_added_vs_litellm"] = ratio(
        added(samples, "sse_unpaced", OURS, "ttft_ms"), added(samples, "sse_unpaced", "litellm", "ttft_ms")
    )
    return {name: value for name, value in found.items() if value is not None}


def added(samples: Samples, scenario: str, target: str, measure: str) -> dict[int, float]:
    """What a target adds to the upstream called directly, by round."""
    direct = samples.of(scenario, DIRECT, measure)
    return {at: value - direct[at] for at, value in samples.of(scenario, target, measure).items() if at in direct}


def shown(samples: Samples, scenario: str, target: str, measure: str) -> Figure | None:
    """The figure of one cell; of `added_...` what the target adds."""
    if measure.startswith("added_"):
        return figure([*added(samples, scenario, target, measure.removeprefix("added_")).values()])
    return figure([*samples.of(scenario, target, measure).values()])
