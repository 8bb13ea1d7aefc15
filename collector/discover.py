"""Prompt templates mined from the calls whose prompt nobody named: what `ratchet slots discover` proposes.

Pure: samples in, proposals out. A proposal is only made where inverting it gives back, byte for byte, every text that
it stands for, so that a slot made of it recognises the agent's next calls and changes none of them.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple

from collector import grouping, template
from collector.align import Skeleton, tokens
from collector.redact import MASK, MASK_EMAIL

MAX_TEXT = 64 << 10  # characters of one prompt; a longer one is left out
MAX_TOTAL = 6 << 20  # characters of all distinct prompts; beyond it the rarer ones are left out
_PASSES = 4  # how often texts that no template explains yet are looked at again,
_AT_ONCE = 400  # and how many of them
_FOLDED = 32  # texts of a group by which its template is made
_ROUNDS = 4  # how often texts that a template misses may change it
_LEAST_INNER = 3  # weight of a literal between two variables; more, while there are
_VARIABLES = 24  # more variables than this, or than
_VARIABLES_OF_FEW = 8  # in a template of less than
_FEW = 6  # texts, which have much in common by chance
_LEAST_EDGE = 1
_SAMPLES = 5
_SHOWN = 200  # characters of a sample value
_LABEL = re.compile(r"([A-Za-z_][A-Za-z0-9_ -]{0,40}?)[*`]*\s*[:=]\s*[*\"'(\[<`]*\s*\Z")
_TAG = re.compile(r"<([A-Za-z_][A-Za-z0-9_-]{0,40})>\s*\Z")
_SHAPES = (
    ("number", re.compile(r"[-+]?\d[\d,._]*\Z")),
    ("date", re.compile(r"\d{4}-\d\d-\d\d|\d{1,2}[./]\d{1,2}[./]\d{2,4}\Z")),
    ("url", re.compile(r"https?://\S+\Z")),
    ("id", re.compile(r"(?=\S*\d)[A-Za-z0-9_-]{8,}\Z")),
)


class Sample(NamedTuple):
    """One prompt as one call sent it."""

    role: str  # system | developer | user
    text: str
    model: str | None
    span_id: str


@dataclass(frozen=True)
class Proposal:
    """A template that would recognise these calls. `variables`: some of the values, each once, the commonest first."""

    proposal: str
    template: str
    role: str
    calls: int
    texts: int
    models: list[str]
    variables: dict[str, list[str]]
    span_id: str  # a call that it stands for


@dataclass
class _Text:
    """A distinct text of one role: how often it was sent, and by which calls."""

    text: str
    calls: int = 0
    models: Counter[str] = field(default_factory=Counter)
    span_id: str = ""


def read(rows: Iterable[Mapping[str, Any]]) -> list[Sample]:
    """The prompts in recorded calls: every system and developer text, and the first user's. `rows` have "span_id",
    "request_model" and "input_messages" (a list of messages; anything else holds no prompt)."""
    found: list[Sample] = []
    for row in rows:
        user = False
        messages = row["input_messages"]
        for message in messages if isinstance(messages, list) else ():
            role = message.get("role") if isinstance(message, dict) else None
            if role in ("system", "developer") or (role == "user" and not user):
                user = user or role == "user"
                model, span_id = row["request_model"], row["span_id"]
                found += [Sample(role, text, model, span_id) for text in _texts(message.get("content"))]
    return found


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else ()
    return [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]


def propose(samples: Iterable[Sample], known: Sequence[str] = (), least_calls: int = 1) -> list[Proposal]:
    """Templates for the samples that no template in `known` recognises, those of the most calls first. A text without
    variables is proposed if `least_calls` calls sent it, a user's if two did."""
    proposals: list[Proposal] = []
    for role, texts in _distinct(samples).items():
        open_texts = _bounded([text for text in texts if not _is_known(text.text, known)])
        for _ in range(_PASSES):
            found = _mine(open_texts[:_AT_ONCE])
            if not found:
                break
            proposals += _absorbed(role, found, open_texts)
        least = max(least_calls, 2) if role == "user" else least_calls
        proposals += [_proposal(role, one.text, [one]) for one in open_texts if _stands_alone(one, least)]
    return sorted(proposals, key=lambda one: (-one.calls, one.proposal))


def _mine(texts: list[_Text]) -> list[str]:
    """Templates of groups of at least two of the texts."""
    found: list[str] = []
    for group in grouping.group([one.text for one in texts], [one.calls for one in texts]):
        members = [texts[index] for index in group.members]
        text = _fitted(members) if len(members) > 1 else None
        if text is not None:
            found.append(text)
    return list(dict.fromkeys(found))


def _absorbed(role: str, found: list[str], open_texts: list[_Text]) -> list[Proposal]:
    """A proposal of each template with the open texts that it gives back, which are then no longer open: first of the
    one that spares most, that is literal characters times texts."""
    fits = {text: {one.text: one for one in open_texts if _inverts(text, one)} for text in found}
    size = {text: sum(map(len, template.split(text)[0])) for text in found}
    proposals: list[Proposal] = []
    taken: set[str] = set()
    while fits:
        text = max(fits, key=lambda one: (size[one] * len(fits[one]), one))
        members = list(fits.pop(text).values())
        if len(members) > 1:
            proposals.append(_proposal(role, text, members))
            taken.update(one.text for one in members)
            fits = {one: {key: held[key] for key in held.keys() - taken} for one, held in fits.items()}
    open_texts[:] = [one for one in open_texts if one.text not in taken]
    return proposals


def _inverts(text: str, one: _Text) -> bool:
    return template.invert(text, one.text) is not None


def _stands_alone(one: _Text, least_calls: int) -> bool:
    enough = one.calls >= least_calls and _substance(one.text)
    return enough and _inverts(one.text, one)


def _distinct(samples: Iterable[Sample]) -> dict[str, list[_Text]]:
    roles: dict[str, dict[str, _Text]] = {}
    for sample in samples:
        held = roles.setdefault(sample.role, {}).setdefault(sample.text, _Text(sample.text))
        held.calls += 1
        held.span_id = held.span_id or sample.span_id
        if sample.model:
            held.models[sample.model] += 1
    return {role: list(texts.values()) for role, texts in roles.items()}


def _is_known(text: str, known: Sequence[str]) -> bool:
    return any(one == text or template.invert(one, text) is not None for one in known)


def _bounded(texts: list[_Text]) -> list[_Text]:
    total, kept = 0, []
    for text in sorted(texts, key=lambda one: -one.calls):
        total += len(text.text)
        if total > MAX_TOTAL:
            break
        if text.text.strip() and len(text.text) <= MAX_TEXT and MASK not in text.text:
            kept.append(text)
    return kept


def _fitted(members: list[_Text]) -> str | None:
    """The template of what all members share; None where too little is left, or it gives back less than two."""
    skeleton = _met(members[:_FOLDED])
    for _ in range(_ROUNDS):
        text = _template(skeleton.literals(), members)
        if text is None:
            return None
        missed = [one for one in members if not _inverts(text, one)]
        if not missed:
            return text
        skeleton = skeleton.meet(_met(missed[:_FOLDED]))
    return text if len(members) - len(missed) > 1 else None


def _met(texts: Sequence[_Text]) -> Skeleton:
    skeleton = Skeleton.of(tokens(texts[0].text))
    for one in texts[1:]:
        skeleton = skeleton.meet(Skeleton.of(tokens(one.text)))
    return skeleton


def _template(literals: list[str], members: list[_Text]) -> str | None:
    """The template of the literals that mean something, its variables named; None if too little is left."""
    kept = _cleaned(literals, _VARIABLES if len(members) >= _FEW else _VARIABLES_OF_FEW)
    if not _substance("".join(kept)) or MASK in "".join(kept) or MASK_EMAIL in "".join(kept):
        return None
    plain = [f"v{number}" for number in range(1, len(kept))]
    values = [template.invert(_spelled(kept, plain), one.text) for one in members]
    rows = [row for row in values if row is not None]
    names = _names(kept, [[row[name] for row in rows] for name in plain], taken=template.variables("".join(kept)))
    text = _spelled(kept, names)
    # Names that occur twice say that two values are always the same: believed only if that holds for all.
    if len(set(names)) < len(names) and not all(_inverts(text, one) for one in members):
        text = _spelled(kept, _apart(names))
    return text


def _cleaned(literals: list[str], most: int) -> list[str]:
    """Without literals that are shared by chance, such as one comma, so that at most `most` variables are left; and
    no brace beside a variable, which would spell another one."""
    if len(literals) == 1:
        return literals
    first, *inner, last = literals
    least = _LEAST_INNER
    inner = [text for text in inner if grouping.weight(text) >= least]
    while len(inner) >= most:
        least *= 2
        inner = [text for text in inner if grouping.weight(text) >= least]
    edges = [text if grouping.weight(text) >= _LEAST_EDGE else "" for text in (first, last)]
    kept = [edges[0], *inner, edges[1]]
    for index in range(len(kept) - 1):
        kept[index] = kept[index].rstrip("{")
        kept[index + 1] = kept[index + 1].lstrip("}")
    return [kept[0], *(text for text in kept[1:-1] if text), kept[-1]]


def _substance(text: str) -> bool:
    return sum(map(str.isalnum, text)) >= grouping.LEAST_LITERAL


def _spelled(literals: Sequence[str], names: Sequence[str]) -> str:
    return literals[0] + "".join(f"{{{name}}}{after}" for name, after in zip(names, literals[1:], strict=True))


def _names(literals: list[str], columns: list[list[str]], taken: Iterable[str]) -> list[str]:
    """A name for each variable: the label or tag in front of it, else the form of its values. Columns that are equal
    and have several values are one variable."""
    used = set(taken)
    seen: dict[tuple[str, ...], str] = {}
    names: list[str] = []
    for before, column in zip(literals, columns, strict=False):
        key = tuple(column)
        name = seen.get(key) if len(set(column)) > 2 else None
        if name is None:
            name = _free(_label(before) or _shape(column), used)
            seen[key] = name
        names.append(name)
    return names


def _label(before: str) -> str | None:
    line = before.rsplit("\n", 1)[-1] if before.rsplit("\n", 1)[-1].strip() else before.rstrip()[-60:]
    found = _TAG.search(line) or _LABEL.search(line.rsplit("\n", 1)[-1])
    if found is None:
        return None
    words = re.findall(r"[a-z0-9]+", found[1].lower())[-3:]
    return "_".join(words) if words and not words[0][0].isdigit() else None


def _shape(values: list[str]) -> str:
    given = [value for value in values if value]
    for name, pattern in _SHAPES:
        if given and all(pattern.match(value) for value in given):
            return name
    return "text" if any("\n" in value or len(value) > 80 for value in given) else "value"


def _free(name: str, used: set[str]) -> str:
    number, free = 2, name
    while free in used:
        free, number = f"{name}_{number}", number + 1
    used.add(free)
    return free


def _apart(names: Sequence[str]) -> list[str]:
    used: set[str] = set()
    return [_free(name, used) for name in names]


def _proposal(role: str, text: str, members: list[_Text]) -> Proposal:
    models: Counter[str] = Counter()
    values: dict[str, Counter[str]] = {name: Counter() for name in template.variables(text)}
    for one in members:
        models.update(one.models)
        for name, value in (template.invert(text, one.text) or {}).items():
            values[name][value] += one.calls
    shown = {name: [value[:_SHOWN] for value, _ in found.most_common(_SAMPLES)] for name, found in values.items()}
    ident = "p-" + sha256(f"{role}\0{text}".encode()).hexdigest()[:10]
    calls = sum(one.calls for one in members)
    return Proposal(
        ident, text, role, calls, len(members), [name for name, _ in models.most_common()], shown, members[0].span_id
    )
