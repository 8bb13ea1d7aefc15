"""What several texts have in common, in order: literal runs with gaps between them.

Alignment by unique anchors (patience diff, after Bram Cohen): runs of tokens that occur once in either text are matched
in their longest common order, then what lies between them, with ever shorter runs. About linear in the tokens.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_TOKEN = re.compile(r"\w+|\s+|[^\w\s]")
_RUNS = (8, 4, 2, 1)  # lengths of anchors, in tokens
_DEPTH = 10  # how often what lies between anchors is looked at again

Run = tuple[int, int, int]  # start in one, start in the other, length
Range = tuple[int, int, int, int]  # start and end in one, start and end in the other


def tokens(text: str) -> list[str]:
    """Words, stretches of white space, single marks; joined they are the text."""
    return _TOKEN.findall(text)


@dataclass
class Skeleton:
    """Tokens that all texts so far share. `gaps[i]`: whether something else may stand before token i; one more at the
    end than there are tokens."""

    tokens: list[str]
    gaps: list[bool]

    @classmethod
    def of(cls, words: Sequence[str]) -> "Skeleton":
        """That of a single text: all of it, without gaps."""
        return cls(list(words), [False] * (len(words) + 1))

    @property
    def size(self) -> int:
        """Characters of the literals."""
        return sum(map(len, self.tokens))

    def meet(self, other: "Skeleton") -> "Skeleton":
        """What both have in common."""
        kept: list[str] = []
        gaps: list[bool] = []
        mine = theirs = 0  # the ends of the run before
        for a, b, length in common(self.tokens, other.tokens):
            for step in range(length):
                gaps.append(a + step > mine or b + step > theirs or self.gaps[a + step] or other.gaps[b + step])
                mine, theirs = a + step + 1, b + step + 1
            kept += self.tokens[a : a + length]
        tail = mine < len(self.tokens) or theirs < len(other.tokens)
        return Skeleton(kept, [*gaps, tail or self.gaps[-1] or other.gaps[-1]])

    def literals(self) -> list[str]:
        """The texts around the gaps, one more than there are gaps; the first or last is empty at a gap on the edge."""
        found = [""]
        for token, gap in zip(self.tokens, self.gaps[:-1], strict=True):
            if gap:
                found.append("")
            found[-1] += token
        return [*found, ""] if self.gaps[-1] else found


def common(one: Sequence[str], other: Sequence[str]) -> list[Run]:
    """Runs of equal tokens in ascending order, none overlapping."""
    runs: list[Run] = []
    work: list[tuple[Range, int]] = [((0, len(one), 0, len(other)), 0)]
    while work:
        (a, a_end, b, b_end), depth = work.pop()
        head = _same(one, other, a, b, min(a_end - a, b_end - b))
        if head:
            runs.append((a, b, head))
        a, b = a + head, b + head
        tail = _same_back(one, other, a_end, b_end, min(a_end - a, b_end - b))
        if tail:
            runs.append((a_end - tail, b_end - tail, tail))
        rest = (a, a_end - tail, b, b_end - tail)
        if depth < _DEPTH and rest[0] < rest[1] and rest[2] < rest[3]:
            work += [(part, depth + 1) for part in _between(one, other, rest)]
    return sorted(runs)


def _same(one: Sequence[str], other: Sequence[str], a: int, b: int, most: int) -> int:
    length = 0
    while length < most and one[a + length] == other[b + length]:
        length += 1
    return length


def _same_back(one: Sequence[str], other: Sequence[str], a: int, b: int, most: int) -> int:
    length = 0
    while length < most and one[a - 1 - length] == other[b - 1 - length]:
        length += 1
    return length


def _between(one: Sequence[str], other: Sequence[str], within: Range) -> list[Range]:
    """The parts of a range that anchors divide it into, each but the first beginning with its anchor; none without."""
    for length in _RUNS:
        anchors = _anchors(one, other, within, length)
        if anchors:
            a, a_end, b, b_end = within
            corners = [(a, b), *anchors, (a_end, b_end)]
            return [(left[0], right[0], left[1], right[1]) for left, right in pairwise(corners)]
    return []


def _anchors(one: Sequence[str], other: Sequence[str], within: Range, length: int) -> list[tuple[int, int]]:
    a, a_end, b, b_end = within
    mine, theirs = _once(one, a, a_end, length), _once(other, b, b_end, length)
    pairs = sorted((at, theirs[run]) for run, at in mine.items() if at >= 0 and theirs.get(run, -1) >= 0)
    return _rising(pairs)


def _once(words: Sequence[str], start: int, end: int, length: int) -> dict[tuple[str, ...], int]:
    """Each run of `length` tokens with its place; -1 where it stands more than once. White space alone is none."""
    found: dict[tuple[str, ...], int] = {}
    for at in range(start, end - length + 1):
        run = tuple(words[at : at + length])
        if length > 1 or not run[0].isspace():
            found[run] = -1 if run in found else at
    return found


def _rising(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest subsequence whose second places rise, too."""
    tops: list[int] = []  # the smallest end of a subsequence of each length
    ends: list[int] = []  # which pair that is
    before: list[int] = []
    for index, (_, place) in enumerate(pairs):
        at = bisect_left(tops, place)
        before.append(ends[at - 1] if at else -1)
        tops[at : at + 1] = [place]
        ends[at : at + 1] = [index]
    chain: list[tuple[int, int]] = []
    index = ends[-1] if ends else -1
    while index >= 0:
        chain.append(pairs[index])
        index = before[index]
    return chain[::-1]
