"""Keys: a secret is told once and kept nowhere, and what the journal says of them is what a next start knows."""

import json
from pathlib import Path

import pytest

from collector.client import Local
from collector.errors import BadInput, Conflict, NotFound
from collector.keys import Keys, check_limits
from collector.service import Collector
from tests.unit.collector.rows import settings
from tests.unit.collector.serving import served


def made(keys: Keys, name: str = "bot", **limits: float) -> tuple[str, str]:
    secret, key, events = keys.create(name, ("agent",), limits, 5)
    for _, fields in events:
        keys.apply(fields)
    return secret, key.key_id


def test_the_secret_is_in_no_event_and_no_list() -> None:
    keys = Keys()
    secret, key, events = keys.create("bot", ("agent", "reward"), {"concurrent": 2}, 5)
    assert len(secret) > 64
    assert secret not in json.dumps(events)
    keys.apply(events[0][1])
    assert keys.listed()[0]["limits"] == {"concurrent": 2}
    assert key.key_sha256 not in json.dumps(keys.listed())
    assert keys.in_force()[0]["key_sha256"] == key.key_sha256


def test_no_two_secrets_are_alike() -> None:
    keys = Keys()
    assert len({made(keys, f"k{n}")[0] for n in range(50)}) == 50


def test_a_revoked_key_is_listed_but_not_in_force_and_keys_stay_required() -> None:
    keys = Keys()
    _, key_id = made(keys)
    for _, fields in keys.revoke("bot", 9)[1]:
        keys.apply(fields)
        keys.apply(fields)
    assert keys.in_force() == []
    assert keys.listed()[0]["revoked_ns"] == 9
    assert keys.any
    assert keys.revoke(key_id, 10)[1] == []


def test_a_name_is_free_again_once_its_key_is_revoked() -> None:
    keys = Keys()
    _, first = made(keys)
    with pytest.raises(Conflict):
        keys.create("bot", ("agent",), {}, 6)
    keys.apply(keys.revoke(first, 7)[1][0][1])
    _, second = made(keys)
    assert keys.revoke("bot", 8)[0].key_id == second


@pytest.mark.parametrize(("name", "scopes"), [("", ("agent",)), ("a\nb", ("agent",)), ("a", ()), ("a", ("root",))])
def test_a_key_without_a_sound_name_and_scope_is_refused(name: str, scopes: tuple[str, ...]) -> None:
    with pytest.raises(BadInput):
        Keys().create(name, scopes, {}, 1)


@pytest.mark.parametrize("limits", [{"rpm": 1}, {"concurrent": 0}, {"concurrent": 1.5}, {"usd_total": float("nan")}])
def test_a_limit_that_means_nothing_is_refused_by_its_name(limits: dict[str, float]) -> None:
    with pytest.raises(BadInput, match=f"limits.{next(iter(limits))}"):
        check_limits(limits)


def test_an_unknown_key_cannot_be_revoked() -> None:
    with pytest.raises(NotFound):
        Keys().revoke("nobody", 1)


def test_keys_survive_a_restart_and_a_store_made_anew(tmp_path: Path) -> None:
    local = Local(config=settings(tmp_path))
    one = local.create_key("one", scopes=["agent"], limits={"usd_per_day": 0.5})
    two = local.create_key("two")
    local.revoke_key("one")
    local.close()
    assert (one["first"], two["first"], two["scopes"]) == (True, False, ["agent", "reward"])
    (tmp_path / "ratchet.duckdb").unlink()
    local = Local(config=settings(tmp_path))
    found = local.keys()
    assert [(key["name"], key["revoked_ns"] is None) for key in found["keys"]] == [("one", False), ("two", True)]
    assert found["required"]
    assert [key["key_id"] for key in local.snapshot()["keys"]] == [two["key_id"]]
    local.close()
    secrets = (one["key"].encode(), two["key"].encode())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 2
    assert not [path for path in files for secret in secrets if secret in path.read_bytes()]


def test_the_api_makes_lists_and_revokes_and_wakes_whoever_waits(tmp_path: Path) -> None:
    from collector.client import Remote

    collector = Collector(settings(tmp_path))
    try:
        with served(collector) as transport:
            remote = Remote("http://collector", transport=transport)
            before = collector.snapshot()["serial"]
            key = remote.create_key("bot", limits={"concurrent": 3})
            assert collector.snapshot()["serial"] == before + 1
            assert key["key"].startswith("sk-")
            with pytest.raises(BadInput, match="scopes"):
                remote.create_key("other", scopes=["root"])
            with pytest.raises(BadInput, match="speed"):
                remote.create_key("other", limits={"speed": 1})
            assert remote.revoke_key(key["key_id"])["revoked_ns"] > 0
            assert remote.keys()["keys"][0]["name"] == "bot"
            remote.close()
    finally:
        collector.close()
