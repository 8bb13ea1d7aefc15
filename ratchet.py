"""The `ratchet` command: mounts the commands of the three packages, importing a package only when it is asked for."""

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

# name -> (module, attribute); a Typer application is a group of commands, a function is one command.
COMMANDS = {
    "demo": ("optimize.demo", "demo"),
    "serve": ("proxy.cli", "serve"),
    "run": ("optimize.cli", "run"),
    "optimize": ("optimize.commands", "optimize_app"),
    "promote": ("collector.cli", "promote"),
    "rollback": ("collector.cli", "rollback"),
    "slots": ("collector.discover_cli", "slots_app"),
    "versions": ("collector.cli", "versions_app"),
    "episodes": ("optimize.credit_cli", "episodes_app"),
    "reward": ("collector.cli", "reward"),
    "query": ("collector.cli", "query"),
    "jobs": ("optimize.cli", "jobs_app"),
    "export": ("collector.transfer_cli", "export"),
    "import": ("collector.transfer_cli", "import_"),
    "store": ("collector.store_cli", "store_app"),
    "engine": ("optimize.rl.cli", "engine"),
    "keys": ("collector.key_cli", "keys_app"),
    "doctor": ("collector.doctor", "doctor"),
}


class Lazy(TyperGroup):
    """A group that imports a command's module when the command is looked up."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names in the order in which a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, or None for an unknown name (the group then suggests the nearest)."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name]
        found = getattr(importlib.import_module(module), attribute)
        if isinstance(found, typer.Typer):
            command: Any = typer.main.get_group(found)
        else:
            single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            # A reward may be negative: `-1` is a number there, not an option.
            settings = {"ignore_unknown_options": True} if cmd_name == "reward" else None
            single.command(name=cmd_name, no_args_is_help=False, context_settings=settings)(found)
            command = typer.main.get_command(single)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=Lazy,
    name="ratchet",
    help="Make any LLM agent learn from its own traffic: change its base URL, nothing else.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(f"ratchet {version('agent-ratchet')}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Make any LLM agent learn from its own traffic: change its base URL, nothing else."""


def main() -> None:
    """The entry point of the `ratchet` script."""
    app()
