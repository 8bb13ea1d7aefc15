import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector import template as neutral
from collector.errors import BadInput
from optimize.prompt import ENGINES, PromptTemplate


def test_a_prompt_is_formatted_as_by_str_format() -> None:
    text = 'Answer {question} as {{"a": 1}}, {question}!'
    assert PromptTemplate(text).format(question="q", more=1) == text.format(question="q", more=1)
    with pytest.raises(KeyError, match="question"):
        PromptTemplate(text).format(other=1)


def test_double_braces_are_variables_of_their_own_engine() -> None:
    prompt = PromptTemplate('Answer {{ question }} as {"a": 1}.', engine="mustache")
    assert prompt.variables == ("question",)
    assert prompt.format(question="q") == 'Answer q as {"a": 1}.'
    assert PromptTemplate("Hi {{ name }}", "jinja").format(name=3) == "Hi 3"


@pytest.mark.parametrize("text", ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{0}", "a { b", "a } b"])
def test_anything_but_plain_names_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        PromptTemplate(text)


@pytest.mark.parametrize("text", ["{% for a in b %}", "{{ a.b }}", "{{ a|safe }}", "{# c #}", "{{ f() }}"])
def test_no_code_of_a_template_language_is_ever_run(text: str) -> None:
    with pytest.raises(BadInput, match="plain variables"):
        PromptTemplate(text, engine="jinja")


def test_an_unknown_engine_is_refused_and_the_text_is_needed() -> None:
    with pytest.raises(BadInput, match="poml"):
        PromptTemplate("a", engine="poml")
    with pytest.raises(BadInput, match="text"):
        PromptTemplate()
    assert str(PromptTemplate(template="a")) == "a"


@given(st.lists(st.sampled_from(["{a}", "{b_1}", '{"x": 1}', "{", "}", "word ", "\n", "é"]), max_size=12))
def test_a_neutral_text_becomes_a_prompt_of_any_engine_and_comes_back(pieces: list[str]) -> None:
    text = "".join(pieces)
    values = {"a": "A", "b_1": "B"}
    for engine in ENGINES[:2]:
        prompt = PromptTemplate.from_neutral(text, engine)
        assert prompt.format(**values) == neutral.render(text, values)


@given(st.lists(st.sampled_from(["{a}", "{{", "}}", '{{"x": 1}}', "word "]), max_size=8))
def test_the_neutral_form_of_a_prompt_renders_the_same_or_is_refused(pieces: list[str]) -> None:
    prompt = PromptTemplate("".join(pieces))
    try:
        whole = prompt.neutral()
    except BadInput:
        return
    assert neutral.render(whole, {"a": "A"}) == prompt.format(a="A")
