"""Checks that a rewritten template must pass before it costs a rollout. What fails is rejected, never repaired."""

import re
from collections.abc import Iterable

from collector.template import render, split, variables

GRAM = 8  # words: a shared run of this length is copying, not coincidence
_WORD = re.compile(r"\w+", re.UNICODE)


def guard(seed: str, candidate: str, train_texts: Iterable[str] = (), *, extra_chars: int = 6000) -> str | None:
    """None when `candidate` may replace `seed`, else the reason why not, in words for a report.

    Kept: every variable of the seed, and no new one, since nobody would fill it. Bounded: 1.5 times the seed's length
    plus `extra_chars`. Refused: an added code fence (a reply's wrapping, left over), text that changes when rendered in
    other than its variables, and runs of 8 words copied from `train_texts` that the seed does not have. Demonstrations
    are copies by design: give no `train_texts` for them.
    """
    if not candidate.strip():
        return "is empty"
    missing = [name for name in variables(seed) if name not in variables(candidate)]
    if missing:
        return f"loses the variable {{{missing[0]}}}"
    added = [name for name in variables(candidate) if name not in variables(seed)]
    if added:
        return f"adds the variable {{{added[0]}}}, which nobody fills"
    if len(candidate) > 1.5 * len(seed) + extra_chars:
        return f"is too long: {len(candidate)} characters, {int(1.5 * len(seed) + extra_chars)} allowed"
    if candidate.count("```") > seed.count("```"):
        return "has a code fence left over"
    if not _renders(candidate):
        return "does not render: a variable is left after replacement"
    copied = _copied(seed, candidate, train_texts)
    return f"copies training text: “{copied}”" if copied else None


def _renders(template: str) -> bool:
    """Whether rendering with sample values replaces each variable and leaves every literal as it is."""
    literals, names = split(template)
    samples = {name: f"<{index}>" for index, name in enumerate(dict.fromkeys(names))}
    wanted = literals[0] + "".join(samples[name] + text for name, text in zip(names, literals[1:], strict=True))
    rendered = render(template, samples)
    return rendered == wanted and not variables(rendered)


def _copied(seed: str, candidate: str, train_texts: Iterable[str]) -> str | None:
    allowed = set(_grams(seed))
    mine = {gram for gram in _grams(candidate) if gram not in allowed}
    if not mine:
        return None
    for text in train_texts:
        for gram in _grams(text):
            if gram in mine:
                return " ".join(gram)
    return None


def _grams(text: str) -> Iterable[tuple[str, ...]]:
    words = [word.lower() for word in _WORD.findall(text)]
    return (tuple(words[at : at + GRAM]) for at in range(len(words) - GRAM + 1))
