import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.template import invert, render, split, variables

NAMES = st.sampled_from(["a", "b", "c", "city", "_x1"])
LITERALS = st.text(alphabet="xyz {}:\n", max_size=6).filter(lambda text: not re.search(r"\{[a-z_]", text))
# A literal between two variables that no value below can contain.
ANCHORS = st.text(alphabet="|#", min_size=1, max_size=3)


@given(st.text())
def test_splitting_loses_nothing_but_the_braces(template: str) -> None:
    literals, names = split(template)
    assert len(literals) == len(names) + 1
    assert set(variables(template)) == set(names)
    assert "".join(literals) == render(template, dict.fromkeys(names, ""))


@given(st.lists(st.tuples(NAMES, ANCHORS), min_size=1, max_size=4), ANCHORS, st.data())
def test_values_come_back_out_of_what_they_were_rendered_into(
    pieces: list[tuple[str, str]], head: str, data: st.DataObject
) -> None:
    names = {name for name, _ in pieces}
    values = {name: data.draw(st.text(alphabet="xyz{} \n", max_size=8)) for name in sorted(names)}
    double = data.draw(st.booleans())
    template = head + "".join((f"{{{{{name}}}}}" if double else f"{{{name}}}") + anchor for name, anchor in pieces)
    assert invert(template, render(template, values)) == values


@given(st.text(alphabet="ab{}x", max_size=12), st.text(alphabet="ab{}x", max_size=12))
def test_whatever_is_found_renders_to_the_text(template: str, text: str) -> None:
    values = invert(template, text)
    if values is not None:
        assert render(template, values) == text
        assert set(values) == set(variables(template))


@pytest.mark.parametrize(
    ("template", "text", "values"),
    [
        ("You help.", "You help.", {}),
        ("You help.", "You help!", None),
        ("Capital of {country}?", "Capital of France?", {"country": "France"}),
        ("Capital of {{ country }}?", "Capital of France?", {"country": "France"}),
        ("Capital of {country}?", "Capital of France", None),
        ("{a}", "anything\nat all", {"a": "anything\nat all"}),
        ("{a}{b}", "xy", None),
        ("{a} and {a}", "x and x", {"a": "x"}),
        ("{a} and {a}", "x and y", None),
        ("{a}-", "x", None),
        ("x{a}x", "x", None),
        ('{"json": 1, "v": {v}}', '{"json": 1, "v": 7}', {"v": "7"}),
        ("{a}", "{b}", {"a": "{b}"}),
        ("{a.b} {0} {a!r} {a:>9}", "{a.b} {0} {a!r} {a:>9}", {}),
    ],
)
def test_examples(template: str, text: str, values: dict[str, str] | None) -> None:
    assert invert(template, text) == values


def test_a_value_is_never_read_as_a_template() -> None:
    assert render("{a} {b}", {"a": "{b}", "b": "{a}"}) == "{b} {a}"
    assert render("{a} {unknown}", {"a": "1"}) == "1 {unknown}"


class Counted(str):
    """A text that counts how many of its characters a search looks at, at most."""

    looked = 0

    def find(self, sub: str, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
        at = super().find(sub, start)
        Counted.looked += (len(self) if at < 0 else at + len(sub)) - start
        return at

    def startswith(self, prefix: str) -> bool:  # type: ignore[override]
        Counted.looked += len(prefix)
        return super().startswith(prefix)

    def endswith(self, suffix: str) -> bool:  # type: ignore[override]
        Counted.looked += len(suffix)
        return super().endswith(suffix)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{a}x{b}x{c}y", "x" * 32_768),
        ("{a} {b} {c} {d}!", " " * 32_768),
        ("{a}ab{b}ab{c}", "a" * 32_768),
        ("".join(f"{{v{n}}}aab" for n in range(200)), "a" * 32_000 + "aab" * 199),
        ("{a}" + "a" * 50 + "b" + "a" * 48 + "{b}", "a" * 32_768),
    ],
)
def test_a_miss_looks_at_no_character_twice(template: str, text: str) -> None:
    Counted.looked = 0
    assert invert(template, Counted(text)) is None
    assert Counted.looked <= len(text) + len(template)


@given(st.text(alphabet="ab{}x", max_size=40), st.text(alphabet="abx", max_size=80))
def test_no_template_makes_a_search_look_twice(template: str, text: str) -> None:
    Counted.looked = 0
    invert(template, Counted(text))
    assert Counted.looked <= len(text) + len(template)
