"""Which of a call's messages is the prompt of which slot."""

from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

from collector import template
from proxy.dialects.base import Prompt
from proxy.versions import Known, Snapshot


class Match(NamedTuple):
    """A message that is a slot's prompt: the version it was rendered from, and the values of its variables."""

    prompt: Prompt
    known: Known
    values: dict[str, str]


def find(
    snapshot: Snapshot,
    prompts: Iterable[Prompt],
    model: str | None,
    *,
    only: Container[str] | None = None,
    prefer: Container[str] = (),
) -> list[Match]:
    """All matches, at most one a message and one a slot; literal equality goes before templates.

    `only`: the slots that are possible; None: any. `prefer`: slots that win where several have the same text.
    """
    if not snapshot.exact:
        return []
    matches: list[Match] = []
    taken: set[str] = set()
    left = list(prompts)
    for look in (_exact, _inverted) if snapshot.templates else (_exact,):
        open_prompts, left = left, []
        for prompt in open_prompts:
            candidates = look(snapshot, prompt)
            for match in sorted(candidates, key=lambda one: one.known.slot not in prefer) if prefer else candidates:
                slot = snapshot.slots[match.known.slot]
                fits = (slot.model is None or slot.model == model) and (slot.role is None or slot.role == prompt.role)
                if fits and slot.name not in taken and (only is None or slot.name in only):
                    matches.append(match)
                    taken.add(slot.name)
                    break
            else:
                left.append(prompt)
    return matches


def named(snapshot: Snapshot, slot: str, prompts: Iterable[Prompt]) -> Match | None:
    """The prompt of a slot that the caller named, though its text is no known version's: the first message in the
    slot's role (by default system or developer), whole. Its variables are unknown. None for an unknown slot."""
    known = snapshot.slots.get(slot)
    if known is None:
        return None
    roles = (known.role,) if known.role else ("system", "developer")
    for prompt in prompts:
        if prompt.role in roles:
            return Match(prompt, Known(slot, 0, prompt.text, (), prompt.text, prompt.text), {})
    return None


def _exact(snapshot: Snapshot, prompt: Prompt) -> Iterator[Match]:
    for known in snapshot.exact.get(prompt.text, ()):
        # A template sent unrendered: its variables stand for themselves.
        yield Match(prompt, known, {})


def _inverted(snapshot: Snapshot, prompt: Prompt) -> Iterator[Match]:
    for known in snapshot.templates:
        if prompt.text.startswith(known.first) and prompt.text.endswith(known.last):
            values = template.invert(known.template, prompt.text)
            if values is not None:
                yield Match(prompt, known, values)


def render(match: Match, text: str) -> str | None:
    """`text` (another version's template) with the values of the match; None if it needs a variable that is missing."""
    if "{" not in text:  # the common case: no variables
        return text
    if not set(template.variables(text)) <= set(match.known.variables):
        return None
    return template.render(text, match.values)
