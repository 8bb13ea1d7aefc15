"""Groups of texts that were rendered from the same template, found without comparing all with all.

Texts that share most of their frequent word runs join a group at once; groups are then merged, best first, while that
shortens the description of all texts (minimum description length: the literals once, the values for each text).
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import combinations

from collector.align import Skeleton, tokens

_SHINGLE = 3  # words
_SKETCH = 256  # shingles kept of a text, those with the smallest hashes
_JOIN = 0.7  # share of a group's shingles that a text must have to join without a closer look, and the other way round
_FOLDED = 24  # members by which a group's skeleton is made
_GROUPS = 40  # that are considered for merging
_TOKENS = 250_000  # that are aligned at most
_NEIGHBOURS = 12  # groups with the same shingle that are compared
_ACCIDENT = 10  # weight below which a literal between two gaps of two texts may be chance
_GAP = 6  # characters that a variable costs
_SETTLED = 20  # calls with the same text, from which on it is taken for a prompt of its own,
_ALIKE = 0.8  # unless it shares this much with another one
_MUCH = 0.6
LEAST_LITERAL = 12  # letters and digits in all literals


@dataclass
class Group:
    """Texts by their index, and what they share."""

    members: list[int]
    skeleton: Skeleton
    settled: bool
    shingles: set[bytes] = field(default_factory=set)


def group(texts: Sequence[str], calls: Sequence[int]) -> list[Group]:
    """Groups of distinct `texts`, each text in one; `calls[i]` is how often the i-th was sent."""
    words = [tokens(text) for text in texts]
    sketches = _shared([_sketch(one) for one in words])
    order = sorted(range(len(texts)), key=lambda index: (-calls[index], index))
    groups = _joined(words, sketches, order, calls)
    groups.sort(key=lambda one: -len(one.members))
    return _Merging(groups[:_GROUPS]).run() + groups[_GROUPS:]


def weight(text: str) -> int:
    """How much a literal says: letters, digits and marks count, line ends twice, other white space not at all."""
    return sum(1 if mark.isalnum() else 2 if mark == "\n" else not mark.isspace() for mark in text)


def _sketch(words: Sequence[str]) -> set[bytes]:
    """The smallest hashes of the runs of words: texts with equal parts keep equal ones."""
    spoken = [word for word in words if not word.isspace()]
    runs = {"\0".join(spoken[at : at + _SHINGLE]) for at in range(max(1, len(spoken) - _SHINGLE + 1))}
    return set(sorted(blake2b(run.encode("utf-8", "replace"), digest_size=8).digest() for run in runs)[:_SKETCH])


def _shared(sketches: list[set[bytes]]) -> list[set[bytes]]:
    """Without what stands in one text only."""
    seen = Counter(shingle for sketch in sketches for shingle in sketch)
    return [{shingle for shingle in sketch if seen[shingle] > 1} for sketch in sketches]


def _joined(
    words: list[list[str]], sketches: list[set[bytes]], order: Sequence[int], calls: Sequence[int]
) -> list[Group]:
    groups: list[Group] = []
    holders: dict[bytes, list[int]] = defaultdict(list)  # shingle -> groups that have it
    for index in order:
        votes = Counter(number for shingle in sketches[index] for number in holders[shingle])
        best, shared = max(votes.items(), key=lambda vote: (vote[1], -vote[0]), default=(-1, 0))
        known = max(len(groups[best].shingles), len(sketches[index])) if best >= 0 else 0
        if best >= 0 and shared >= _JOIN * known and not _settled(calls[index]):
            held = groups[best]
            held.members.append(index)
            if len(held.members) <= _FOLDED:
                held.skeleton = held.skeleton.meet(Skeleton.of(words[index]))
            continue
        for shingle in sketches[index]:
            holders[shingle].append(len(groups))
        groups.append(Group([index], Skeleton.of(words[index]), _settled(calls[index]), sketches[index]))
    return groups


def _settled(calls: int) -> bool:
    return calls >= _SETTLED


class _Merging:
    """Merges the best pair again and again, as long as one is worth it and there is work left to spend."""

    def __init__(self, groups: list[Group]) -> None:
        self._alive = dict(enumerate(groups))
        self._met: dict[tuple[int, int], tuple[float, Skeleton]] = {}
        self._left = _TOKENS
        for pair in _alike(groups):
            self._weigh(pair)

    def run(self) -> list[Group]:
        """The groups that are left."""
        fresh = len(self._alive)
        while self._met:
            pair = max(self._met, key=lambda one: (self._met[one][0], -one[0], -one[1]))
            gain, skeleton = self._met[pair]
            if gain <= 0:
                break
            one, other = (self._alive.pop(number) for number in pair)
            touched = {key for key in self._met if set(key) & set(pair)}
            for key in touched:
                del self._met[key]
            self._alive[fresh] = Group(one.members + other.members, skeleton, False)
            for number in sorted({number for key in touched for number in key} - set(pair)):
                self._weigh((number, fresh))
            fresh += 1
        return list(self._alive.values())

    def _weigh(self, pair: tuple[int, int]) -> None:
        """Notes what merging a pair would gain, in characters of description."""
        one, other = self._alive[pair[0]], self._alive[pair[1]]
        self._left -= len(one.skeleton.tokens) + len(other.skeleton.tokens)
        if self._left < 0:
            return
        met = one.skeleton.meet(other.skeleton)
        (a, _), (b, _), (both, gaps) = _solid(one), _solid(other), _solid(Group([], met, False))
        if both < LEAST_LITERAL or (one.settled and other.settled and both < _ALIKE * max(a, b)):
            return
        # What differs between groups that are much alike is a value that comes again and again: it is told once.
        once = both >= _MUCH * max(a, b)
        lost = (a - both) * (1 if once else len(one.members)) + (b - both) * (1 if once else len(other.members))
        gain = a + b - both - lost - _GAP * gaps
        self._met[pair] = gain, met


def _solid(one: Group) -> tuple[int, int]:
    """Characters of the literals that are no accident, and the number of gaps between them."""
    first, *rest = one.skeleton.literals()
    inner, last = rest[:-1], rest[-1:]
    kept = [text for text in inner if weight(text) >= _ACCIDENT]
    return sum(map(len, (first, *kept, *last))), len(kept) + len(last)


def _alike(groups: list[Group]) -> Iterator[tuple[int, int]]:
    """Pairs that share shingles, those that share most first."""
    holders: dict[bytes, list[int]] = defaultdict(list)
    for number, one in enumerate(groups):
        for shingle in one.shingles:
            holders[shingle].append(number)
    shared = Counter(pair for held in holders.values() for pair in combinations(held[:_NEIGHBOURS], 2))
    return (pair for pair, _ in sorted(shared.items(), key=lambda item: (-item[1], item[0])))
