"""compose.yaml says what is true: Docker is not needed to see that every command, file, key and name in it exists."""

import re
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

import ratchet
from collector.settings import Settings, load
from proxy.auth import Guard

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("proxy", "collector")
VARIABLE = re.compile(r"\$\{(\w+):\?[^}]+\}")
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def environment(service: str) -> dict[str, str]:
    """What the service sees when each variable holds its own name."""
    return {name: VARIABLE.sub(r"\1", value) for name, value in SERVICES[service].get("environment", {}).items()}


def settings(service: str) -> Settings:
    """What the service reads at its start."""
    (mounted,) = [volume for volume in SERVICES[service]["volumes"] if "/etc/ratchet.yaml" in volume]
    source, target, mode = mounted.split(":")
    assert (target, mode) == (re.findall(r"RATCHET_CONFIG=(\S+)", DOCKERFILE)[0], "ro")
    return load(ROOT / source, environ={"RATCHET_DATA_DIR": "/data", **environment(service)})


def test_it_shows_proxies_a_collector_and_clickhouse() -> None:
    assert set(SERVICES) == {*OURS, "clickhouse"}
    assert SERVICES["proxy"]["deploy"]["replicas"] > 1
    for name in OURS:
        assert (ROOT / SERVICES[name]["build"] / "Dockerfile").exists()
        assert SERVICES[name]["image"] == SERVICES["proxy"]["image"], "one image does for both"


@pytest.mark.parametrize("service", OURS)
def test_each_configuration_is_one_that_the_server_takes(service: str) -> None:
    found = settings(service)
    assert not found.server.loopback
    assert all(grant.key in environment(service).values() for grant in found.server.keys)
    Guard(found.server).check_host({b"host": b"collector:4000"})
    assert str(found.store.data_dir) == "/data"


def test_the_image_s_own_configuration_serves_other_containers_too() -> None:
    found = load(ROOT / "configs" / "docker.yaml", environ={"RATCHET_KEY": "k"})
    Guard(found.server).check_host({b"host": b"ratchet:4000"})


def test_proxies_know_the_collector_and_the_collector_knows_them_and_its_database() -> None:
    proxy, collector = settings("proxy"), settings("collector")
    assert proxy.store.collector is not None
    target = urlsplit(proxy.store.collector)
    assert (target.hostname, target.port) == ("collector", collector.server.port)
    granted = {key.key: key.scopes for key in collector.server.keys}
    assert proxy.store.collector_key is not None
    assert "admin" in granted[proxy.store.collector_key.get_secret_value()]
    assert collector.store.collector is None
    assert collector.store.url is not None
    database, given = urlsplit(collector.store.url.get_secret_value()), environment("clickhouse")
    assert (database.hostname, database.port) == ("clickhouse", 8123)
    assert database.username == given["CLICKHOUSE_USER"]
    assert database.password == given["CLICKHOUSE_PASSWORD"]
    assert database.path == "/" + given["CLICKHOUSE_DB"]


def test_no_secret_is_in_the_file_and_none_has_a_default() -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search(r"KEY|PASSWORD|URL", name):
                assert VARIABLE.search(value), name


def test_volumes_and_dependencies_are_declared_and_waited_for_in_a_way_that_exists() -> None:
    named = {volume.split(":")[0] for one in SERVICES.values() for volume in one["volumes"] if re.match(r"\w", volume)}
    assert named == set(COMPOSE["volumes"])
    assert not [volume for volume in SERVICES["proxy"]["volumes"] if re.match(r"\w", volume)], "replicas share no data"
    for service in SERVICES.values():
        for name, needed in service.get("depends_on", {}).items():
            healthy = needed["condition"] == "service_healthy"
            assert not healthy or "healthcheck" in SERVICES[name]


def test_every_command_in_it_exists() -> None:
    commands = [service.get("command", ["serve"]) for name, service in SERVICES.items() if name in OURS]
    assert re.search(r'CMD \["serve"\]', DOCKERFILE)
    commented = (ROOT / "compose.yaml").read_text() + (ROOT / "configs/compose-collector.yaml").read_text()
    commands += [shlex.split(found)[:1] for found in re.findall(r"`ratchet ([^`…]+)", commented)]
    assert {command[0] for command in commands} <= set(ratchet.COMMANDS)
