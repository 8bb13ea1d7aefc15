"""`ratchet engine`: serve a local model."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import uvicorn
from rich.console import Console

from collector.errors import BadInput, ConfigError, RatchetError
from collector.lifeline import follow
from optimize.rl.convert import DEMO_MODEL, ensure_demo_model

if TYPE_CHECKING:
    from starlette.applications import Starlette


Model = Annotated[str, typer.Option(help=f"`{DEMO_MODEL}`, or a directory of safetensors.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any free port; the ready line names it.")]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
DataDir = Annotated[
    Path, typer.Option(envvar="RATCHET_DATA_DIR", help="Where the demo model and the adapters are kept.")
]
NamedAdapter = Annotated[list[str] | None, typer.Option(metavar="NAME=DIR", help="A LoRA adapter, served as NAME.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0: every core this process may use.")]
MaxBatch = Annotated[int, typer.Option(min=1, help="Answers computed at once.")]
Context = Annotated[int, typer.Option(min=0, help="Longest prompt and answer in tokens; 0: the model's.")]
ParentFd = Annotated[int | None, typer.Option(hidden=True, help="Exit when this pipe is closed.")]


def engine(
    model: Model = DEMO_MODEL,
    port: Port = 4010,
    host: Host = "127.0.0.1",
    data_dir: DataDir = Path("data"),
    adapter: NamedAdapter = None,
    threads: Threads = 0,
    max_batch: MaxBatch = 16,
    context: Context = 8192,
    parent_fd: ParentFd = None,
) -> None:
    """Serve a local model behind an OpenAI endpoint."""
    console = Console()
    if parent_fd is not None:
        follow(parent_fd)
    threads_sleep()
    try:
        listener = _listen(host, port)
        name, app = _application(model, data_dir, dict(map(_named, adapter or [])), threads, max_batch, context)
    except RatchetError as error:
        Console(stderr=True).print(f"[red]error:[/] {error.message}", highlight=False)
        raise typer.Exit(2 if isinstance(error, BadInput) else 1) from None
    address = f"[{host}]" if ":" in host else host
    _serve(app, listener, lambda: console.print(f"{name} ready at http://{address}:{listener.getsockname()[1]}/v1"))


def threads_sleep() -> None:
    """Have threads wait for one another by sleeping, not by spinning; before torch is imported, which reads it.

    As fast on a free machine, and several times faster on one whose cores the agents share.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _application(
    model: str, data_dir: Path, adapters: dict[str, Path], threads: int, max_batch: int, context: int
) -> "tuple[str, Starlette]":
    directory = model_directory(model, data_dir)
    try:
        from optimize.rl.engine import Engine
        from optimize.rl.model import LanguageModel, use_threads
    except ModuleNotFoundError as error:
        message = f"the engine needs its extra ({error.name} is missing); run: pip install 'agent-ratchet[engine]'"
        raise RatchetError(message, code="extra_missing") from None
    use_threads(threads)
    loaded = LanguageModel.load(directory, context=context or None)
    name = directory.resolve().name
    for alias, path in adapters.items():
        if alias == name:
            raise BadInput(f"--adapter {alias}: that is the model's own name", param="adapter")
        loaded.adapters.load(alias, path)
    root = data_dir / "adapters"
    return name, Engine(loaded, name, max_batch=max_batch, adapters_root=root, base=directory).app()


def model_directory(model: str, data_dir: Path) -> Path:
    """Where the weights are: a local directory, or the demo model, converted if need be. Raises BadInput."""
    if model == DEMO_MODEL:
        return ensure_demo_model(data_dir)
    if not Path(model).is_dir():
        raise BadInput(f"--model {model}: give `{DEMO_MODEL}` or a local directory of safetensors", param="model")
    return Path(model)


def _named(adapter: str) -> tuple[str, Path]:
    name, found, path = adapter.partition("=")
    if not (name and found and path):
        raise BadInput(f"--adapter {adapter}: write NAME=DIRECTORY", param="adapter")
    return name, Path(path)


def _listen(host: str, port: int) -> socket.socket:
    """The bound socket, before the model is loaded, so that a port in use is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", param="port") from None
    return listener


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


def _serve(app: "Starlette", listener: socket.socket, ready: Callable[[], None]) -> None:
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    # uvicorn ends by raising the signal again that ended it; with these handlers that is a clean exit.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    _Server(config, ready).run([listener])
