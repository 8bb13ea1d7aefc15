"""ARCHITECTURE.md tells the truth: the files and the tests that it names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "ARCHITECTURE.md").read_text()


def test_every_invariant_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    defined = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert len(re.findall(r"^\| \d+ \|", PAGE, re.MULTILINE)) == 10
    assert named - defined == set()


def test_every_file_it_names_exists() -> None:
    ours = {path.name for package in ("proxy", "collector", "optimize") for path in (ROOT / package).rglob("*")}
    named = {name.rpartition("/")[2] for name in re.findall(r"`([\w/]+\.(?:py|sql))`", PAGE)}
    assert named - ours - {"ratchet.py"} == set()


def test_every_dependency_is_justified() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[^a-zA-Z0-9-]", line, maxsplit=1)[0].lower() for line in project["dependencies"]}
    for extra in ("engine", "demo", "rl"):
        lines = project["optional-dependencies"][extra]
        needed |= {re.split(r"[^a-zA-Z0-9-]", line, maxsplit=1)[0].lower() for line in lines}
    assert {name for name in needed - {"agent-ratchet"} if name not in PAGE} == set()
