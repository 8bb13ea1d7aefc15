"""Parts written by a language model: one call on up to 8 failures, atomic units with citations in return.

The reply should be JSON; a reply in prose is read as a rewritten prompt, of which only what is new counts. Because
additions are harvested and rendering is ours, a sloppy editor cannot drop a rule or a variable from the prompt.
"""

import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from optimize.apo.parts import Part, cut, make, same_as, words
from optimize.apo.state import Failure, State

log = logging.getLogger(__name__)

Complete = Callable[[list[dict[str, str]]], Awaitable[str]]
CHARS = 1200  # of an input, an answer or a feedback that the editor reads
LISTED = 60  # known parts that it is shown

ROLE = """You improve the prompt of an AI agent by studying rollouts that went wrong. \
You never see the agent's code; you change its behaviour only through small, general additions to its prompt."""

REQUEST = """The prompt in use, between the lines:
----
{prompt}
----

Instructions known already, each with its id (some are in the prompt, others are being tested):
{known}

Rollouts that earned less than they could, numbered:
{failures}

Find out what the agent did wrong and which instruction would have prevented it. Write instructions for tasks of this \
kind, never for one of these tasks: no names, numbers or sentences copied from them. One instruction a unit, each one \
sentence that makes sense alone. Prefer few units that answer several failures. Where a known instruction answers a \
failure, use its id instead of writing it again.

Reply with a JSON array only. Each element:
{{"op": "add" | "replace" | "use", "target_id": the id for replace and use, else null, "text": the instruction for add \
and replace, "failures": [numbers of the rollouts it answers], "group": a short name shared by alternatives that \
exclude each other, else null}}"""

_FENCE = re.compile(r"```[\w-]*\n(.*?)```", re.DOTALL)
_PREAMBLE = re.compile(
    r"^\s*(?:sure|certainly|here|below|okay|ok|the (?:new|improved|revised)|(?:improved|revised|new) prompt)\b"
    r"[^\n]*:\s*\n",
    re.IGNORECASE,
)
_LEANING = re.compile(r"^(?:otherwise|then|if not|this|these|those|it|they|else|for example|e\.g)\b", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<=[.!?;])\s+(?=[A-Z\"'(])")


class LLMEditor:
    """Proposes parts through `complete`, which sends chat messages to a model and returns the reply's text.

    A call that fails is logged and proposes nothing; after `patience` failures in a row the editor is not asked again,
    so that a search without a working optimizer model goes on with its other proposers.
    """

    def __init__(self, complete: Complete, *, max_failures: int = 8, max_units: int = 12, patience: int = 3) -> None:
        self.complete = complete
        self.max_failures, self.max_units, self.patience = max_failures, max_units, patience
        self.calls = 0
        self._failed = 0

    async def propose(self, state: State) -> list[Part]:
        """One call on the newest failures; nothing without failures."""
        failures = state.failures[-self.max_failures :]
        if not failures or self._failed >= self.patience:
            return []
        self.calls += 1
        try:
            reply = await self.complete(messages(state, failures))
        except Exception as error:  # noqa: BLE001 (boundary: a foreign client may raise anything; the search goes on)
            self._failed += 1
            log.warning("the optimizer model gave no edit: %s: %s", type(error).__name__, error)
            return []
        self._failed = 0
        return parse(reply, state, failures)[: self.max_units]


def messages(state: State, failures: Sequence[Failure]) -> list[dict[str, str]]:
    """The chat messages that ask for units."""
    listed = [part for part in state.parts if part.kind not in ("demonstration", "rewrite")][-LISTED:]
    known = "\n".join(f"{part.id}: {part.text}" for part in listed) or "(none)"
    shown = "\n\n".join(f"[{number}]\n{_told(failure)}" for number, failure in enumerate(failures, start=1))
    request = REQUEST.format(prompt=state.template, known=known, failures=shown)
    return [{"role": "system", "content": ROLE}, {"role": "user", "content": request}]


def _told(failure: Failure) -> str:
    lines = [
        f"task: {_short(failure.task.json)}",
        f"answer: {_short(failure.answer) or '(none)'}",
        f"reward: {failure.score:g}",
    ]
    return "\n".join([*lines, f"feedback: {_short(failure.feedback)}"] if failure.feedback else lines)


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= CHARS else f"{text[: CHARS // 2]} ... {text[-CHARS // 2 :]}"


def parse(reply: str, state: State, failures: Sequence[Failure]) -> list[Part]:
    """The parts in a reply: JSON units (bare, fenced or in prose), else the additions of a rewritten prompt."""
    units = _json_units(reply)
    if units is None:
        return _rewritten(reply, state)
    return [part for unit in units for part in _unit(unit, state, failures)]


def _json_units(reply: str) -> list[Mapping[str, Any]] | None:
    decoder = json.JSONDecoder()
    for text in [*_FENCE.findall(reply), reply]:
        for start in re.finditer(r"[\[{]", text):
            try:
                value, _ = decoder.raw_decode(text, start.start())
            except ValueError:
                continue
            units = _as_units(value)
            if units is not None:
                return units
    return None


def _as_units(value: Any) -> list[Mapping[str, Any]] | None:
    """The list of units in a decoded value; None where it is some other JSON."""
    if isinstance(value, dict):
        if "op" in value or "text" in value:
            return [value]
        value = next((item for item in value.values() if isinstance(item, list)), None)
    if not isinstance(value, list):
        return None
    units: list[Mapping[str, Any]] = [
        unit for unit in value if isinstance(unit, dict) and ("op" in unit or "text" in unit)
    ]
    return units if units or not value else None


def _unit(unit: Mapping[str, Any], state: State, failures: Sequence[Failure]) -> list[Part]:
    cites = _cited(unit.get("failures"), failures)
    target = _target(unit.get("target_id"), state)
    op = str(unit.get("op") or "add").lower()
    text = unit.get("text")
    if op == "use" and target is not None:
        return [replace(target, cites=cites)]
    if op not in ("add", "replace") or not isinstance(text, str) or not text.strip():
        return []
    named = unit.get("group")
    group = f"editor: {named.strip()}" if isinstance(named, str) and named.strip() else None
    if op == "replace" and target is not None:
        group = target.group or f"instead of {target.id}"
    atoms = _atoms(text) if group is None else [_plain(text)]
    return [make("instruction", atom, group=group, cites=cites) for atom in atoms]


def _target(target_id: Any, state: State) -> Part | None:
    wanted = str(target_id or "").strip().lstrip("#")
    return next((part for part in state.parts if part.id == wanted), None)


def _cited(numbers: Any, failures: Sequence[Failure]) -> tuple[str, ...]:
    found = re.findall(r"\d+", json.dumps(numbers)) if isinstance(numbers, list | int | str) else []
    indices = [int(number) - 1 for number in found if len(number) < 6]
    return tuple(dict.fromkeys(failures[index].task.id for index in indices if 0 <= index < len(failures)))


def _atoms(text: str) -> list[str]:
    """One instruction each: sentences, kept together where one leans on the one before."""
    atoms: list[str] = []
    for sentence in _SENTENCE.split(_plain(text)):
        if atoms and (_LEANING.match(sentence) or len(words(sentence)) < 3):
            atoms[-1] = f"{atoms[-1]} {sentence}"
        else:
            atoms.append(sentence)
    return [atom for atom in atoms if atom]


def _plain(text: str) -> str:
    return re.sub(r"^(?:[-*•]|\d+[.)])\s+", "", " ".join(text.split()))


def _rewritten(reply: str, state: State) -> list[Part]:
    """What a rewritten prompt adds to the prompt in use; the whole of it where it kept less than half and has no list.

    Units that the prompt or a known part says already are dropped by the pool.
    """
    fenced = _FENCE.findall(reply)
    text = max(fenced, key=len) if fenced else _PREAMBLE.sub("", reply)
    text = re.sub(r"</?(?:prompt|new_prompt|system)>", "", text).strip()
    if not text:
        return []
    known = list(state.parts)
    _, old = cut(state.template, max_parts=1000)
    _, units = cut(text, max_parts=1000)
    kept = [part for part in old if same_as(part.text, units) is not None]
    bullets = re.search(r"^\s*(?:[-*•]|\d+[.)])\s", text, re.MULTILINE)
    if old and 2 * len(kept) < len(old) and not bullets:
        parent = next((part.id for part in known if part.kind == "rewrite" and part.id in state.subset), None)
        return [make("rewrite", text, parent=parent)]
    new = [part for part in units if same_as(part.text, [*old, *known]) is None]
    return [make("instruction", atom) for part in new for atom in _atoms(part.text)]
