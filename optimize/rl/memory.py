"""Keys and values of positions already computed: one row's, and those of recent prompts for others to start from."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

Tensor = Any
# Shared beginnings shorter than this are computed again: every prompt shares its first special token.
SHORTEST = 8


class Memory:
    """One row's keys and values, a pair of tensors (heads, capacity, size) per layer, grown by doubling."""

    def __init__(self, capacity: int = 64) -> None:
        self._capacity = capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def layers(self) -> int:
        """How many layers have written."""
        return len(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(int(tensor.nbytes) for pair in self._layers.values() for tensor in pair)

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (heads, n, size) at positions start..start+n-1; returns views of all positions up to there."""
        end = start + keys.shape[1]
        pair = self._layers.get(layer)
        if pair is None or pair[0].shape[1] < end:
            pair = self._grown(pair, keys, values, start, end)
            self._layers[layer] = pair
        pair[0][:, start:end] = keys
        pair[1][:, start:end] = values
        return pair[0][:, :end], pair[1][:, :end]

    def fork(self, length: int, capacity: int) -> "Memory":
        """A copy of the first `length` positions with room for `capacity`."""
        other = Memory(capacity)
        for layer, (keys, values) in self._layers.items():
            other.write(layer, 0, keys[:, :length], values[:, :length])
        return other

    def _grown(self, pair: tuple[Tensor, Tensor] | None, keys: Tensor, values: Tensor, start: int, end: int) -> Any:
        room = max(self._capacity, end if pair is None else 2 * pair[0].shape[1], end)
        fresh = tuple(like.new_empty((like.shape[0], room, like.shape[2])) for like in (keys, values))
        if pair is not None:
            for new, old in zip(fresh, pair, strict=True):
                new[:, :start] = old[:, :start]
        return fresh


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading token ids two prompts share."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count


class Prefixes:
    """The keys and values of recent prompts, by adapter; the least recently used go when `max_bytes` are exceeded.

    A position's keys and values depend on the ids up to it alone, so any shared beginning can be reused, not only whole
    prompts. Agents send the same instructions and demonstrations with every call.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._kept: OrderedDict[tuple[str | None, tuple[int, ...]], Memory] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, adapter: str | None, ids: Sequence[int]) -> tuple[tuple[str | None, tuple[int, ...]] | None, int]:
        """The kept prompt that shares most leading ids, and how many: never the last, whose logits are wanted."""
        best, length = None, SHORTEST - 1
        for key in self._kept:
            if key[0] == adapter and (count := shared(key[1], ids[:-1])) > length:
                best, length = key, count
        return best, length if best else 0

    def start(self, adapter: str | None, ids: Sequence[int], capacity: int) -> tuple[Memory, int]:
        """A memory for a new row, and how many positions it has already."""
        best, length = self.longest(adapter, ids)
        if best is None:
            return Memory(capacity), 0
        self._kept.move_to_end(best)
        return self._kept[best].fork(length, capacity), length

    def keep(self, adapter: str | None, ids: Sequence[int], memory: Memory) -> None:
        """Remember a prompt whose positions are all computed in `memory`."""
        key = (adapter, tuple(ids))
        if key in self._kept or self.max_bytes == 0:
            return
        kept = memory.fork(len(ids), len(ids))
        self._kept[key] = kept
        self.nbytes += kept.nbytes
        while self.nbytes > self.max_bytes and self._kept:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes

    def forget(self, adapter: str) -> None:
        """Drop what was computed with an adapter that is gone."""
        for key in [key for key in self._kept if key[0] == adapter]:
            self.nbytes -= self._kept.pop(key).nbytes
