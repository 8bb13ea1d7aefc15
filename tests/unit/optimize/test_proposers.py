"""Parts from the bank, from the agent's successes, and from a language model's replies, however they come."""

import asyncio
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimize.apo.editor import LLMEditor, messages, parse
from optimize.apo.parts import cut, make
from optimize.apo.proposers import BANK, Bank, Chain, Demonstrations, Example, Failure, State
from optimize.apo.templates import guard
from optimize.dataset import Task

SEED = "You are a helper. Be polite."
_, SENTENCES = cut(SEED)
KNOWN = make("instruction", "Always give prices in euros.", source="editor")
FAILURES = tuple(
    Failure(Task(f"t{n}", {"input": f"question {n}"}, f"t{n}"), f"answer {n}", f"wrong because {n}", 0.0, ())
    for n in (1, 2, 3)
)
STATE = State(SEED, SEED, tuple(part.id for part in SENTENCES), (*SENTENCES, KNOWN), FAILURES)


def ask(proposer: object, state: State = STATE) -> list:  # type: ignore[type-arg]
    return asyncio.run(proposer.propose(state))  # type: ignore[attr-defined]


def test_the_bank_is_small_general_and_passes_the_guard_and_comes_once() -> None:
    parts = ask(Bank())
    assert 12 <= len(parts) == len(BANK) <= 16
    assert all(guard(SEED, f"{SEED} {part.text}") is None and part.source == "bank" for part in parts)
    assert len({part.group for part in parts if part.group}) >= 2
    assert ask(Bank(), State(SEED, SEED, (), tuple(parts))) == []


def test_demonstrations_are_the_shortest_of_the_best_one_an_input() -> None:
    examples = [
        Example("Capital of France?", "It is Paris, of course", 1.0, "fr"),
        Example("capital of  france", "Paris", 1.0, "fr"),
        Example("Capital of Peru?", "Lima", 0.5, "pe"),
        Example("Capital of Chile?", "", 1.0, "cl"),
        Example("Capital of Japan?", "Tokyo" * 500, 1.0, "jp"),
        Example("Capital of Spain?", "Madrid", 1.0, "held out"),
    ]
    parts = ask(Demonstrations(examples, task_ids={"fr", "pe", "cl", "jp"}))
    assert [(part.text, part.tasks) for part in parts] == [("Question: capital of  france\nAnswer: Paris", ("fr",))]
    assert parts[0].kind == "demonstration"


def test_braces_in_an_example_stay_as_they_are() -> None:
    (part,) = ask(Demonstrations([Example("what is {output}?", "{input} is 3")]))
    assert part.text == "Question: what is {output}?\nAnswer: {input} is 3"


def test_demonstrations_keep_to_their_limit_and_ask_for_new_successes() -> None:
    batches = [[Example(f"q{n}", "a") for n in range(3)], [Example(f"q{n}", "a") for n in range(9)]]

    async def source() -> list[Example]:
        return batches.pop(0) if batches else []

    proposer = Demonstrations(source=source, limit=5, seed=1)
    first, second, third = ask(proposer), ask(proposer), ask(proposer)
    assert [len(first), len(second), len(third)] == [3, 2, 0]
    assert len({part.id for part in first + second}) == 5


def test_a_chain_proposes_what_its_members_propose() -> None:
    assert len(ask(Chain([Bank(), Demonstrations([Example("q", "a")])]))) == len(BANK) + 1


UNITS = [
    {"op": "add", "target_id": None, "text": "Answer in French.", "failures": [1, 3], "group": None},
    {"op": "use", "target_id": KNOWN.id, "failures": [2]},
    {"op": "replace", "target_id": SENTENCES[1].id, "text": "Be blunt.", "failures": ["#2"]},
    {"op": "add", "text": "Use metres.", "failures": [], "group": "units"},
    {"op": "remove", "target_id": SENTENCES[0].id},
    {"op": "add", "text": "   "},
    {"op": "use", "target_id": "unknown", "failures": [1]},
]


@pytest.mark.parametrize(
    "reply",
    [
        json.dumps(UNITS),
        f"I looked at [1] and [3].\n```json\n{json.dumps(UNITS, indent=2)}\n```\nDone.",
        f"Here you are: {json.dumps({'units': UNITS})} Good luck!",
    ],
)
def test_units_are_read_from_json_wherever_it_stands_with_their_citations(reply: str) -> None:
    parts = parse(reply, STATE, FAILURES)
    assert [(part.text, part.cites, part.group) for part in parts] == [
        ("Answer in French.", ("t1", "t3"), None),
        (KNOWN.text, ("t2",), None),
        ("Be blunt.", ("t2",), f"instead of {SENTENCES[1].id}"),
        ("Use metres.", (), "editor: units"),
    ]


def test_a_unit_of_several_instructions_is_split_where_they_stand_alone() -> None:
    text = "- Always answer in French. Never mention the weather. Otherwise say no. Round all numbers."
    parts = parse(json.dumps([{"op": "add", "text": text, "failures": [1]}]), STATE, FAILURES)
    assert [part.text for part in parts] == [
        "Always answer in French.",
        "Never mention the weather. Otherwise say no.",
        "Round all numbers.",
    ]
    assert {part.cites for part in parts} == {("t1",)}


def test_a_rewritten_prompt_in_prose_gives_its_additions_only() -> None:
    reply = "Sure, here is the improved prompt:\n\nYou are a helper. Be polite. Answer with the city only."
    assert [(part.kind, part.text) for part in parse(reply, STATE, FAILURES)] == [
        ("instruction", "Answer with the city only.")
    ]
    fenced = "I changed it.\n```\nYou are a helper. Always give prices in euros. Speak Latin.\n```"
    assert [part.text for part in parse(fenced, STATE, FAILURES)] == ["Speak Latin."]


def test_a_rewrite_that_keeps_nothing_is_an_alternative_as_a_whole() -> None:
    (part,) = parse("Act as a travel agent who knows every town by heart. Reply fast.", STATE, FAILURES)
    assert (part.kind, part.parent) == ("rewrite", None)
    state = State(SEED, part.text, (part.id,), (*SENTENCES, part), FAILURES)
    (child,) = parse("Imagine being an atlas. Whatever is asked, name one place.", state, FAILURES)
    assert (child.kind, child.parent) == ("rewrite", part.id)


@given(st.text(max_size=200) | st.text(alphabet='[]{}",:op add12 text\n`', max_size=200))
def test_no_reply_is_so_odd_that_it_breaks_the_editor(reply: str) -> None:
    assert all(part.text.strip() for part in parse(reply, STATE, FAILURES))


def test_the_editor_shows_prompt_parts_and_failures_and_only_calls_with_failures() -> None:
    asked = []

    async def complete(chat: list[dict[str, str]]) -> str:
        asked.append(chat)
        return json.dumps(UNITS)

    editor = LLMEditor(complete)
    assert ask(editor, State(SEED, SEED, (), ())) == [] and editor.calls == 0
    assert len(ask(editor)) == 4
    text = asked[0][-1]["content"]
    assert all(piece in text for piece in (SEED, KNOWN.id, KNOWN.text, "question 2", "answer 2", "wrong because 2"))


def test_long_failures_are_cut_in_the_middle() -> None:
    long = Failure(Task("t", {"input": "x" * 9000}, "t"), "y" * 9000, "", 0.0, ())
    assert len(messages(STATE, [long])[-1]["content"]) < 6000


def test_an_optimizer_model_that_fails_is_left_alone_after_three_tries(caplog: pytest.LogCaptureFixture) -> None:
    async def complete(chat: list[dict[str, str]]) -> str:
        raise ConnectionError("no route")

    editor = LLMEditor(complete)
    with caplog.at_level(logging.WARNING):
        assert [ask(editor) for _ in range(5)] == [[]] * 5
    assert editor.calls == 3
    assert "no route" in caplog.text
