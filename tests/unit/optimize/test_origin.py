from typing import Any

import pytest

from collector.errors import BadInput
from optimize.apo.origin import prompt_of, template_of, text_of

USER = {"role": "user", "content": "Capital of France?"}


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([{"role": "system", "content": "Be brief."}, USER], "Be brief."),
        ([{"role": "developer", "content": "Be brief."}, USER], "Be brief."),
        ([USER, {"role": "system", "content": "Late."}], "Late."),
        ([USER, {"role": "user", "content": "Second."}], "Capital of France?"),
        ([{"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "ab"),
        ([{"role": "assistant", "content": "x"}], None),
        ([], None),
        (None, None),
    ],
)
def test_the_prompt_of_a_call_is_its_system_message_else_its_first_user_message(messages: Any, prompt: Any) -> None:
    assert prompt_of(messages) == prompt


@pytest.mark.parametrize("content", [None, [], 5, [{"type": "image_url"}], [{"type": "text", "text": "a"}, "b"]])
def test_a_message_with_anything_but_text_has_no_text(content: Any) -> None:
    assert text_of(content) is None


def test_the_same_text_each_time_is_the_prompt_as_it_is() -> None:
    assert template_of([({"country": "France"}, "You {x} help."), ({"country": "Peru"}, "You {x} help.")]) == (
        "You {x} help."
    )


def test_the_tasks_own_values_become_variables() -> None:
    seen = [
        ({"id": "1", "country": "France", "year": 1900}, "Capital of France in 1900? France!"),
        ({"id": "2", "country": "Peru", "year": 1950}, "Capital of Peru in 1950? Peru!"),
    ]
    assert template_of(seen) == "Capital of {country} in {year}? {country}!"


def test_the_longest_value_is_replaced_first() -> None:
    seen = [
        ({"short": "New", "long": "New Zealand"}, "New Zealand or New"),
        ({"short": "Old", "long": "Older Land"}, "Older Land or Old"),
    ]
    assert template_of(seen) == "{long} or {short}"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("France at 10:00", "Peru at 11:00"),  # something that no task holds
        ("Paris", "Lima"),  # only the expected answer, which no prompt may be made of
        ("France", "Capital of Peru"),
    ],
)
def test_a_prompt_that_cannot_be_explained_by_its_tasks_is_refused(first: str, second: str) -> None:
    seen = [({"c": "France", "expected": "Paris"}, first), ({"c": "Peru", "expected": "Lima"}, second)]
    with pytest.raises(BadInput, match="differs from task to task"):
        template_of(seen)
