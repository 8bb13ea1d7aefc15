import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.errors import BadInput
from collector.rewards import FIELDS, LENGTHS, MAX_ITEMS, combine, parse

NOW = 1_800_000_000_000_000_000


def test_the_shortest_reward() -> None:
    (reward,) = parse({"episode_id": "ep-1", "value": 1}, NOW)
    assert (reward.target_kind, reward.target_id, reward.value, reward.name) == ("episode", "ep-1", 1.0, "reward")
    assert (reward.source, reward.ts_ns, reward.label) == ("code", NOW, None)
    assert reward.reward_id.startswith("rw-")


def test_every_field_is_kept() -> None:
    body = {
        "response_id": "chatcmpl-1",
        "value": -0.5,
        "name": "style",
        "label": "poor",
        "explanation": "too long",
        "source": "llm",
        "idempotency_key": "k",
        "timestamp": "2026-01-31T12:00:00.5+01:00",
    }
    (reward,) = parse(body, NOW)
    assert (reward.target_kind, reward.target_id, reward.value, reward.name) == (
        "response",
        "chatcmpl-1",
        -0.5,
        "style",
    )
    assert (reward.label, reward.explanation, reward.source) == ("poor", "too long", "llm")
    assert (reward.idempotency_key, reward.ts_ns) == ("k", 1_769_857_200_500_000_000)


def test_a_key_gives_the_same_id_and_no_key_another_one() -> None:
    def ids(**fields: Any) -> set[str]:
        return {parse({"span_id": "s", "value": 1, **fields}, NOW)[0].reward_id for _ in range(3)}

    assert len(ids(idempotency_key="k")) == 1
    assert len(ids()) == 3
    assert len(next(iter(ids(idempotency_key="k")))) == len(next(iter(ids()))) == 23


def test_arrays_are_parsed_in_order() -> None:
    assert [reward.value for reward in parse([{"trace_id": "t", "value": n} for n in range(5)], NOW)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"value": True}, "value"),
        ({"value": "1"}, "value"),
        ({"value": None}, "value"),
        ({"value": math.nan}, "value"),
        ({"value": math.inf}, "value"),
        ({"value": 10**400}, "value"),
        ({"episode_id": None}, "episode_id"),
        ({"span_id": "s"}, "span_id"),
        ({"episode_id": 7}, "episode_id"),
        ({"episode_id": ""}, "episode_id"),
        ({"name": ""}, "name"),
        ({"name": ["a"]}, "name"),
        ({"name": "x" * 129}, "name"),
        ({"label": "\ud800"}, "label"),
        ({"explanation": "x" * 65_537}, "explanation"),
        ({"idempotency_key": "x" * 257}, "idempotency_key"),
        ({"source": "dog"}, "source"),
        ({"source": ["code"]}, "source"),
        ({"timestamp": "yesterday"}, "timestamp"),
        ({"timestamp": "2026-01-31T12:00:00"}, "timestamp"),
        ({"timestamp": "1960-01-31T12:00:00Z"}, "timestamp"),
        ({"timestamp": True}, "timestamp"),
        ({"timestamp": -1}, "timestamp"),
        ({"timestamp": 1_769_857_200_000}, "timestamp"),
        ({"timestamp": math.nan}, "timestamp"),
        ({"timestamp": []}, "timestamp"),
        ({"reward": 1}, "reward"),
        ({"Value": 1}, "Value"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, Any], param: str) -> None:
    good = {"episode_id": "ep-1", "value": 1}
    for body, expected in (({**good, **change}, param), ([good, {**good, **change}], f"[1].{param}")):
        with pytest.raises(BadInput) as caught:
            parse(body, NOW)
        assert caught.value.param == expected
        assert expected in caught.value.message or "exactly one" in caught.value.message


@pytest.mark.parametrize("body", [None, 1, "x", [], [1], [None], [[]]])
def test_other_bodies_are_refused(body: Any) -> None:
    with pytest.raises(BadInput):
        parse(body, NOW)


def test_too_many_at_once_are_refused() -> None:
    with pytest.raises(BadInput, match="at most"):
        parse([{"episode_id": "e", "value": 1}] * (MAX_ITEMS + 1), NOW)


def test_secrets_in_texts_are_masked() -> None:
    secret = "sk-abcdefghijklmnop0123456789"
    (reward,) = parse({"episode_id": "e", "value": 1, "explanation": f"it leaked {secret}", "label": secret}, NOW)
    assert reward.explanation == "it leaked [redacted]"
    assert secret not in (reward.label or "")


@given(st.dictionaries(st.sampled_from([*FIELDS, "other"]), st.none() | st.booleans() | st.text() | st.floats()))
def test_whatever_comes_is_parsed_or_refused(body: dict[str, Any]) -> None:
    try:
        (reward,) = parse(body, NOW)
    except BadInput as error:
        assert error.param
        return
    assert math.isfinite(reward.value)
    assert sum(body.get(f"{kind}_id") is not None for kind in ("episode", "response", "span", "trace")) == 1
    assert all(len(body.get(name) or "") <= most for name, most in LENGTHS.items())


@given(st.floats(0, 4e9))
def test_unix_seconds_become_nanoseconds(seconds: float) -> None:
    (reward,) = parse({"episode_id": "e", "value": 1, "timestamp": seconds}, NOW)
    assert abs(reward.ts_ns - seconds * 1e9) <= 1000


def judged(value: float, ts_ns: int = 0, name: str = "reward", target: str = "e", identifier: str = "a") -> Any:
    return {
        "reward_id": identifier,
        "target_kind": "episode",
        "target_id": target,
        "name": name,
        "value": value,
        "ts_ns": ts_ns,
    }


def test_nothing_judged_is_none_not_zero() -> None:
    assert combine([], {"reward": 1.0}) is None
    assert combine([judged(1.0, name="other")], {"reward": 1.0}) is None
    assert combine([judged(0.0)], {"reward": 1.0}) == 0.0


def test_a_correction_replaces_what_it_corrects() -> None:
    assert combine([judged(1.0, 1), judged(0.25, 2)], {"reward": 1.0}) == 0.25
    assert combine([judged(1.0, 1, identifier="b"), judged(0.25, 1)], {"reward": 1.0}) == 1.0


def test_names_are_weighted_and_targets_are_summed() -> None:
    several = [judged(1.0), judged(0.5, target="step"), judged(2.0, name="style"), judged(9.0, name="unknown")]
    assert combine(several, {"reward": 1.0, "style": -0.25}) == 1.0


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3), st.sampled_from("ef"), st.uuids()), max_size=8),
    st.randoms(),
)
def test_the_order_of_arrival_does_not_matter(items: list[Any], random: Any) -> None:
    rewards = [judged(value, ts_ns, target=target, identifier=str(uuid)) for value, ts_ns, target, uuid in items]
    shuffled = list(rewards)
    random.shuffle(shuffled)
    assert combine(rewards, {"reward": 1.0}) == combine(shuffled, {"reward": 1.0})
