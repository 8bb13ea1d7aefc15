"""The tasks, and for each a fixed bank of parts: some good, some useless, some harmful. Nobody is told which."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from optimize.apo.parts import Kind, Part, make
from optimize.dataset import Task, load_tasks

COUNTRIES = Path(__file__).resolve().parents[2] / "examples" / "capital_city" / "tasks.jsonl"
SEARCH, EVALUATION = 60, 60


@dataclass(frozen=True)
class Problem:
    """A task set with its starting prompt and bank. `search` is what engines see, `evaluation` what the truth is."""

    name: str
    seed_prompt: str
    bank: tuple[Part, ...]
    search: tuple[Task, ...]
    evaluation: tuple[Task, ...]
    question: Callable[[Task], str]
    longest: int


def bank(**texts: str) -> tuple[Part, ...]:
    """Parts of lines by kind; demonstrations are `question | answer`."""
    parts = []
    for kind, lines in texts.items():
        for line in lines.strip().splitlines():
            asked, _, answer = line.strip().partition(" | ")
            text = f"Question: {asked}\nAnswer: {answer}" if answer else asked
            named: Kind = "demonstration" if answer else "format" if kind == "format" else "instruction"
            parts.append(make(named, text, source="bank"))
    return tuple(parts)


CAPITALS = bank(
    instruction="""
        Answer with the name of the city only.
        Name the capital city.
        Never answer with the name of a country.
        Do not repeat the question.
        Use the English name.
        One or two words are enough.
        You know every country.
        Be polite.
        Take your time.
        Think step by step.
        Answer in a full sentence.
        Answer in French.
        Mention the country, too.
        If you are not sure, say so.
        Tell something about the place.
    """,
    format="""
        Output ONLY the answer, with no punctuation.
        Format: the city, then a new line.
        Format: the city, a comma, the country.
        Write the answer in capital letters.
    """,
    demonstration="""
        Capital of France? | Paris
        Capital of Japan? | Tokyo
        Capital of Kenya? | Nairobi
        Capital of Peru? | Lima
        Capital of Norway? | The capital of Norway is Oslo.
        Capital of Canada? | Ottawa, Canada
    """,
)
SHOWN = ("France", "Japan", "Kenya", "Peru", "Norway", "Canada")

REVIEWS = bank(
    instruction="""
        Say whether the review is positive or negative.
        Answer with one word.
        The answer is positive or negative.
        Is the writer happy or not?
        Do not repeat the review.
        Read the whole review first.
        You are an expert.
        Be polite.
        Take your time.
        Think step by step.
        Explain your answer.
        Answer the writer.
        Give a number from 1 to 10.
        If you are not sure, say so.
    """,
    format="""
        Output ONLY the label, in lower case.
        Format: positive or negative, then a new line.
        Write the label in capital letters.
        Format: the label, then the reason.
    """,
    demonstration="""
        Review: The soup was cold. Label? | negative
        Review: A wonderful hotel. Label? | positive
        Review: I will never come back. Label? | negative
        Review: Exactly what I needed. Label? | positive
        Review: The zip broke at once. Label? | Negative!
        Review: Lovely people. Label? | This is a positive review.
        Review: It does its job. Label? | 7 out of 10
    """,
)
_THINGS = (
    "room", "food", "battery", "screen", "service", "film", "phone", "staff", "coffee", "book",
    "bed", "guide", "sound", "bag",
)  # fmt: skip
_GOOD = (
    "The {} was great.", "I love the {}.", "What a beautiful {}!", "The {} is better than I had hoped.",
    "I would buy this {} again.",
)  # fmt: skip
_BAD = (
    "The {} was awful.", "I hate the {}.", "What a terrible {}!", "The {} is worse than I had feared.",
    "I want my money back for this {}.",
)  # fmt: skip


def capitals() -> Problem:
    """Capital cities: the countries of the example less those that the bank shows."""
    tasks = [task for task in load_tasks(COUNTRIES) if task.data["country"] not in SHOWN]
    return _problem("capital", "You are a geography helper.", CAPITALS, tasks, _country, 16)


def reviews() -> Problem:
    """Short reviews to one of two labels: the label must be exactly that."""
    texts = [
        (form.format(thing), label)
        for forms, label in ((_GOOD, "positive"), (_BAD, "negative"))
        for form, thing in itertools.product(forms, _THINGS)
    ]
    tasks = [
        Task(f"review-{at}", {"review": text, "expected": label}, f"review-{at}")
        for at, (text, label) in enumerate(texts)
    ]
    return _problem("reviews", "You judge reviews.", REVIEWS, tasks, _review, 6)


def _country(task: Task) -> str:
    return f"Capital of {task.data['country']}?"


def _review(task: Task) -> str:
    return f"Review: {task.data['review']} Label?"


def _problem(
    name: str, seed: str, parts: tuple[Part, ...], tasks: list[Task], question: Callable[[Task], str], longest: int
) -> Problem:
    """The split is the same for every engine and seed."""
    order = sorted(tasks, key=lambda task: task.id)
    random.Random(f"split-{name}").shuffle(order)  # a reproducible order
    return Problem(
        name,
        seed,
        parts,
        tuple(order[:SEARCH]),
        tuple(order[SEARCH : SEARCH + EVALUATION]),
        question,
        longest,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {"capital": capitals, "reviews": reviews}
