from pathlib import Path
from typing import Any

import pytest
import yaml

from collector.errors import ConfigError
from collector.settings import Settings, load


def written(tmp_path: Path, tree: Any) -> Path:
    path = tmp_path / "ratchet.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def test_without_anything_the_defaults_hold() -> None:
    assert load(environ={}) == Settings()
    assert Settings().upstream.default == "https://api.openai.com/v1"


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, {"store": {"data_dir": "from-file"}, "server": {"port": 1}})
    assert load(path, environ={}).store.data_dir == Path("from-file")
    env = {"RATCHET_DATA_DIR": "from-env", "RATCHET_CONFIG": str(path)}
    assert load(environ=env).store.data_dir == Path("from-env")
    assert load(environ=env).server.port == 1
    found = load(path, {"store.data_dir": "from-flag", "server.port": None}, env)
    assert (found.store.data_dir, found.server.port) == (Path("from-flag"), 1)


@pytest.mark.parametrize(
    ("tree", "param", "word"),
    [
        ({"servr": {}}, "servr", "`server`"),
        ({"server": {"prot": 1}}, "server.prot", "`server.port`"),
        ({"store": {"redaction": {"email": True}}}, "store.redaction.email", "`store.redaction.emails`"),
        ({"slots": {"a": {"tmplate": "x", "template": "y"}}}, "slots.a.tmplate", "template"),
        ({"gate": {"xyzzy": 1}}, "gate.xyzzy", "known here"),
        ({"server": {"port": 70000}}, "server.port", "65535"),
        ({"server": {"host": "0.0.0.0"}}, None, "needs at least one key"),
        ({"server": {"keys": [{"name": "a"}]}}, "server.keys.0", "exactly one"),
        ({"server": {"keys": [{"name": "a", "key": " "}]}}, "server.keys.0", "empty"),
        ({"server": {"keys": [{"name": "a", "key_sha256": "ab"}]}}, "server.keys.0.key_sha256", "pattern"),
        ({"upstream": {"default": "api.openai.com"}}, "upstream.default", "http://"),
        ({"model_list": [{"model_name": "a", "litellm_params": {}}]}, "model_list.0.litellm_params", "`model`"),
        ({"store": {"collector": "collector:4000"}}, "store.collector", "http://"),
        (
            {"store": {"collector": "http://u:hunter2@c", "collector_key": "k"}},
            "store.collector",
            "store.collector_key",
        ),
        ({"store": {"collector": "http://u:hun#ter2@c"}}, "store.collector", "no user and password"),
        ({"store": {"collector": "http://u:hun/ter2@c"}}, "store.collector", "no user and password"),
        ({"store": {"collector": "http://c", "url": "clickhouse://h/d"}}, "store", "`url` belongs"),
        ({"server": {"host": "os.environ/NOT_SET"}}, "server.host", "NOT_SET is not set"),
        ({"server": {"allowed_hosts": ["os.environ/NOT_SET"]}}, "server.allowed_hosts.0", "NOT_SET"),
        ("- a\n- b\n", "config", "mapping"),
        ("a: [", "config", "YAML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, tree: Any, param: str | None, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, tree), environ={})
    assert caught.value.param == param
    assert word in caught.value.message
    assert "ter2" not in caught.value.message, "the password"


def test_a_missing_file_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "none.yaml", environ={})


def test_values_can_come_from_the_environment(tmp_path: Path) -> None:
    tree = {"model_list": [{"model_name": "a", "litellm_params": {"model": "openai/x", "api_key": "os.environ/KEY"}}]}
    found = load(written(tmp_path, tree), environ={"KEY": "secret"})
    assert found.model_list[0].litellm_params["api_key"] == "secret"


def test_an_empty_file_or_section_means_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path, ""), environ={}) == Settings()
    assert load(written(tmp_path, "server:\nstore:\n"), environ={}) == Settings()


def test_settings_travel_as_json() -> None:
    found = Settings.model_validate({"slots": {"a": {"template": "x", "match": {"role": "user"}}}})
    assert Settings.model_validate_json(found.model_dump_json()) == found


def test_what_shows_settings_shows_no_password() -> None:
    found = Settings.model_validate({"store": {"collector": "http://c/v1", "collector_key": "the-secret"}})
    assert found.store.collector == "http://c"
    assert "the-secret" not in repr(found)
    assert Settings.model_validate_json(found.model_dump_json()) == found


def test_off_loopback_with_a_key_is_fine() -> None:
    key = {"name": "team", "key_sha256": "0" * 64, "scopes": ["agent", "admin"]}
    assert not Settings.model_validate({"server": {"host": "0.0.0.0", "keys": [key]}}).server.loopback
