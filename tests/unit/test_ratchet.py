"""The `ratchet` command: every mounted command exists, and asking for one imports only its own package."""

import importlib
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import ratchet


@pytest.mark.parametrize("name", ratchet.COMMANDS)
def test_every_command_is_there_and_explains_itself(name: str) -> None:
    result = CliRunner().invoke(ratchet.app, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output


def test_mounted_names_are_commands_or_groups() -> None:
    for module, attribute in ratchet.COMMANDS.values():
        found = getattr(importlib.import_module(module), attribute)
        assert isinstance(found, typer.Typer) or callable(found)


def test_an_unknown_command_is_bad_input() -> None:
    result = CliRunner().invoke(ratchet.app, ["serv"])
    assert result.exit_code == 2


def test_reading_help_of_serve_imports_neither_the_optimizer_nor_anything_heavy() -> None:
    code = (
        "import sys, ratchet\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(ratchet.app, ['serve', '--help']).exit_code == 0\n"
        "heavy = {'optimize', 'torch', 'litellm', 'duckdb', 'numpy', 'aiohttp'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
