import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gateway import peers, process
from bench.gateway.load import Address
from bench.gateway.process import NotStarted, Target
from bench.gateway.stage import Stage, reason
from tests.fake_upstream import FakeUpstream, error_reply


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the installation would execute."""
    executed: list[list[str]] = []
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path)

    def quietly(command, folder):
        executed.append(list(command))
        if command[1:3] == ["-m", "venv"]:
            Path(command[3]).mkdir(exist_ok=True)

    monkeypatch.setattr(peers, "_quietly", quietly)
    return executed


@pytest.mark.parametrize("name", ["tensorzero", "portkey", "litellm"])
def test_a_peer_is_installed_once_in_an_environment_of_its_own(name, commands, tmp_path):
    peers.install(name)
    assert commands
    assert (tmp_path / f"bench-{name}").is_dir()
    before = len(commands)
    peers.install(name)
    assert len(commands) == before


def test_another_version_is_installed_anew(commands, monkeypatch):
    peers.install("tensorzero")
    monkeypatch.setitem(peers.INSTALLERS, "tensorzero", ("tensorzero==1.2.3",))
    before = len(commands)
    peers.install("tensorzero")
    assert "tensorzero==1.2.3" in commands[-1]
    assert len(commands) > before


def test_a_peer_that_cannot_be_installed_is_absent_with_the_installers_own_words(commands, monkeypatch):
    def refuse(command, folder):
        raise subprocess.CalledProcessError(1, command, stderr=b"looking\nERROR: No matching distribution\n")

    monkeypatch.setattr(peers, "_quietly", refuse)
    stage = Stage.__new__(Stage)
    stage.absent, stage.say = {}, lambda said: None
    assert stage.install(["floor", "litellm", "ours"]) == ["floor", "ours"]
    assert "No matching distribution" in stage.absent["litellm"]


def test_without_node_portkey_is_absent(commands, monkeypatch):
    def missing(command, folder):
        raise FileNotFoundError(2, "No such file or directory", command[0])

    monkeypatch.setattr(peers, "_quietly", missing)
    with pytest.raises(peers.Absent, match="npm is not installed"):
        peers.install("portkey")


def test_a_target_that_ends_at_its_start_is_reported_with_its_last_line(tmp_path):
    log = tmp_path / "log"
    code = "print('loading'); raise SystemExit('no such model')"
    started = process.running([sys.executable, "-c", code], log, os.sched_getaffinity(0))
    with started as running, pytest.raises(NotStarted) as raised:
        process.port_of(running, log)
    assert reason(raised.value) == "did not start: no such model"


def test_a_target_is_ready_when_it_answers_a_call_as_it_should():
    with FakeUpstream() as upstream:
        target = Target("one", Address(upstream.port))
        upstream.reply(error_reply(503))
        assert process.ask(target) is False
        assert process.ask(target) is True
        assert target.sent == 2
    assert process.ask(target) is False
    assert target.sent == 2
