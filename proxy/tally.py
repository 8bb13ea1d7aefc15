"""Counters for the path of every call: plain numbers, read when `/metrics` is. (One of Prometheus's own takes a lock
and several calls for each increment.)"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry


class Tally(Collector):
    """A counter. Add to `value`; only the event loop's thread may."""

    def __init__(self, name: str, about: str, registry: CollectorRegistry) -> None:
        self.value = 0
        self._name = name
        self._about = about
        registry.register(self)

    def inc(self) -> None:
        """One more."""
        self.value += 1

    def collect(self) -> Iterable[Metric]:
        """For the registry."""
        yield CounterMetricFamily(self._name, self._about, value=self.value)


class Tallies(Collector):
    """A counter with labels. Add to `values[labels]`, which begins at 0."""

    def __init__(self, name: str, about: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        self.values: defaultdict[tuple[str, ...], int] = defaultdict(int)
        self._name = name
        self._about = about
        self._labels = labels
        registry.register(self)

    def inc(self, *labels: str, by: int = 1) -> None:
        """`by` more of these labels."""
        self.values[labels] += by

    def collect(self) -> Iterable[Metric]:
        """For the registry."""
        family = CounterMetricFamily(self._name, self._about, labels=self._labels)
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        yield family


class Durations(Collector):
    """A histogram of seconds with one label; `bounds` ascend."""

    def __init__(self, name: str, about: str, label: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        self._name = name
        self._about = about
        self._label = label
        self._bounds = bounds
        self._counts: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (len(bounds) + 1))
        self._sums: defaultdict[str, float] = defaultdict(float)
        registry.register(self)

    def observe(self, label: str, seconds: float) -> None:
        """One more that took so long."""
        self._counts[label][bisect_left(self._bounds, seconds)] += 1
        self._sums[label] += seconds

    def collect(self) -> Iterable[Metric]:
        """For the registry; buckets are cumulative there."""
        family = HistogramMetricFamily(self._name, self._about, labels=[self._label])
        for label, counts in self._counts.items():
            ends = [*map(str, self._bounds), "+Inf"]
            buckets = [(end, float(sum(counts[: at + 1]))) for at, end in enumerate(ends)]
            family.add_metric([label], buckets, self._sums[label])
        yield family
