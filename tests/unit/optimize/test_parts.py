"""Cutting a prompt in parts and putting any subset together again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.template import variables
from optimize.apo.parts import atomic, cut, made_of, make, render, same_as

SHOT = make("demonstration", "Question: Capital of France?\nAnswer: Paris")
RULE = make("format", "Output ONLY the answer.")


@given(st.text(alphabet="aB. !?\n{x}-#`:", max_size=80))
def test_all_sentences_and_nothing_added_is_the_seed_byte_for_byte(seed: str) -> None:
    skeleton, parts = cut(seed)
    assert render(skeleton, parts) == seed
    assert set(variables(render(skeleton, []))) == set(variables(seed))


def test_instructions_follow_the_sentence_and_demonstrations_come_last_between_blank_lines() -> None:
    skeleton, parts = cut("You are a geography helper.")
    other = make("demonstration", "Question: Capital of Peru?\nAnswer: Lima")
    assert render(skeleton, [other, SHOT, RULE, *parts]) == (
        "You are a geography helper. Output ONLY the answer.\n\n"
        "Question: Capital of Peru?\nAnswer: Lima\n\nQuestion: Capital of France?\nAnswer: Paris"
    )
    assert render(skeleton, [SHOT]) == SHOT.text
    assert render(skeleton, [RULE]) == RULE.text


def test_a_prompt_of_lines_gets_lines() -> None:
    skeleton, parts = cut("Rules:\n- be brief\n- be kind")
    assert [part.text for part in parts] == ["- be brief", "- be kind"]
    assert render(skeleton, [parts[1], RULE]) == "Rules:\n- be kind\nOutput ONLY the answer."


def test_a_template_that_ends_with_its_question_keeps_it_last() -> None:
    skeleton, parts = cut("Answer well.\nQuestion: {question}\nAnswer:")
    text = render(skeleton, [*parts, RULE, SHOT])
    assert text == f"Answer well. Output ONLY the answer.\n\n{SHOT.text}\n\nQuestion: {{question}}\nAnswer:"
    assert render(skeleton, [*parts, RULE]) == "Answer well. Output ONLY the answer.\nQuestion: {question}\nAnswer:"


def test_variables_headings_code_and_safety_rules_stay_for_good() -> None:
    skeleton, parts = cut(
        "You are kind. Help {user} now. Never reveal personal data.\n# Style\n```\nx = 1. Y = 2.\n```\nBe brief."
    )
    assert [part.text for part in parts] == ["You are kind.", "Be brief."]
    bare = render(skeleton, [])
    assert all(text in bare for text in ("{user}", "personal data", "# Style", "x = 1. Y = 2."))


def test_a_rewrite_takes_the_place_of_the_whole_seed() -> None:
    skeleton, parts = cut("Old. Words.")
    assert render(skeleton, [*parts, make("rewrite", "Quite new."), RULE]) == "Quite new. Output ONLY the answer."


def test_a_sentence_that_comes_twice_is_one_part_and_the_second_stays() -> None:
    skeleton, parts = cut("Be brief. Be kind. Be brief.")
    assert [part.text for part in parts] == ["Be brief.", "Be kind."]
    assert render(skeleton, parts) == "Be brief. Be kind. Be brief."


def test_equal_texts_have_equal_ids_and_kinds_differ() -> None:
    assert make("instruction", "Go.") == make("instruction", "Go.")
    assert make("instruction", "Go.").id != make("format", "Go.").id


KNOWN = [
    make("instruction", "Always give the currency in euros."),
    make("instruction", "Always give the date as year, month, day."),
    make("instruction", "Always round to two decimals."),
    make("instruction", "Always name your source."),
]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("always give the CURRENCY in euros", 0),
        ("Give the currency in euros, always and only.", 0),
        ("Always give the temperature in kelvin.", None),
        ("Use short sentences.", None),
    ],
)
def test_rare_words_decide_whether_two_rules_are_the_same(text: str, match: int | None) -> None:
    assert same_as(text, KNOWN) == (None if match is None else KNOWN[match])


def test_a_merged_sentence_of_known_rules_is_recognised() -> None:
    assert made_of("Always give the currency in euros and round to two decimals.", KNOWN)
    assert not made_of("Always give the currency in euros and shout at pelicans wearing hats.", KNOWN)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (
            "Always answer in French, and never mention the weather.",
            ["Always answer in French.", "Never mention the weather."],
        ),
        (
            "Give prices in euros; round to two decimals, and do not name the shop.",
            ["Give prices in euros.", "Round to two decimals.", "Do not name the shop."],
        ),
        (
            "Name the city first, and the date must follow the name.",
            ["Name the city first.", "The date must follow the name."],
        ),
        ("Give the name, and the capital of the country.", None),
        ("If the price is missing, say so, and always name the shop.", None),
        ("Find the longest word, and write it in capitals.", None),
        ("Be brief, and use few words", ["Be brief, and use few words"]),
    ],
)
def test_a_merged_sentence_is_split_where_both_halves_stand_alone(text: str, pieces: list[str] | None) -> None:
    part = make("instruction", text, cites=("t1",))
    split = atomic(part)
    assert [piece.text for piece in split] == (pieces or [text])
    assert all(piece == make("instruction", piece.text, cites=("t1",)) for piece in split)


def test_what_must_stay_whole_is_not_split() -> None:
    text = "Always answer in French, and never mention the weather."
    for part in (make("demonstration", text), make("rewrite", text), make("instruction", text, group="one of")):
        assert atomic(part) == [part]
