"""A prompt as a set of parts: cut a template into removable sentences, put any subset together again.

The seed is cut in sentences and lines. Those that carry a variable, a heading, a code block or a safety rule stay for
good; the others are parts like any proposed one, so a search can drop them. All sentences kept and nothing added
renders to the seed, byte for byte.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from collector.template import VARIABLE, variables

Kind = Literal["instruction", "format", "demonstration", "sentence", "rewrite"]
_FENCE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_BREAK = re.compile(r"(?<=[.!?])[ \t]+(?=[\"'(\[A-Z0-9])|\n+")
_SAFETY = re.compile(
    r"\b(safety|unsafe|harmful|illegal|confidential|privacy|secrets?|passwords?|personal (?:data|information)"
    r"|compliance|legally|refuse)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+", re.UNICODE)
_JOINT = re.compile(r"(?:, and|; and|;) (?=\w)")
_OPENS = re.compile(
    r"(?:always|never|make sure|ensure|remember to|do not|don't|before|after|if (?!not\b)|when|unless|use|write|give"
    r"|answer|reply|return|output|state|name|list|include|avoid|keep|put|check|round|convert|follow|explain|quote|cite"
    r"|(?:the|each|every|all) \w+(?: \w+){0,2} (?:must|should|needs? to|ha(?:s|ve) to))\b",
    re.IGNORECASE,
)
_CONDITION = re.compile(r"(?:if|when|whenever|unless|before|after|while|for|in case|where)\b", re.IGNORECASE)
_LEANS = re.compile(r"\b(?:it|its|them|their|this|that|these|those|so|do so|otherwise|both)\b", re.IGNORECASE)
_TAIL_CHARS = 40  # what may follow the last variable of a template that ends with the question it asks


@dataclass(frozen=True)
class Part:
    """One atomic unit of a prompt.

    `group`: parts with the same group exclude each other. `source`: seed | bank | traces | editor. `cites`: ids of the
    tasks whose failures the part answers. `tasks`: ids of the tasks whose data the part contains; it is never tried on
    them. `parent`: for a rewrite, the rewrite that it was made from; for a part that stands last, the same part where
    it comes to stand. `last`: it follows all other instructions.
    """

    id: str
    kind: Kind
    text: str
    group: str | None = None
    source: str = "editor"
    cites: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    parent: str | None = None
    last: bool = False

    @property
    def tokens(self) -> int:
        """Estimated length in tokens: a quarter of the characters, at least 1."""
        return max(1, math.ceil(len(self.text) / 4))


def make(kind: Kind, text: str, **more: object) -> Part:
    """A part whose id is derived from its kind and text, so that equal texts are equal parts in every run."""
    digest = hashlib.sha256(f"{kind}\n{text}".encode()).hexdigest()[:10]
    return Part(f"{kind[0]}-{digest}", kind, text, **more)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Piece:
    """A stretch of the seed with the white space after it; `part` is None where it stays for good."""

    text: str
    after: str
    part: str | None = None


@dataclass(frozen=True)
class Skeleton:
    """What is left of a seed when all its removable sentences are gone, and the places where they were."""

    seed: str
    pieces: tuple[Piece, ...]
    tail: int  # additions go before this piece; len(pieces) where they go to the end

    @property
    def pinned(self) -> tuple[str, ...]:
        """The texts that are in every prompt."""
        return tuple(piece.text for piece in self.pieces if piece.part is None and piece.text.strip())


def cut(seed: str, *, max_parts: int = 40) -> tuple[Skeleton, list[Part]]:
    """The skeleton of `seed` and its removable sentences, in order. At most `max_parts`; later sentences stay."""
    pieces: list[Piece] = []
    parts: list[Part] = []
    known: set[str] = set()
    for text, after in _units(seed):
        part = make("sentence", text, source="seed")
        if _pinned(text) or part.id in known or len(parts) >= max_parts:
            pieces.append(Piece(text, after))
            continue
        known.add(part.id)
        parts.append(part)
        pieces.append(Piece(text, after, part.id))
    return Skeleton(seed, tuple(pieces), _tail(pieces)), parts


def _units(seed: str) -> list[tuple[str, str]]:
    """Sentences and lines with the white space that follows each; code blocks are one unit."""
    units: list[tuple[str, str]] = []
    at = 0
    for fence in [*_FENCE.finditer(seed), None]:
        end = fence.start() if fence else len(seed)
        units += _sentences(seed[at:end])
        if fence:
            units.append((fence.group(0), ""))
            at = fence.end()
    return units


def _sentences(text: str) -> list[tuple[str, str]]:
    units = []
    at = 0
    for gap in _BREAK.finditer(text):
        units.append((text[at : gap.start()], gap.group(0)))
        at = gap.end()
    if at < len(text):
        units.append((text[at:], ""))
    return units


def _pinned(text: str) -> bool:
    bare = text.strip()
    return (
        not _WORD.search(bare)
        or bool(VARIABLE.search(bare))
        or bare.startswith(("#", "```", "<"))
        or bare.endswith(":")
        or bool(_SAFETY.search(bare))
    )


def _tail(pieces: Sequence[Piece]) -> int:
    """Where additions go. A template that ends with the question to answer keeps that question last."""
    with_variable = [index for index, piece in enumerate(pieces) if variables(piece.text)]
    if not with_variable or with_variable[-1] == 0:
        return len(pieces)
    last = with_variable[-1]
    text = "".join(piece.text + piece.after for piece in pieces[last:])
    rest = text[[found.end() for found in VARIABLE.finditer(text)][-1] :]
    return last if len(rest) <= _TAIL_CHARS else len(pieces)


def render(skeleton: Skeleton, parts: Iterable[Part]) -> str:
    """The template made of the skeleton and `parts`, in canonical order whatever the order given.

    Sentences at their old places, then instructions, then format lines (a line each where the seed has lines, else in
    the same paragraph), then demonstrations, each a block between blank lines. A rewrite among the parts takes the
    skeleton's place. Parts of equal kind keep the order given, except those marked `last`.
    """
    chosen = list(dict.fromkeys(parts))
    rewrites = [part for part in chosen if part.kind == "rewrite"]
    if rewrites:
        head, tail = rewrites[-1].text.strip(), ""
    else:
        head, tail = _head_and_tail(skeleton, {part.id for part in chosen})
    ordered = [part for kind in ("instruction", "format") for part in chosen if part.kind == kind]
    lines = [part.text for part in sorted(ordered, key=lambda part: part.last)]
    shots = [part.text for part in chosen if part.kind == "demonstration"]
    if not lines and not shots:
        return head + tail
    body = _joined([head.rstrip(), *lines], "\n" if "\n" in head.strip() or _listed(lines) else " ")
    gap = "\n\n" if shots else head[len(head.rstrip()) :] or " "
    return _joined(["\n\n".join(block for block in [body, *shots] if block), tail], gap)


def _head_and_tail(skeleton: Skeleton, chosen: set[str]) -> tuple[str, str]:
    kept = [(index, piece) for index, piece in enumerate(skeleton.pieces) if piece.part is None or piece.part in chosen]
    head = [piece.text + piece.after for index, piece in kept if index < skeleton.tail]
    tail = [piece.text + piece.after for index, piece in kept if index >= skeleton.tail]
    whole = len(kept) == len(skeleton.pieces)
    return "".join(head), "".join(tail) if whole else "".join(tail).rstrip()


def _joined(texts: Sequence[str], gap: str) -> str:
    return gap.join(text for text in texts if text.strip())


def _listed(lines: Sequence[str]) -> bool:
    return any(line.lstrip().startswith(("-", "*", "#")) or "\n" in line for line in lines)


def atomic(part: Part) -> list[Part]:
    """The part, or the instructions that its one sentence merges: "always do this, and never do that".

    Tied together, a useful rule and a harmful one are worth nothing. Only what stands alone is cut off: the second half
    opens as an instruction and leans on no word of the first, the first starts with no condition that may be meant for
    both. Examples, whole rewrites and members of a group stay whole; each piece keeps the citations.
    """
    if part.kind not in ("instruction", "format") or part.group is not None or _CONDITION.match(part.text):
        return [part]
    for joint in _JOINT.finditer(part.text):
        first, second = part.text[: joint.start()], part.text[joint.end() :]
        if min(len(words(first)), len(words(second))) >= 3 and _OPENS.match(second) and not _LEANS.search(second):
            halves = (first + ".", second[0].upper() + second[1:])
            return [piece for half in halves for piece in atomic(replace(part, id=make(part.kind, half).id, text=half))]
    return [part]


def words(text: str) -> tuple[str, ...]:
    """The lower-case words of a text."""
    return tuple(word.lower() for word in _WORD.findall(text))


def same_as(text: str, known: Sequence[Part], *, threshold: float = 0.5) -> Part | None:
    """The known part that says the same: equal words, or the highest IDF-weighted Jaccard >= `threshold`.

    Common words weigh little, so two rules that share only "always answer with the" stay apart.
    """
    mine = words(text)
    exact = next((part for part in known if words(part.text) == mine), None)
    if exact is not None or not mine:
        return exact
    weight = _idf([*known], extra=mine)
    best, score = None, threshold
    for part in known:
        theirs = set(words(part.text))
        union = sum(weight[word] for word in theirs | set(mine))
        shared = sum(weight[word] for word in theirs & set(mine))
        if union > 0 and shared / union >= score:
            best, score = part, shared / union
    return best


def made_of(text: str, known: Sequence[Part], *, share: float = 0.85) -> bool:
    """Whether known parts cover at least `share` of the IDF mass of `text`: a merged sentence, nothing new in it.

    Only parts with most of their own words inside `text` count.
    """
    mine = set(words(text))
    if not mine:
        return True
    weight = _idf([*known], extra=tuple(mine))
    covered: set[str] = set()
    for part in known:
        theirs = set(words(part.text))
        mass = sum(weight[word] for word in theirs)
        if mass > 0 and sum(weight[word] for word in theirs & mine) >= 0.8 * mass:
            covered |= theirs & mine
    return sum(weight[word] for word in covered) >= share * sum(weight[word] for word in mine)


def _idf(known: Sequence[Part], extra: tuple[str, ...]) -> dict[str, float]:
    counts = Counter(word for part in known for word in set(words(part.text)))
    counts.update(set(extra))
    total = len(known) + 1
    return {word: math.log(1 + total / count) for word, count in counts.items()}
