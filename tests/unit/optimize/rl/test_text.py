from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimize.rl.text import Detokenizer, Stops, Vocabulary
from tests.unit.optimize.rl.conftest import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=10))
def test_text_grows_by_whole_characters_to_what_decoding_at_once_gives(tokenizer: Any, text: str, prompt: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer.decode, tokenizer.encode(prompt, add_special_tokens=False))
    pieces = [detokenizer.push(token) for token in ids]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


def test_a_character_that_never_ends_is_shown_as_broken(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer.decode, [])
    first = tokenizer.encode("é", add_special_tokens=False)[0]
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == "\ufffd"


LETTERS = st.text(alphabet="ab\n", max_size=12)


@given(st.lists(LETTERS, max_size=6), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3))
def test_stops_cut_at_the_stop_that_ends_first_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    expected = whole[: min(ends)[1]] if ends else whole
    matcher, passed, stopped = Stops(stops), "", False
    for piece in pieces:
        text, stopped = matcher.push(piece)
        passed += text
        assert expected.startswith(passed)
        if stopped:
            break
    if not stopped:
        passed += matcher.flush()
    assert passed == expected
    assert stopped == bool(ends)


def test_leading_spaces_go_where_asked_and_only_those() -> None:
    matcher = Stops(["\n"], lead=True)
    assert [matcher.push(piece) for piece in (" ", " New", " York", "\n")] == [
        ("", False),
        ("New", False),
        (" York", False),
        ("", True),
    ]


def test_single_tokens_have_text_and_bytes(tokenizer: Any) -> None:
    vocabulary = Vocabulary(tokenizer)
    space, letter = tokenizer.encode(" x", add_special_tokens=False)
    assert vocabulary.token(space) == (" ", [32])
    assert vocabulary.token(letter) == ("x", [120])
    assert vocabulary.token(tokenizer.encode("é", add_special_tokens=False)[0]) == ("\ufffd", None)
