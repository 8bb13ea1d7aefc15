import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.gateway import cpu, figures, payloads, report, rounds
from bench.gateway.load import Address, drive
from bench.gateway.process import Target
from bench.gateway.run import taking_part
from bench.gateway.stage import Stage
from bench.gateway.stats import figure, quantile, ratio
from bench.result import Result
from tests.fake_upstream import FakeUpstream, completion, error_reply, json_reply

NUMBERS = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=50)


@given(NUMBERS, st.floats(0.01, 1))
def test_a_quantile_is_one_of_the_values_and_enough_of_them_lie_at_or_below_it(values, share):
    found = quantile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6
    assert sum(value < found for value in values) < share * len(values) + 1e-6


def test_a_quantile_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="nothing"):
        quantile([], 0.5)


def test_a_figure_is_the_median_with_what_the_rounds_lay_between():
    assert figure([3.0, 1.0, 8.0]) == (3.0, 1.0, 8.0)
    assert figure([]) is None


def test_a_ratio_compares_within_a_round_and_leaves_out_rounds_that_lack_a_side():
    ours, theirs = {0: 10.0, 1: 30.0, 2: 7.0}, {0: 10.0, 1: 10.0, 3: 1.0}
    assert ratio(ours, theirs) == (2.0, 1.0, 3.0)
    assert ratio(ours, {}) is None


def test_schedstat_is_read_as_nanoseconds_on_a_cpu():
    assert cpu.schedstat("123456789 42 7\n") == 123456789


def test_children_are_found_whatever_a_process_is_called():
    stats = ["10 (a) S 1 10 10", "11 (b (c) d) R 10 10 10", "12 () ) 3) S 11 10 10"]
    assert cpu.children(stats) == {1: [10], 10: [11], 11: [12]}


def test_the_meter_counts_a_child_and_keeps_what_an_ended_thread_used():
    code = "import time,sys\nend = time.process_time() + 0.05\nwhile time.process_time() < end: pass\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
        meter = cpu.Meter(child.pid)
        deadline = time.monotonic() + 20
        while meter.read() < 50_000_000 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert child.pid in cpu.tree(os.getpid())
        assert cpu.resident(child.pid) > 1_000_000
        used = meter.read()
        assert meter.share("-c") == used
        assert meter.share("no such argument") == 0
        child.communicate(b"")
    assert used >= 50_000_000
    assert meter.read() >= used
    assert cpu.resident(child.pid) == 0


def test_the_scenarios_are_what_they_say():
    by_name = {one.name: one for one in payloads.scenarios()}
    assert 5_500 < len(by_name["json_6kb"].body) < 7_000
    assert len(by_name["json_c16"].body) < 400
    assert 380 < len(payloads.reply()) < 480
    assert len(payloads.events(usage=False)) == 23
    assert payloads.IMPROVED.encode() not in b"".join(one.body for one in by_name.values())


def test_each_target_begins_a_round_in_its_turn():
    targets = [Target(name, Address(1)) for name in "abc"]
    firsts = [rounds.turns(targets, at)[0].name for at in range(4)]
    assert firsts == ["a", "b", "c", "a"]
    assert all(len(rounds.turns(targets, at)) == 3 for at in range(4))


def test_recording_off_takes_part_in_its_own_comparison_only():
    targets = [Target(name, Address(1)) for name in ("direct", "floor", "ours", "unrecorded")]
    small = payloads.scenarios()[0]
    assert [one.name for one in taking_part(targets, small)] == ["direct", "floor", "ours"]
    sustained = payloads.Scenario("sustained", "", 16, small.body, False, 1.0, 10)
    assert [one.name for one in taking_part(targets, sustained)] == ["ours", "unrecorded"]


def samples() -> rounds.Samples:
    made = rounds.Samples()
    for at, mood in enumerate((1.0, 3.0, 2.0)):
        made.add("sse_unpaced", "direct", at, {"ttft_ms": mood})
        made.add("sse_unpaced", "ours", at, {"ttft_ms": mood + 0.5 * mood, "cpu_us": 90 * mood})
        made.add("sse_unpaced", "litellm", at, {"ttft_ms": mood + 10 * mood, "cpu_us": 9000 * mood})
        made.add("sse_unpaced", "floor", at, {"cpu_us": 100 * mood})
    return made


def test_what_a_target_adds_is_over_the_upstream_called_directly_in_the_same_round():
    compared = figures.compared(samples())
    assert compared["ttft_added_vs_litellm"] == pytest.approx((0.05, 0.05, 0.05))
    assert compared["cpu_sse_unpaced_vs_floor"] == pytest.approx((0.9, 0.9, 0.9))
    assert figures.shown(samples(), "sse_unpaced", "ours", "added_ttft_ms") == (1.0, 0.5, 1.5)


def test_the_samples_are_kept_as_lists_that_json_can_hold():
    listed = samples().listed()["sse_unpaced"]
    assert listed["ours"] == {"ttft_ms": [1.5, 4.5, 3.0], "cpu_us": [90.0, 270.0, 180.0]}
    assert orjson.loads(orjson.dumps(listed)) == listed


def test_what_was_not_measured_is_left_out_and_its_bound_not_met():
    compared = figures.compared(samples())
    assert "cpu_sse_vs_tensorzero" not in compared
    result = Result("gateway", figures.MUST, {name: one.median for name, one in compared.items()})
    assert result.met()["cpu_sse_vs_tensorzero"] is False
    assert result.met()["cpu_sse_unpaced_vs_floor"] is True


def test_the_picture_is_an_svg(tmp_path: Path):
    made = samples()
    made.add("json_c16", "ours", 0, {"cpu_us": 100.0})
    report.picture(made, tmp_path / "gateway.svg")
    assert "<svg" in (tmp_path / "gateway.svg").read_text()


@pytest.mark.parametrize(("load", "busy"), [(1.0, False), (1_000.0, True)])
def test_a_busy_machine_is_said_in_the_table(load, busy):
    notes = {
        "rounds": 3,
        "spread": {},
        "integrity": {},
        "failed": {"portkey sse_paced": "status 500"},
        "load_average": {"low": load, "median": load, "high": load},
    }
    stage = Stage.__new__(Stage)
    stage.absent, stage.boots = {"litellm": "No matching distribution"}, {"ours": [1.0, 3.0, 2.0]}
    result = Result("gateway", figures.MUST, {"boot_seconds": 2.0}, notes)
    text = report.markdown(result, samples(), stage, {"ours": 200_000_000})
    assert ("busy with other work" in text) is busy
    assert "absent: No matching distribution" in text
    assert "portkey sse_paced: failed, not counted: status 500" in text
    assert "| boot_seconds | 2 |  | <= 2 | yes |" in text
    assert "| rps_vs_litellm | not measured |  | >= 30 | no |" in text


def load(upstream: FakeUpstream, calls: int, seconds: float = 5.0):
    scenario = payloads.Scenario("small", "", 4, payloads.scenarios()[0].body, False, seconds, calls)
    return asyncio.run(drive(Address(upstream.port, model="their::model"), scenario))


def test_the_load_sends_as_many_calls_as_it_says_and_names_the_model_as_the_target_wants():
    with FakeUpstream() as upstream:
        seen = load(upstream, 40)
        assert (seen.sent, seen.failed, len(seen.walls)) == (48, 0, 40)
        assert len(upstream.requests) == 48
        assert upstream.connections == 4
        assert {one.json["model"] for one in upstream.requests} == {"their::model"}
    assert seen.measures["p50_ms"] <= seen.measures["p99_ms"]


def test_calls_that_are_refused_are_counted_as_failed_and_the_target_is_left_alone():
    with FakeUpstream(error_reply(500)) as upstream:
        seen = load(upstream, 1_000)
        assert seen.failed == seen.sent < 40
        assert seen.error is not None and "500" in seen.error
        assert seen.measures == {}


def test_a_connection_closed_under_a_call_is_a_failure_and_the_next_one_is_opened():
    with FakeUpstream() as upstream:
        upstream.reply(json_reply(completion(), end="close"))
        seen = load(upstream, 40)
        assert seen.failed == 1
        assert len(seen.walls) + seen.failed + 8 == seen.sent
        assert upstream.connections == 5
