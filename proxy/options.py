"""What a server does beyond relaying, as its configuration says: limits, joining, cache, capture, time in all."""

from dataclasses import dataclass, field

from collector.settings import Settings
from proxy import metrics
from proxy.cache import Cache
from proxy.joining import Joining
from proxy.rates import Meter
from proxy.record import Call


@dataclass(frozen=True)
class Options:
    """One worker's. `trained`: slots whose calls are recorded with token ids; `total`: seconds for a whole call."""

    cache: Cache | None = None
    meter: Meter | None = None
    trained: frozenset[str] = frozenset()
    total: float | None = None
    joining: Joining = field(default_factory=Joining)

    @classmethod
    def of(cls, settings: Settings, meter: Meter | None) -> "Options":
        """As configured."""
        kept = settings.cache
        return cls(
            Cache(kept.seconds, int(kept.max_mb * (1 << 20))) if kept.seconds else None,
            meter,
            frozenset(name for name, slot in settings.slots.items() if slot.train),
            settings.upstream.total_timeout,
        )

    def admit(self, call: Call) -> None:
        """Counts a call of a key with limits. Raises Limited."""
        if call.limits is None or self.meter is None:
            return
        try:
            self.meter.enter(call.tenant, call.limits)
        except Exception:
            metrics.LIMITED.inc()
            raise
        call.metered = True

    def settle(self, call: Call) -> None:
        """Counts what an admitted call used, once it is over. An answer from the cache used nothing."""
        if call.metered and self.meter is not None:
            summary = call.summary
            tokens = 0 if call.cached else (summary.input_tokens or 0) + (summary.output_tokens or 0)
            self.meter.leave(call.tenant, tokens, call.cost_usd or 0.0)
