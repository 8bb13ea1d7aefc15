from typing import Any

import pytest

from collector.errors import BadInput
from optimize.rl.chat import plain, render
from tests.unit.optimize.rl.conftest import byte_tokenizer

ASK = {"role": "user", "content": "Capital of France?"}


def test_a_base_model_is_asked_in_plain_questions() -> None:
    messages = [{"role": "system", "content": "Be brief."}, ASK]
    prompt = render(messages, byte_tokenizer())
    assert prompt.text == "Be brief.\n\nQuestion: Capital of France?\nAnswer:"
    assert (prompt.stop, prompt.lead, prompt.special) == (("\n",), True, True)
    assert plain([ASK]) == "Question: Capital of France?\nAnswer:"


def test_earlier_turns_come_as_questions_and_answers() -> None:
    messages = [ASK, {"role": "assistant", "content": "Paris"}, {"role": "user", "content": "And of Spain?"}]
    assert plain(messages) == "Question: Capital of France?\nAnswer: Paris\nQuestion: And of Spain?\nAnswer:"


@pytest.mark.parametrize("messages", [[], [{"role": "system", "content": "x"}], [ASK, {**ASK, "role": "assistant"}]])
def test_a_base_model_needs_a_question_last(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(BadInput, match="last message"):
        plain(messages)


def test_a_model_with_a_chat_template_uses_it_and_no_default_stop() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    prompt = render([{"role": "developer", "content": "x"}, ASK], tokenizer)
    assert prompt.text == "<system>x<user>Capital of France?<assistant>"
    assert (prompt.stop, prompt.lead, prompt.special) == ((), False, False)
    with pytest.raises(BadInput, match="refuses these messages: no"):
        render([{"role": "user", "content": "bad"}], tokenizer)
