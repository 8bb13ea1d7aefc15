"""The comparison of gateways, in small: the floor and our server under a handful of calls."""

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from bench.gateway import figures, payloads, rounds
from bench.gateway.run import integrity
from bench.gateway.stage import Stage


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a CPU for the gateway and one for the load")
def test_every_call_of_the_bench_is_recorded_with_the_promoted_prompt_and_costs_cpu(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    samples = rounds.Samples()
    chosen = [one for one in payloads.scenarios() if one.name in ("json_c16", "sse_unpaced")]
    stage = Stage(tmp_path, lambda said: None)
    with stage.scripted() as direct, contextlib.ExitStack() as stack:
        targets = stage.up(stack, ["floor", "ours"])
        assert [one.name for one in targets] == ["floor", "ours"], stage.absent
        for scenario in chosen:
            rounds.measure(samples, [direct, *targets], replace(scenario, calls=40), 0, 1.0)
        found = integrity(targets[1])
    assert samples.failures == {}
    for scenario in chosen:
        for name in ("floor", "ours"):
            assert samples.of(scenario.name, name, "cpu_us")[0] > 10
    assert {"cpu_json_small_vs_floor", "cpu_sse_unpaced_vs_floor", "rps_vs_floor"} <= figures.compared(samples).keys()
    assert found["complete"], found
    assert found["injected"] >= sum(40 + 2 * one.concurrency for one in chosen)
    assert os.sched_getaffinity(0) == before
