"""What every command line file shares: the console, plain JSON on stdout, and errors as exit codes."""

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import orjson
import typer
from rich.console import Console
from rich.markup import escape

from collector.errors import BadInput, RatchetError

P = ParamSpec("P")
R = TypeVar("R")

console = Console()
stderr = Console(stderr=True)


def emit_json(value: Any) -> None:
    """Write `value` as JSON, and nothing else, on stdout."""
    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")


def fail(error: RatchetError) -> int:
    """Show the error in red on stderr; returns the exit code: 2 bad input, 1 not done."""
    where = f" ({error.param})" if error.param and error.param not in error.message else ""
    stderr.print(f"[bold red]error:[/] {escape(error.message)}{escape(where)}", soft_wrap=True, highlight=False)
    return 2 if isinstance(error, BadInput) else 1


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a command: a RatchetError becomes a red message and an exit code, Ctrl-C becomes 130."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RatchetError as error:
            raise typer.Exit(fail(error)) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    return guarded
