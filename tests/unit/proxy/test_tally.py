"""Plain counters say what Prometheus's own would say."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from proxy.tally import Durations, Tallies, Tally

BOUNDS = (0.01, 0.1, 1.0)


def exposed(registry: CollectorRegistry) -> str:
    """The text without the times of creation, which are not counts."""
    return re.sub(r"(# HELP|# TYPE)? ?\w+_created.*\n", "", generate_latest(registry).decode())


@settings(deadline=None)
@given(st.integers(0, 50), st.lists(st.sampled_from(["chat", "other"])), st.lists(st.floats(0, 5)))
def test_the_exposition_is_that_of_prometheus_own_counters(ones: int, labels: list[str], seconds: list[float]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    one, many = Tally("a", "An a", ours), Tallies("b", "A b", ("kind",), ours)
    times = Durations("c", "A c", "kind", BOUNDS, ours)
    reference = Counter("a", "An a", registry=theirs)
    labelled = Counter("b", "A b", ("kind",), registry=theirs)
    histogram = Histogram("c", "A c", ("kind",), buckets=BOUNDS, registry=theirs)
    for _ in range(ones):
        one.inc()
        reference.inc()
    for label in labels:
        many.inc(label)
        labelled.labels(label).inc()
    for value in seconds:
        times.observe("chat", value)
        histogram.labels("chat").observe(value)
    assert exposed(ours) == exposed(theirs)


def test_a_sample_can_be_read_by_its_name() -> None:
    registry = CollectorRegistry()
    many = Tallies("b", "A b", ("kind", "fate"), registry)
    many.inc("x", "y", by=3)
    assert registry.get_sample_value("b_total", {"kind": "x", "fate": "y"}) == 3.0
