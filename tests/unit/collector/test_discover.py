import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from collector import discover, template
from collector.align import Skeleton, common, tokens
from collector.client import Local, Remote
from collector.discover import Proposal, Sample, propose
from collector.discover_cli import slots_app
from collector.errors import BadInput, Conflict, NotFound
from tests.unit.collector.rows import call, settings, write
from tests.unit.collector.serving import served

CITIES = ["Paris", "Rome", "New York City", "São Paulo", "Lima", "Oslo"]
WORDS = st.lists(st.sampled_from(["a", "b", "c", " ", "\n", ",", "{", "}", "x1"]), max_size=30)


def samples(texts: list[str], role: str = "system") -> list[Sample]:
    return [Sample(role, text, "m", f"s{index}") for index, text in enumerate(texts)]


def guide(city: str, day: int) -> str:
    return f'You are a guide to {city}.\nDate: 2026-11-{day:02d}\nAnswer about {city} only, as JSON: {{"city": 1}}.'


def holds(proposal: Proposal, texts: list[str]) -> None:
    """The proposal gives back each text, byte for byte."""
    for text in texts:
        values = template.invert(proposal.template, text)
        assert values is not None
        assert template.render(proposal.template, values) == text


@given(WORDS, WORDS)
def test_common_runs_are_equal_ascending_and_apart(one: list[str], other: list[str]) -> None:
    end = other_end = 0
    for a, b, length in common(one, other):
        assert length > 0
        assert a >= end
        assert b >= other_end
        assert one[a : a + length] == other[b : b + length]
        end, other_end = a + length, b + length


@given(st.text())
def test_tokens_join_to_the_text(text: str) -> None:
    assert "".join(tokens(text)) == text


@given(st.lists(WORDS, min_size=1, max_size=5))
def test_a_skeletons_literals_stand_in_every_text_in_order(texts: list[list[str]]) -> None:
    skeleton = Skeleton.of(texts[0])
    for words in texts[1:]:
        skeleton = skeleton.meet(Skeleton.of(words))
    first, *rest = skeleton.literals()
    for words in texts:
        text = "".join(words)
        assert text.startswith(first)
        at = len(first)
        for literal in rest:
            at = text.index(literal, at) + len(literal)
        assert text.endswith(rest[-1] if rest else first)


def test_aligning_looks_at_each_token_a_bounded_number_of_times() -> None:
    class Counted(list[str]):
        looks = 0

        def __getitem__(self, key: Any) -> Any:
            Counted.looks += len(range(*key.indices(len(self)))) if isinstance(key, slice) else 1
            return super().__getitem__(key)

    def looks(size: int) -> float:
        rng = random.Random(3)
        one = [f"w{rng.randrange(size)}" for _ in range(size)]
        other = [word if rng.random() < 0.9 else f"v{rng.randrange(size)}" for word in one]
        Counted.looks = 0
        common(Counted(one), Counted(other))
        return Counted.looks / size

    assert looks(16_000) < 2 * looks(2_000)


def test_literals_and_variables_are_told_apart_and_named() -> None:
    texts = [guide(city, day) for city in CITIES for day in (1, 9, 17)]
    (found,) = propose(samples(texts))
    assert found.template == (
        'You are a guide to {value}.\nDate: 2026-11-{number}\nAnswer about {value} only, as JSON: {"city": 1}.'
    )
    assert (found.calls, found.texts, found.models, found.role) == (18, 18, ["m"], "system")
    assert set(found.variables["value"]) <= set(CITIES)
    holds(found, texts)
    assert template.invert(found.template, guide("Ulan Bator", 3)) == {"value": "Ulan Bator", "number": "03"}


def test_labels_and_tags_name_the_variables() -> None:
    names = ["Ann", "Bob", "Cid", "Dan Doe"]
    texts = [f"Help the customer.\nName: {name}\n<order_id>{n}</order_id>\nBe kind." for n, name in enumerate(names)]
    (found,) = propose(samples(texts))
    assert found.template == "Help the customer.\nName: {name}\n<order_id>{order_id}</order_id>\nBe kind."


def test_a_long_context_is_one_variable_however_little_of_the_text_is_literal() -> None:
    rng = random.Random(5)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(900)] + ["the", "of", "and"] * 40
    texts = [
        f"Use the context to answer.\n<context>\n{' '.join(rng.choices(words, k=150))}\n</context>\nCite sources."
        for _ in range(80)
    ]
    (found,) = propose(samples(texts))
    assert found.template == "Use the context to answer.\n<context>\n{context}\n</context>\nCite sources."
    assert found.texts == 80


def test_prompts_that_only_begin_alike_stay_apart() -> None:
    prompts = ["You are a helpful assistant. Be brief.", "You are a helpful assistant. Answer in French, with tools."]
    assert {(one.template, one.calls) for one in propose(samples(prompts * 30))} == {(text, 30) for text in prompts}


def test_what_is_known_rare_masked_or_says_nothing_is_not_proposed() -> None:
    texts = [guide(city, 1) for city in CITIES]
    (found,) = propose(samples(texts))
    assert propose(samples(texts), [found.template]) == []
    once = ["Only one call ever sent this prompt."]
    assert [one.template for one in propose(samples(once))] == once
    assert propose(samples(once), least_calls=2) == propose(samples(once, "user")) == []
    assert propose(samples(["Your key is [redacted], my dear friend."] * 3)) == []
    assert propose(samples(["", " ", "hi", "hi"])) == []


def test_roles_are_kept_apart() -> None:
    texts = [guide(city, 1) for city in CITIES]
    both = propose([*samples(texts), *samples(texts, "user")])
    assert sorted(one.role for one in both) == ["system", "user"]
    assert len({one.proposal for one in both}) == 2


PIECES = st.text(alphabet="abc \n{}:,.é<>", max_size=12)


@given(st.lists(st.text(alphabet="abcdefghij :\n{}.", min_size=14, max_size=40), min_size=1, max_size=3), st.data())
def test_a_proposal_gives_back_every_text_that_it_stands_for(literals: list[str], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.lists(PIECES, min_size=3, max_size=3), min_size=2, max_size=8))
    texts = ["".join(part for pair in zip(literals, row, strict=False) for part in pair) + literals[0] for row in rows]
    left = set(texts)
    for found in propose(samples(texts), least_calls=1):
        mine = {text for text in left if template.invert(found.template, text) is not None}
        assert len(mine) >= found.texts
        assert set(found.variables) == set(template.variables(found.template))
        left -= mine


@given(st.lists(st.text(alphabet="ab {}\n", max_size=60), max_size=12))
def test_any_texts_are_survived(texts: list[str]) -> None:
    for found in propose(samples(texts), least_calls=1):
        assert sum(template.invert(found.template, text) is not None for text in set(texts)) >= found.texts


def test_prompts_are_read_from_any_messages() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "image_url"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": parts},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "second"},
        "odd",
        {"role": "system", "content": None},
    ]
    rows = [{"span_id": "s", "request_model": "m", "input_messages": given} for given in (messages, None, {"a": 1})]
    assert [(one.role, one.text) for one in discover.read(rows)] == [
        ("developer", "one"),
        ("developer", "two"),
        ("user", "first"),
    ]


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    def chat(number: int, text: str, **more: Any) -> Any:
        messages = [
            {"role": "system", "content": text},
            {"role": "user", "content": f"question number {number} {text}"},
        ]
        return call(number, input_messages=json.dumps(messages), **more)

    mine = [chat(n, guide(CITIES[n % 6], n % 28 + 1)) for n in range(40)]
    served = [chat(n, "You are known already.", prompt_slot="known", prompt_version=1) for n in range(40, 45)]
    write(tmp_path, *mine, *served)
    client = Local(tmp_path, settings(tmp_path))
    yield client
    client.close()


def test_an_adopted_proposal_is_a_slot_whose_first_version_is_live(local: Local) -> None:
    found = local.discover()
    assert (found["sampled"], found["calls"]) == (40, 40)
    assert local.stats()["unknown_prompts"] == 40
    best = next(one for one in found["proposals"] if one["role"] == "system")
    made = local.adopt("guide", proposal=best["proposal"])
    assert (made["slot"], made["version"]) == ("guide", 1)
    assert local.version("guide", 1)["template"] == best["template"]
    assert local.slots()[0]["live"] == {"1": 1.0}
    assert best["proposal"] not in {one["proposal"] for one in local.discover()["proposals"]}
    with pytest.raises(Conflict, match="there already"):
        local.adopt("guide", template="Another text.")


def test_a_proposal_is_found_again_by_its_id(local: Local) -> None:
    ident = local.discover()["proposals"][0]["proposal"]
    local.collector._proposals.clear()
    assert local.adopt("again", proposal=ident)["version"] == 1


def test_a_user_prompt_is_adopted_for_users_messages_only(local: Local) -> None:
    user = next(one for one in local.discover()["proposals"] if one["role"] == "user")
    local.adopt("asked", proposal=user["proposal"])
    assert local.version("asked", 1)["match"] == {"role": "user"}


def test_what_can_not_be_adopted_is_refused_by_name(local: Local) -> None:
    with pytest.raises(NotFound, match="p-unknown"):
        local.adopt("s", proposal="p-unknown")
    with pytest.raises(BadInput, match="exactly one"):
        local.adopt("s")
    with pytest.raises(BadInput, match="slot name"):
        local.adopt("not a name", template="x")
    with pytest.raises(BadInput, match="sample"):
        local.discover(sample=0)


def test_the_api_discovers_and_adopts(local: Local) -> None:
    with served(local.collector) as transport:
        remote = Remote("http://collector", transport=transport)
        found = remote.discover(sample=30, least_calls=1)
        assert found["sampled"] == 30
        made = remote.adopt("guide", proposal=found["proposals"][0]["proposal"], note="mined")
        assert remote.version("guide", made["version"])["note"] == "mined"
        with pytest.raises(BadInput, match="exactly one"):
            remote.adopt("other", proposal="p-1", template="x")
        remote.close()


def test_the_commands_discover_and_adopt(local: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local.close()
    monkeypatch.setattr("collector.settings.DEFAULT_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("RATCHET_URL", raising=False)
    monkeypatch.setenv("RATCHET_DATA_DIR", str(tmp_path))
    runner = CliRunner()
    shown = runner.invoke(slots_app, ["discover"])
    assert shown.exit_code == 0, shown.output
    assert "You are a guide to {value}." in shown.output
    ident = json.loads(runner.invoke(slots_app, ["discover", "--json"]).stdout)["proposals"][0]["proposal"]
    assert json.loads(runner.invoke(slots_app, ["adopt", ident, "--slot", "guide", "--json"]).stdout)["version"] == 1
    file = tmp_path / "t.txt"
    file.write_text("A prompt for {name}, from a file.")
    done = runner.invoke(slots_app, ["adopt", "--template", str(file), "--slot", "filed"])
    assert (done.exit_code, "filed@1" in done.output) == (0, True)
    refused = [["adopt", "--slot", "s"], ["adopt", "p-1", "--slot", "s"], ["adopt", "--template", "/no", "--slot", "s"]]
    assert [runner.invoke(slots_app, arguments).exit_code for arguments in refused] == [2, 1, 2]
