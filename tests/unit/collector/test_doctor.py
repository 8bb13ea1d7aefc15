"""The doctor names what is wrong and how to mend it."""

import sys
from pathlib import Path

import pytest

from collector import doctor
from collector.doctor import Check, examine


def by_name(found: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in found}


def test_a_sound_installation_passes(tmp_path: Path) -> None:
    assert [check for check in examine(tmp_path) if check.ok is False] == []


def test_a_stranger_that_shadows_a_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proxy").mkdir()
    (tmp_path / "proxy" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "proxy", raising=False)
    check = by_name(examine(tmp_path))["package proxy"]
    assert check.ok is False
    assert str(tmp_path) in check.detail
    assert "shadows" in check.fix


def test_a_file_overwritten_by_another_distribution_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proxy").mkdir()
    (tmp_path / "proxy" / "app.py").write_text("somebody else's\n")

    class Installed:
        def read_text(self, name: str) -> str:
            return "proxy/app.py,sha256=AAAA,16\nproxy/__pycache__/app.pyc,,\n"

        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    monkeypatch.setattr(doctor.importlib.metadata, "distribution", lambda name: Installed())
    (check,) = doctor._record()
    assert check.ok is False
    assert "proxy/app.py" in check.detail


@pytest.mark.parametrize(("version", "ok"), [("1.82.7", False), ("1.107.3", False), ("1.106.2", True)])
def test_a_compromised_litellm_is_refused(version: str, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: version)
    (check,) = doctor._litellm()
    assert check.ok is ok


def test_every_failed_check_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "proxy" else _spec(name))
    failed = [check for check in doctor._packages() if check.ok is False]
    assert failed
    assert all(check.fix for check in failed)


def _spec(name: str) -> object:
    import importlib.machinery

    return importlib.machinery.PathFinder.find_spec(name) or importlib.machinery.ModuleSpec(name, None, origin=__file__)
