from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.errors import BadInput, Conflict, NotFound, RatchetError
from collector.model import Version
from collector.registry import Registry, template_hash


def prompt(text: str, slot: str = "s", **fields: Any) -> Version:
    return Version(slot=slot, version=0, kind="prompt", hash=template_hash(text), created_ns=5, template=text, **fields)


def do(registry: Registry, events: list[Any]) -> list[Any]:
    for event, fields in events:
        registry.apply(event, fields)
    return events


def add(registry: Registry, text: str, slot: str = "s", **fields: Any) -> int:
    number, events = registry.add_version(prompt(text, slot, **fields))
    do(registry, events)
    return number


def live(registry: Registry, slot: str = "s") -> dict[str, float]:
    return next(row["live"] for row in registry.slots() if row["slot"] == slot)


def test_the_first_version_of_a_prompt_is_live_at_once() -> None:
    registry = Registry()
    assert add(registry, "a") == 1
    assert live(registry) == {"1": 1.0}
    assert [row["action"] for row in registry.log()] == ["initial"]
    assert registry.log()[0]["evidence"] == "initial"


def test_later_versions_are_not_live_until_promoted() -> None:
    registry = Registry()
    add(registry, "a")
    assert add(registry, "b") == 2
    assert live(registry) == {"1": 1.0}
    do(registry, registry.promote("s", 2, 1.0, 9, evidence="gate", job_id="j", note="better"))
    assert live(registry) == {"2": 1.0}
    assert registry.log()[-1] == {
        "revision": 2,
        "slot": "s",
        "action": "promote",
        "arms": {"2": 1.0},
        "ts_ns": 9,
        "evidence": "gate",
        "job_id": "j",
        "note": "better",
    }


def test_the_same_content_again_is_the_same_version() -> None:
    registry = Registry()
    assert [add(registry, text) for text in ("a", "b", "a", "b")] == [1, 2, 1, 2]
    assert registry.revision == 1


def test_traffic_below_one_is_shared_with_the_largest_other_arm() -> None:
    registry = Registry()
    for text in "abc":
        add(registry, text)
    do(registry, registry.promote("s", 2, 0.1, 1))
    assert live(registry) == {"2": 0.1, "1": 0.9}
    do(registry, registry.promote("s", 3, 0.25, 2))
    assert live(registry) == {"3": 0.25, "1": 0.75}
    do(registry, registry.promote("s", 3, 0.5, 2))
    assert live(registry) == {"3": 0.5, "1": 0.5}


def test_promoting_what_is_live_changes_nothing() -> None:
    registry = Registry()
    add(registry, "a")
    assert registry.promote("s", 1, 1.0, 1) == []
    with pytest.raises(Conflict, match="no other version"):
        registry.promote("s", 1, 0.5, 1)


def test_rollbacks_walk_back_through_the_promotes() -> None:
    registry = Registry()
    for text in "abc":
        add(registry, text)
    do(registry, registry.promote("s", 2, 1.0, 1))
    do(registry, registry.promote("s", 3, 0.5, 2))
    do(registry, registry.rollback("s", 3))
    assert live(registry) == {"2": 1.0}
    do(registry, registry.rollback("s", 4))
    assert live(registry) == {"1": 1.0}
    with pytest.raises(Conflict, match="nothing to roll back"):
        registry.rollback("s", 5)
    assert [row["action"] for row in registry.log("s")] == ["initial", "promote", "promote", "rollback", "rollback"]


@pytest.mark.parametrize("traffic", [0, -0.1, 1.1, float("nan"), float("inf"), True])
def test_traffic_is_a_share(traffic: float) -> None:
    registry = Registry()
    add(registry, "a")
    with pytest.raises(BadInput) as caught:
        registry.promote("s", 1, traffic, 1)
    assert caught.value.param == "traffic"


@pytest.mark.parametrize("name", ["", "a b", "a/b", "ä", "x" * 65, "a@1", "."])
def test_slot_names_are_plain(name: str) -> None:
    with pytest.raises(BadInput) as caught:
        Registry().add_version(prompt("a", name))
    assert caught.value.param == "slot"
    with pytest.raises(BadInput):
        Registry().add_candidate(name, "t", 1)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"parent": 7}, "parent"),
        ({"match": {"colour": "red"}}, "match"),
        ({"match": {"role": "assistant"}}, "match.role"),
        ({"match": {"model": ""}}, "match"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], param: str) -> None:
    registry = Registry()
    add(registry, "a")
    with pytest.raises(BadInput) as caught:
        registry.add_version(prompt("b", **fields))
    assert caught.value.param == param


def test_a_prompt_needs_text_and_an_adapter_needs_files() -> None:
    with pytest.raises(BadInput, match="template"):
        Registry().add_version(prompt(""))
    with pytest.raises(BadInput, match="base_model"):
        Registry().add_version(Version(slot="s", version=0, kind="adapter", hash="h", created_ns=1))


def test_a_slot_holds_one_kind_and_adapters_wait_for_a_promote() -> None:
    registry = Registry()
    adapter = Version(slot="q", version=0, kind="adapter", hash="h", created_ns=1, base_model="m", path="/p")
    number, events = registry.add_version(adapter)
    do(registry, events)
    assert (number, live(registry, "q")) == (1, {})
    with pytest.raises(Conflict, match="adapter"):
        add(registry, "a", "q")
    with pytest.raises(Conflict, match="adapter"):
        registry.add_candidate("q", "t", 1)
    with pytest.raises(Conflict):
        registry.promote("q", 1, 0.5, 1)


def test_candidates_are_kept_apart_from_versions() -> None:
    registry = Registry()
    candidate, events = registry.add_candidate("s", "try this", 1)
    do(registry, events)
    assert candidate == "c-" + template_hash("try this")
    assert registry.add_candidate("s", "try this", 2) == (candidate, [])
    assert registry.candidate("s", candidate) == "try this"
    assert "s" not in registry.snapshot()["slots"], "nothing of it can be served unpinned"
    assert registry.revision == 0
    with pytest.raises(NotFound):
        registry.candidate("s", "c-other")
    with pytest.raises(BadInput):
        registry.add_candidate("s", "", 1)


def test_unknown_things_are_not_found() -> None:
    registry = Registry()
    with pytest.raises(NotFound, match="there are none yet"):
        registry.versions("s")
    add(registry, "a")
    for version in (0, 2, -1):
        with pytest.raises(NotFound):
            registry.version("s", version)
    with pytest.raises(NotFound, match="known: s"):
        registry.promote("t", 1, 1.0, 1)


def test_the_snapshot_has_what_a_proxy_needs() -> None:
    registry = Registry()
    add(registry, "a", match={"model": "gpt", "role": "system"})
    before = registry.snapshot()
    add(registry, "b")
    after = registry.snapshot()
    assert after == {
        "revision": 1,
        "serial": 3,
        "slots": {
            "s": {
                "kind": "prompt",
                "match": {"model": "gpt", "role": "system"},
                "versions": [
                    {"version": 1, "hash": template_hash("a"), "template": "a"},
                    {"version": 2, "hash": template_hash("b"), "template": "b"},
                ],
            }
        },
        "log": [{"revision": 1, "slot": "s", "action": "initial", "ts_ns": 5, "arms": {"1": 1.0}}],
        "keys": [],
        "keyed": False,
    }
    assert len(before["slots"]["s"]["versions"]) == 1, "a snapshot given away does not change"


def test_a_slot_whose_first_deployment_was_lost_gets_it_again() -> None:
    registry = Registry()
    for slot in ("s", "t"):
        _, events = registry.add_version(prompt("a", slot))
        do(registry, events[:1])
    assert live(registry) == {}
    do(registry, registry.missing_initial(7))
    assert live(registry, "s") == live(registry, "t") == {"1": 1.0}
    assert registry.revision == 2
    assert registry.missing_initial(8) == []


def test_adding_to_a_slot_without_a_deployment_deploys_its_first_version() -> None:
    registry = Registry()
    _, events = registry.add_version(prompt("a"))
    do(registry, events[:1])
    assert add(registry, "b") == 2
    assert live(registry) == {"1": 1.0}


COMMANDS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("st"), st.sampled_from("abcd")),
        st.tuples(st.just("promote"), st.sampled_from("st"), st.integers(1, 4), st.sampled_from([0.25, 0.5, 1.0])),
        st.tuples(st.just("rollback"), st.sampled_from("st")),
        st.tuples(st.just("candidate"), st.sampled_from("st"), st.sampled_from("ab")),
    ),
    max_size=25,
)


def run(registry: Registry, command: Any) -> list[Any]:
    try:
        if command[0] == "add":
            return do(registry, registry.add_version(prompt(command[2], command[1]))[1])
        if command[0] == "promote":
            return do(registry, registry.promote(command[1], command[2], command[3], 1))
        if command[0] == "candidate":
            return do(registry, registry.add_candidate(command[1], command[2], 1)[1])
        return do(registry, registry.rollback(command[1], 1))
    except RatchetError:
        return []


@given(COMMANDS)
def test_folding_the_events_again_gives_the_same_registry(commands: list[Any]) -> None:
    registry = Registry()
    events = [event for command in commands for event in run(registry, command)]
    order = {"version": 0, "candidate": 1, "deployment": 2}
    by_table = sorted(events, key=lambda event: (order[event[0]], event[1].get("revision", 0)))
    for replay in (events, by_table, [*events, *events]):
        again = Registry(replay)
        assert {**again.snapshot(), "serial": 0} == {**registry.snapshot(), "serial": 0}
        assert again.slots() == registry.slots()


@given(COMMANDS)
def test_arms_are_shares_of_known_versions(commands: list[Any]) -> None:
    registry = Registry()
    for command in commands:
        run(registry, command)
        for slot in registry.slots():
            if slot["live"]:
                assert sum(slot["live"].values()) == pytest.approx(1.0)
                assert all(1 <= int(version) <= slot["versions"] for version in slot["live"])
    assert [row["revision"] for row in registry.log()] == list(range(1, registry.revision + 1))
