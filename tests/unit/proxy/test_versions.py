import asyncio
import math
from pathlib import Path
from typing import Any

import orjson
import pytest

from collector.errors import Unavailable
from proxy import slots
from proxy.dialects.base import Prompt
from proxy.versions import Snapshot, Versions, build
from tests.unit.proxy.harness import Registry


def registry(*templates: str, **more: Any) -> Registry:
    made = Registry()
    made.add("s", *templates, **more)
    return made


def test_arms_are_dealt_by_share_and_always_the_same_to_an_episode() -> None:
    made = registry("a", "b")
    made.promote("s", {"2": 0.25, "1": 0.75})
    snapshot = build(made.snapshot())
    dealt = [snapshot.assign(f"episode-{n}", 2)["s"] for n in range(4000)]
    assert dealt == [snapshot.assign(f"episode-{n}", 2)["s"] for n in range(4000)]
    share = sum(choice.version == 2 for choice in dealt) / 4000
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    assert {choice.propensity for choice in dealt} == {0.25, 0.75}


def test_an_episode_is_dealt_what_was_in_force_at_its_revision() -> None:
    made = registry("a", "b")
    made.promote("s", {"2": 1.0})
    snapshot = build(made.snapshot())
    assert snapshot.assign("e", 0) == {}
    assert snapshot.assign("e", 1)["s"] == (1, 1.0)
    assert snapshot.assign("e", 2)["s"] == (2, 1.0)
    assert snapshot.assign("e", 99)["s"] == (2, 1.0)


def test_a_version_without_share_is_never_dealt() -> None:
    made = registry("a", "b")
    made.promote("s", {"1": 0.0, "2": 1.0})
    snapshot = build(made.snapshot())
    assert {snapshot.assign(str(n), 2)["s"].version for n in range(500)} == {2}


def test_adapters_are_no_prompts() -> None:
    raw = registry("a").snapshot()
    version = {"version": 1, "path": "p", "base_model": "gemma", "hash": "0123456789ab"}
    raw["slots"]["lora"] = {"kind": "adapter", "match": {}, "versions": [version]}
    assert set(build(raw).slots) == {"s"}
    assert build(raw).adapters["lora"].texts == {1: "lora@1-0123456789ab"}


def match(made: Registry, text: str, role: str = "system", model: str | None = "m", **how: Any) -> list[Any]:
    found = slots.find(build(made.snapshot()), [Prompt(role, text, ("x",))], model, **how)
    return [(one.known.slot, one.known.version, one.values) for one in found]


def test_a_prompt_is_matched_by_its_text_or_by_its_template() -> None:
    made = registry("Be brief.", "Answer in {language}, {name}.")
    assert match(made, "Be brief.") == [("s", 1, {})]
    assert match(made, "Answer in French, Ada.") == [("s", 2, {"language": "French", "name": "Ada"})]
    assert match(made, "Answer in French") == []
    assert match(made, "Be brief. ") == []


def test_match_rules_are_honoured() -> None:
    made = registry("Be brief.", match={"model": "m", "role": "user"})
    assert match(made, "Be brief.", role="system") == []
    assert match(made, "Be brief.", role="user", model="other") == []
    assert match(made, "Be brief.", role="user") == [("s", 1, {})]


def test_the_most_literal_template_wins() -> None:
    made = Registry()
    made.add("loose", "You are {x}")
    made.add("tight", "You are {x}, a helpful assistant")
    assert match(made, "You are Bob, a helpful assistant") == [("tight", 1, {"x": "Bob"})]


def test_a_template_of_variables_only_matches_nothing() -> None:
    assert match(registry("{anything}"), "Be brief.") == []


def test_slots_named_by_the_caller_are_the_only_ones_and_pinned_ones_win() -> None:
    made = Registry()
    made.add("one", "Be brief.")
    made.add("two", "Be brief.")
    assert match(made, "Be brief.") == [("one", 1, {})]
    assert match(made, "Be brief.", only={"two"}) == [("two", 1, {})]
    assert match(made, "Be brief.", only={"three"}) == []
    assert match(made, "Be brief.", prefer={"two"}) == [("two", 1, {})]


def test_several_prompts_of_a_call_can_be_of_several_slots() -> None:
    made = Registry()
    made.add("one", "Be brief.")
    made.add("two", "Question: {q}")
    prompts = [
        Prompt("user", "Question: why?", ("u",)),
        Prompt("system", "Be brief.", ("s",)),
        Prompt("system", "Be brief.", ("t",)),
    ]
    found = slots.find(build(made.snapshot()), prompts, None)
    assert sorted((one.known.slot, one.prompt.path) for one in found) == [("one", ("s",)), ("two", ("u",))]


def test_a_version_that_needs_an_unknown_variable_is_not_rendered() -> None:
    snapshot = build(registry("Hi {name}, be brief.").snapshot())
    (one,) = slots.find(snapshot, [Prompt("system", "Hi Ada, be brief.", ("x",))], None)
    assert slots.render(one, "Dear {name}!") == "Dear Ada!"
    assert slots.render(one, "Short.") == "Short."
    assert slots.render(one, "Dear {name} of {city}!") is None


def test_an_outage_leaves_the_last_snapshot_in_force_and_a_new_one_is_seen_after_it(tmp_path: Path) -> None:
    made = registry("a", "b")
    down = False

    async def fetch(after: int | None, seconds: float) -> dict[str, Any]:
        if down:
            raise ConnectionError("away")
        return await made.fetch(after, 0.01)

    async def scenario() -> None:
        nonlocal down
        versions = Versions(fetch, tmp_path / "cache.json")
        watch = asyncio.ensure_future(versions.watch())
        await versions.reach(1, 5)
        down = True
        await asyncio.sleep(0.1)
        made.promote("s", {"2": 1.0})
        assert (await versions.reach(2, 0.05)).revision == 1
        down = False
        assert (await versions.reach(2, 5)).revision == 2
        watch.cancel()

    asyncio.run(scenario())


def test_a_worker_boots_from_the_cache(tmp_path: Path) -> None:
    made = registry("a")

    async def scenario() -> Snapshot:
        versions = Versions(made.fetch, tmp_path / "cache.json")
        await versions.refresh()
        return versions.current

    taken = asyncio.run(scenario())
    again = Versions(made.fetch, tmp_path / "cache.json")
    again.load_cache()
    assert again.current == taken
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]


def test_the_collectors_word_counts_more_than_a_newer_cache(tmp_path: Path) -> None:
    """As after the journal was restored from a backup, or taken away: what it doesn't know isn't served."""
    ahead, behind = registry("a", "b"), registry("a")
    ahead.promote("s", {"2": 1.0})
    (tmp_path / "cache.json").write_bytes(orjson.dumps(ahead.snapshot()))

    async def scenario() -> None:
        versions = Versions(behind.fetch, tmp_path / "cache.json")
        versions.load_cache()
        assert versions.current.revision == 2
        await versions.refresh()
        assert versions.current == build(behind.snapshot())

    asyncio.run(scenario())


def test_polls_do_not_spin_while_the_collector_is_behind(tmp_path: Path) -> None:
    ahead, behind = registry("a", "b"), registry("a")
    ahead.promote("s", {"2": 1.0})
    asked = 0

    async def fetch(after: int | None, seconds: float) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return ahead.snapshot() if asked == 1 else behind.snapshot()

    async def scenario() -> None:
        versions = Versions(fetch, tmp_path / "cache.json")
        watch = asyncio.ensure_future(versions.watch())
        await versions.reach(2, 5)
        await asyncio.sleep(0.2)
        watch.cancel()
        assert asked <= 3

    asyncio.run(scenario())


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"revision": 1, "slots": {"s": {}}, "log": []}', b"7"])
def test_an_unsound_cache_is_passed_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cache.json").write_bytes(content)
    versions = Versions(registry("a").fetch, tmp_path / "cache.json")
    versions.load_cache()
    assert versions.current.revision == 0


def test_a_snapshot_older_than_ours_is_not_taken(tmp_path: Path) -> None:
    made = registry("a", "b")
    made.promote("s", {"2": 1.0})
    old = orjson.loads(orjson.dumps({**made.snapshot(), "revision": 1}))

    async def scenario() -> None:
        answers = [made.snapshot(), old]

        async def fetch(after: int | None, seconds: float) -> dict[str, Any]:
            return answers.pop(0)

        versions = Versions(fetch, tmp_path / "cache.json")
        await versions.refresh()
        await versions.refresh()
        assert versions.current.revision == 2

    asyncio.run(scenario())


def test_a_candidate_is_fetched_once_and_believed_only_by_its_hash(tmp_path: Path) -> None:
    made = registry("a")
    ident = made.candidate("s", "text")
    asked = []

    async def fetch_candidate(slot: str, candidate: str) -> str | None:
        asked.append(candidate)
        return "forged" if candidate == "c-000000000000" else await made.fetch_candidate(slot, candidate)

    async def scenario() -> None:
        versions = Versions(made.fetch, tmp_path / "c.json", fetch_candidate)
        assert [await versions.candidate("s", ident) for _ in range(3)] == ["text"] * 3
        assert await versions.candidate("s", "c-000000000000") is None
        assert await versions.candidate("other", ident) is None

    asyncio.run(scenario())
    assert asked == [ident, "c-000000000000", ident]


def test_a_refresh_without_collector_is_unavailable(tmp_path: Path) -> None:
    async def fetch(after: int | None, seconds: float) -> dict[str, Any]:
        raise ConnectionError("away")

    async def scenario() -> None:
        with pytest.raises(Unavailable, match="away"):
            await Versions(fetch, tmp_path / "c.json").refresh()

    asyncio.run(scenario())
