"""A budget that cannot be overshot: reserve first, run afterwards, settle what it cost, give back what was not run.

Rollouts are counted exactly. What a rollout will cost in tokens, money and seconds is not known before it ran, so the
price reserved for each is the dearest seen so far and a quarter more; before any was seen, one rollout is granted.
"""

import math
import time
from collections.abc import Callable
from threading import Lock

from collector.errors import BadInput

MARGIN = 1.25


class Budget:
    """Rollouts, and where given tokens, US dollars and seconds. Safe to share between threads and between tasks of an
    event loop: no call blocks or awaits.

    At every moment `0 <= spent <= rollouts`; a reservation counts as spent. With rollouts alone, `spent + left ==
    rollouts`. `keep` rollouts' worth of tokens, money and seconds are never granted: they are for the held-out test.
    `at_once`: rollouts that run side by side, for the seconds.
    """

    def __init__(
        self,
        rollouts: int,
        *,
        tokens: int | None = None,
        usd: float | None = None,
        seconds: float | None = None,
        keep: int = 0,
        at_once: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if rollouts < 0:
            raise BadInput(f"a budget is a number of rollouts, 0 or more, not {rollouts}", param="budget")
        for name, limit in (("tokens", tokens), ("usd", usd), ("seconds", seconds)):
            if limit is not None and not (limit > 0 and math.isfinite(limit)):
                raise BadInput(f"--budget-{name} must be more than 0, not {limit}", param=f"budget_{name}")
        self.rollouts = rollouts
        self.keep = keep
        self._spent = 0
        self._limit: dict[str, float | None] = {"tokens": tokens, "usd": usd, "seconds": seconds}
        self._used = {"tokens": 0.0, "usd": 0.0}
        self._price = {"tokens": 0.0, "usd": 0.0, "seconds": 0.0}
        self._call_price = {"tokens": 0.0, "usd": 0.0}
        self._at_once = at_once
        self._clock = clock
        self._began = clock()
        self._lock = Lock()

    @property
    def limited(self) -> tuple[str, ...]:
        """Which of tokens, usd and seconds are limited."""
        return tuple(name for name, limit in self._limit.items() if limit is not None)

    def reserve(self, n: int) -> int:
        """Takes up to `n` rollouts and says how many were granted: never more than are left, 0 when none are."""
        if n < 0:
            raise BadInput(f"cannot reserve {n} rollouts", param="n")
        with self._lock:
            granted = min(n, self._left())
            self._spent += granted
            return granted

    def refund(self, n: int) -> None:
        """Gives back `n` reserved rollouts that were not paid after all (found in the cache, never started)."""
        with self._lock:
            if not 0 <= n <= self._spent:
                raise BadInput(f"cannot refund {n} of {self._spent} reserved rollouts", param="n")
            self._spent -= n

    def settle(self, tokens: int | None = None, usd: float | None = None, seconds: float = 0.0) -> None:
        """What one reserved rollout cost; None is not known, and nothing is learned from it."""
        with self._lock:
            for name, cost in (("tokens", tokens), ("usd", usd)):
                if cost is not None:
                    self._used[name] += cost
                    self._price[name] = max(self._price[name], cost)
            self._price["seconds"] = max(self._price["seconds"], seconds)

    def settle_call(self, tokens: int | None = None, usd: float | None = None) -> None:
        """What one call of the optimizer's own model cost."""
        with self._lock:
            for name, cost in (("tokens", tokens), ("usd", usd)):
                if cost is not None:
                    self._used[name] += cost
                    self._call_price[name] = max(self._call_price[name], cost)

    def affords_call(self) -> bool:
        """Whether a call of the optimizer's model, as dear as the dearest so far, leaves enough for what is kept."""
        with self._lock:
            calls = {name: MARGIN * price for name, price in self._call_price.items()}
            return all(self._room(name) > calls.get(name, 0.0) for name in self.limited)

    def affordable(self, n: int) -> int:
        """How many of `n` rollouts tokens, money and seconds allow, the kept ones included and rollouts not counted."""
        with self._lock:
            return min(n, self._by_price(0))

    @property
    def spent(self) -> int:
        """Rollouts reserved and not given back."""
        with self._lock:
            return self._spent

    @property
    def left(self) -> int:
        """Rollouts that can still be reserved."""
        with self._lock:
            return self._left()

    @property
    def used(self) -> dict[str, float]:
        """{"tokens", "usd", "seconds"} so far, of rollouts and the optimizer's own calls."""
        with self._lock:
            return {**self._used, "seconds": self._clock() - self._began}

    def start_from(self, seconds: float) -> None:
        """Count `seconds` that an earlier run of the same job took."""
        with self._lock:
            self._began -= seconds

    def part(self, rollouts: int) -> "Budget":
        """A budget of up to `rollouts` out of this one: what it spends, this one spends."""
        return _Part(self, rollouts)

    def _left(self) -> int:
        return min(self.rollouts - self._spent, self._by_price(self.keep))

    def _by_price(self, keep: int) -> int:
        counts = [self._count(name, keep) for name in self.limited]
        return max(0, min(counts)) if counts else self.rollouts

    def _count(self, name: str, keep: int) -> int:
        """Rollouts that one limit allows beyond `keep`."""
        room, price = self._room(name, keep=0), MARGIN * self._price[name]
        if price <= 0:
            return 1 if room > 0 else 0
        count = math.floor(room / price)
        return (count * self._at_once if name == "seconds" else count) - keep

    def _room(self, name: str, keep: int | None = None) -> float:
        """What is left of one limit; less what `keep` rollouts (default: the kept ones) would cost."""
        limit = self._limit[name] or 0.0
        used = self._clock() - self._began if name == "seconds" else self._used[name]
        kept = (self.keep if keep is None else keep) * MARGIN * self._price[name]
        return limit - used - (kept / self._at_once if name == "seconds" else kept)


class _Part(Budget):
    """Rollouts are bounded by both; tokens, money and seconds are the whole's alone."""

    def __init__(self, whole: Budget, rollouts: int) -> None:
        super().__init__(rollouts)
        self._whole = whole

    @property
    def limited(self) -> tuple[str, ...]:
        """See Budget."""
        return self._whole.limited

    def _by_price(self, keep: int) -> int:
        """The whole knows prices; this is only a count."""
        return self.rollouts

    @property
    def left(self) -> int:
        """See Budget."""
        return min(super().left, self._whole.left)

    @property
    def used(self) -> dict[str, float]:
        """See Budget: of the whole."""
        return self._whole.used

    def reserve(self, n: int) -> int:
        """See Budget."""
        mine = super().reserve(n)
        granted = self._whole.reserve(mine)
        super().refund(mine - granted)
        return granted

    def refund(self, n: int) -> None:
        """See Budget."""
        super().refund(n)
        self._whole.refund(n)

    def settle(self, tokens: int | None = None, usd: float | None = None, seconds: float = 0.0) -> None:
        """See Budget."""
        self._whole.settle(tokens, usd, seconds)

    def settle_call(self, tokens: int | None = None, usd: float | None = None) -> None:
        """See Budget."""
        self._whole.settle_call(tokens, usd)

    def affords_call(self) -> bool:
        """See Budget."""
        return self._whole.affords_call()

    def affordable(self, n: int) -> int:
        """See Budget."""
        return self._whole.affordable(n)
