"""What the guard lets through and what it refuses, before it costs a rollout."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.template import variables
from optimize.apo.templates import guard

SEED = "You help {user}. Answer the question: {{question}}"


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        ("You help {user}. Answer.", "loses the variable {question}"),
        (SEED + " {secret}", "adds the variable {secret}"),
        ("  \n", "empty"),
        ("```\n" + SEED + "\n```", "code fence"),
        (SEED + "x" * 7000, "too long"),
        (SEED + " the quick brown fox jumps over the lazy dog", "copies training text"),
    ],
)
def test_a_bad_candidate_is_refused_with_its_reason(candidate: str, reason: str) -> None:
    refusal = guard(SEED, candidate, ["Once THE QUICK, brown fox jumps over the lazy dog ran."])
    assert refusal is not None and reason in refusal


def test_good_candidates_pass() -> None:
    assert guard(SEED, SEED) is None
    assert guard(SEED, '{user} asks {question}. Be brief. Answer in JSON like {"a": 1}.') is None
    assert guard("Say hi.", "Be kind.") is None


def test_what_the_seed_says_itself_is_no_copy_and_seven_words_are_no_copy() -> None:
    text = "one two three four five six seven eight"
    assert guard(f"{text}. Go.", f"{text}. Go now.", [text]) is None
    assert guard("Go.", "Go. one two three four five six seven", [text]) is None


@given(st.text(alphabet="ab {}q\n`_", max_size=60))
def test_whatever_passes_has_exactly_the_seeds_variables(candidate: str) -> None:
    if guard("{q} a", candidate) is None:
        assert variables(candidate) == ["q"]
        assert "```" not in candidate
