"""Prompt templates as an agent holds them: `.format(**task)` over plain variables, and nothing else is ever run."""

import re
import string
from typing import Any

from collector import template as neutral
from collector.errors import BadInput

ENGINES = ("f-string", "mustache", "jinja")
_MUSTACHE = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")
_JINJA_CODE = re.compile(r"\{%|\{#|\{\{(?!\s*[A-Za-z_][A-Za-z0-9_]*\s*\}\})")


class PromptTemplate:
    """A prompt with variables.

    `engine`: f-string has `{name}`, and `{{` for a brace, as `str.format`; mustache has `{{name}}`, all other braces
    are literal; jinja is read as mustache, so only plain `{{ name }}` is taken and anything that would run is refused.
    Variables are plain names: attributes, indices, conversions and format codes are refused.

    Raises BadInput for a text that its engine cannot read.
    """

    def __init__(self, text: str | None = None, engine: str = "f-string", *, template: str | None = None) -> None:
        found = template if text is None else text
        if not isinstance(found, str):
            raise BadInput("a PromptTemplate needs its text", param="text")
        if engine not in ENGINES:
            raise BadInput(f"there is no template engine {engine!r}; there are: {', '.join(ENGINES)}", param="engine")
        self.text = found
        self.engine = engine
        self._pieces = _pieces(found, engine)

    @property
    def template(self) -> str:
        """The text."""
        return self.text

    @property
    def variables(self) -> tuple[str, ...]:
        """The distinct variables, in order of appearance."""
        return tuple(dict.fromkeys(name for _, name in self._pieces if name is not None))

    def format(self, **values: Any) -> str:
        """The text with its variables replaced by `str` of their values; what is not asked for is ignored.

        Raises KeyError for a variable without a value.
        """
        return "".join(text + ("" if name is None else str(values[name])) for text, name in self._pieces)

    def neutral(self) -> str:
        """The text in the form that a search works on: `{name}` is a variable, every other brace is literal.

        Raises BadInput where a literal would read as a variable there.
        """
        whole = "".join(text + ("" if name is None else f"{{{name}}}") for text, name in self._pieces)
        samples = {name: f"<{index}>" for index, name in enumerate((*self.variables, *neutral.variables(whole)))}
        if neutral.render(whole, samples) != self.format(**samples):
            raise BadInput(
                "a literal brace stands where it reads like a variable; write it in other words", param="text"
            )
        return whole

    @classmethod
    def from_neutral(cls, text: str, engine: str) -> "PromptTemplate":
        """The same prompt for `engine`."""
        literals, names = neutral.split(text)
        if engine == "f-string":
            escaped = [literal.replace("{", "{{").replace("}", "}}") for literal in literals]
            marks = [f"{{{name}}}" for name in names]
        else:
            escaped, marks = literals, [f"{{{{{name}}}}}" for name in names]
        return cls("".join(a + b for a, b in zip(escaped, [*marks, ""], strict=True)), engine)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"PromptTemplate(text={self.text!r}, engine={self.engine!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptTemplate) and (self.text, self.engine) == (other.text, other.engine)

    def __hash__(self) -> int:
        return hash((self.text, self.engine))


def _pieces(text: str, engine: str) -> list[tuple[str, str | None]]:
    """(literal, variable after it) in order; the last variable is None."""
    if engine == "f-string":
        return _formatted(text)
    if engine == "jinja" and (code := _JINJA_CODE.search(text)):
        raise BadInput(f"only plain variables are taken of a jinja template, not {text[code.start() :][:20]!r}")
    pieces: list[tuple[str, str | None]] = []
    at = 0
    for found in _MUSTACHE.finditer(text):
        pieces.append((text[at : found.start()], found.group(1)))
        at = found.end()
    return [*pieces, (text[at:], None)]


def _formatted(text: str) -> list[tuple[str, str | None]]:
    pieces: list[tuple[str, str | None]] = []
    try:
        for literal, name, code, conversion in string.Formatter().parse(text):
            if name is not None and (code or conversion or not name.isidentifier()):
                raise BadInput(f"{{{name}}} is no plain variable: only names such as {{question}} are", param="text")
            pieces.append((literal, name))
    except ValueError as error:
        raise BadInput(
            f"the template is not one of str.format: {error}; write {{{{ for a brace", param="text"
        ) from None
    return [*pieces, ("", None)]
