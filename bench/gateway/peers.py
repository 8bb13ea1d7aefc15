"""The other gateways: installed once into environments of their own, started as their documentation says.

One that cannot be installed or does not start is absent, with the reason; nothing is guessed for it.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from bench.gateway import payloads, process
from bench.gateway.load import Address
from bench.gateway.process import ROOT, Target

ENVIRONMENTS = ROOT / ".venvs"
INSTALL = 600.0  # seconds
LITELLM = "litellm[proxy]==1.106.2"
TENSORZERO = ("tensorzero==2026.6.0", "openai>=2,<3")
PORTKEY = {
    "private": True,
    "dependencies": {"@portkey-ai/gateway": "1.15.2"},
    # What its own lock file takes; with releases from 1.14.2 on streams end in a 500 (its issue 1389).
    "overrides": {"@hono/node-server": "1.13.5"},
}
KEY = "sk-bench"
_HERE = Path(__file__).parent


class Absent(Exception):
    """A peer that cannot take part here; says why."""


@dataclass(frozen=True)
class Command:
    """How a peer is started. `port` None: it says its port itself."""

    argv: Sequence[str]
    port: int | None
    path: str = "/v1/chat/completions"
    headers: tuple[tuple[str, str], ...] = ()
    model: str = payloads.MODEL
    env: Mapping[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def served(name: str, folder: Path, upstream: str, cpus: set[int]) -> Iterator[Target]:
    """The installed peer, answering. Raises NotStarted."""
    folder.mkdir(parents=True)
    log = folder / "log"
    command = COMMANDS[name](folder, upstream)
    began = time.monotonic()
    with process.running(command.argv, log, cpus, process.environment(**command.env)) as running:
        port = command.port or process.port_of(running, log)
        target = Target(name, Address(port, command.path, command.headers, command.model), running, folder)
        yield process.answering(target, log, began)


def install(name: str) -> None:
    """Install a peer if it isn't yet. Raises Absent."""
    folder = ENVIRONMENTS / f"bench-{name}"
    stamp, wanted = folder / ".installed", repr(INSTALLERS[name])
    if stamp.exists() and stamp.read_text() == wanted:
        return
    try:
        if name == "portkey":
            _npm(folder)
        else:
            _pip(folder, INSTALLERS[name])
    except FileNotFoundError as error:
        raise Absent(f"{error.filename} is not installed here") from None
    except subprocess.TimeoutExpired:
        raise Absent(f"was not installed within {INSTALL:g} s") from None
    except subprocess.CalledProcessError as error:
        words = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        raise Absent(words[-1][:300] if words else "its installation failed") from None
    stamp.write_text(wanted)


def _pip(folder: Path, packages: object) -> None:
    assert isinstance(packages, tuple)
    if not (folder / "bin" / "python").exists():
        _quietly([sys.executable, "-m", "venv", str(folder)], ROOT)
    _quietly([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages], ROOT)


def _npm(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps(PORTKEY))
    _quietly(["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts"], folder)


def _quietly(command: Sequence[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=INSTALL)


def _litellm(folder: Path, upstream: str) -> Command:
    """Its proxy: a master key, no database, no callbacks, one worker."""
    config, port = folder / "litellm.yaml", process.free_port()
    target = {"model": f"openai/{payloads.MODEL}", "api_base": upstream, "api_key": "upstream-key"}
    models = [{"model_name": payloads.MODEL, "litellm_params": target}]
    config.write_text(yaml.safe_dump({"model_list": models, "general_settings": {"master_key": KEY}}))
    flags = ["--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    return Command(
        [str(ENVIRONMENTS / "bench-litellm/bin/litellm"), *flags, "--telemetry", "False"],
        port,
        headers=(("authorization", f"Bearer {KEY}"),),
        env={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"},
    )


def _portkey(folder: Path, upstream: str) -> Command:
    """Its open-source gateway on Node, told by headers where to send a call."""
    port = process.free_port()
    script = ENVIRONMENTS / "bench-portkey/node_modules/@portkey-ai/gateway/build/start-server.js"
    headers = (
        ("authorization", "Bearer upstream-key"),
        ("x-portkey-provider", "openai"),
        ("x-portkey-custom-host", upstream),
    )
    argv = ["node", "--require", str(_HERE / "portkey_loopback.cjs"), str(script), "--headless", f"--port={port}"]
    return Command(argv, port, headers=headers, env={"NODE_ENV": "production", "TRUSTED_CUSTOM_HOSTS": "127.0.0.1"})


def _tensorzero(folder: Path, upstream: str) -> Command:
    """Its embedded gateway, on the HTTP port that it opens for its patched OpenAI client; observability off."""
    config = folder / "tensorzero.toml"
    config.write_text(_TENSORZERO.format(model=payloads.MODEL, upstream=upstream))
    python = ENVIRONMENTS / "bench-tensorzero/bin/python"
    argv = [str(python), str(_HERE / "tensorzero_gateway.py"), str(config)]
    return Command(
        argv,
        None,
        path="/openai/v1/chat/completions",
        model=f"tensorzero::model_name::{payloads.MODEL}",
        env={"OPENAI_API_KEY": "upstream-key", "RUST_LOG": "error", "NO_COLOR": "1"},
    )


_TENSORZERO = """[gateway]
observability.enabled = false
disable_pseudonymous_usage_analytics = true

[models.{model}]
routing = ["upstream"]

[models.{model}.providers.upstream]
type = "openai"
model_name = "{model}"
api_base = "{upstream}"
api_key_location = "env::OPENAI_API_KEY"
"""

INSTALLERS: dict[str, object] = {"tensorzero": TENSORZERO, "portkey": PORTKEY, "litellm": (LITELLM,)}
COMMANDS = {"tensorzero": _tensorzero, "portkey": _portkey, "litellm": _litellm}
