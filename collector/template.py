"""Prompt templates as data: text with `{name}` or `{{name}}` variables, rendered by replacement and nothing else.

A variable is a plain identifier between one or two pairs of braces. Every other brace is literal text, so JSON in a
prompt survives, and no expression, attribute, index or format code is ever evaluated.
"""

import re
from collections.abc import Mapping

VARIABLE = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}")


def split(template: str) -> tuple[list[str], list[str]]:
    """`(literals, names)`: the texts around the variables (one more than names) and the variables in order."""
    literals: list[str] = []
    names: list[str] = []
    at = 0
    for found in VARIABLE.finditer(template):
        literals.append(template[at : found.start()])
        names.append(found.group(1) or found.group(2))
        at = found.end()
    literals.append(template[at:])
    return literals, names


def variables(template: str) -> list[str]:
    """The distinct variables, in order of appearance."""
    return list(dict.fromkeys(split(template)[1]))


def render(template: str, values: Mapping[str, str]) -> str:
    """The text with known variables replaced, in one pass: a value is never read as a template; unknown ones stay."""
    return VARIABLE.sub(lambda found: values.get(found.group(1) or found.group(2), found.group(0)), template)


def invert(template: str, text: str) -> dict[str, str] | None:
    """The values with which `template` renders to exactly `text`, or None.

    Literal-anchored search from the left: linear in the text, no backtracking. Refuses adjacent variables and repeated
    variables that disagree. Verified by rendering again.
    """
    literals, names = split(template)
    if not names:
        return {} if template == text else None
    if not text.startswith(literals[0]) or any(not between for between in literals[1:-1]):
        return None
    values: dict[str, str] = {}
    at = len(literals[0])
    for name, after in zip(names[:-1], literals[1:-1], strict=True):
        end = text.find(after, at)
        if end < 0 or values.setdefault(name, text[at:end]) != text[at:end]:
            return None
        at = end + len(after)
    end = len(text) - len(literals[-1])
    if end < at or not text.endswith(literals[-1]):
        return None
    if values.setdefault(names[-1], text[at:end]) != text[at:end]:
        return None
    return values if render(template, values) == text else None
