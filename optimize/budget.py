"""A budget of rollouts that cannot be overshot: reserve first, run afterwards, give back what was not run."""

from threading import Lock

from collector.errors import BadInput


class Budget:
    """Counts rollouts. Safe to share between threads and between tasks of an event loop: no call blocks or awaits.

    At every moment `spent + left == rollouts` and `0 <= spent <= rollouts`; a reservation counts as spent.
    """

    def __init__(self, rollouts: int) -> None:
        if rollouts < 0:
            raise BadInput(f"a budget is a number of rollouts, 0 or more, not {rollouts}", param="budget")
        self.rollouts = rollouts
        self._spent = 0
        self._lock = Lock()

    def reserve(self, n: int) -> int:
        """Takes up to `n` rollouts and says how many were granted: never more than are left, 0 when none are."""
        if n < 0:
            raise BadInput(f"cannot reserve {n} rollouts", param="n")
        with self._lock:
            granted = min(n, self.rollouts - self._spent)
            self._spent += granted
            return granted

    def refund(self, n: int) -> None:
        """Gives back `n` reserved rollouts that were not paid after all (found in the cache, never started)."""
        with self._lock:
            if not 0 <= n <= self._spent:
                raise BadInput(f"cannot refund {n} of {self._spent} reserved rollouts", param="n")
            self._spent -= n

    @property
    def spent(self) -> int:
        """Rollouts reserved and not given back."""
        with self._lock:
            return self._spent

    @property
    def left(self) -> int:
        """Rollouts that can still be reserved."""
        with self._lock:
            return self.rollouts - self._spent
