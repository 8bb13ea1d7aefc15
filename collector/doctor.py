"""`ratchet doctor`: is this installation what it should be, and can it run here? One line a check, with the fix.

The packages have generic names (`proxy`, `collector`, `optimize`), so another distribution or a folder of the user's
can shadow or overwrite them; that is the first thing looked at. Nothing but `collector` is imported.
"""

import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from collector.settings import DEFAULT_URL

DISTRIBUTION = "agent-ratchet"
PACKAGES = ("proxy", "collector", "optimize", "ratchet")
BAD_LITELLM = ("1.82.7", "1.82.8")  # the releases with a stolen-credentials payload: PYSEC-2026-2


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `ok` None means: not needed, for information. `fix` says what to do when `ok` is False."""

    name: str
    ok: bool | None
    detail: str
    fix: str = ""


def examine(data_dir: Path) -> list[Check]:
    """Run every check; none of them changes anything."""
    checks: tuple[Callable[[], Iterator[Check]], ...] = (
        _python,
        _packages,
        _record,
        _litellm,
        _startup_hooks,
        lambda: _data_dir(data_dir),
        _server,
        _engine,
    )
    return [found for check in checks for found in check()]


def _python() -> Iterator[Check]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    yield Check("python", sys.version_info >= (3, 11), version, "Ratchet needs Python 3.11 or newer")


def _packages() -> Iterator[Check]:
    """All our modules must come from one place; a stranger in front of them would be run instead."""
    homes: dict[str, Path] = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            yield Check(f"package {name}", False, "not found", f"reinstall {DISTRIBUTION} in an environment of its own")
            continue
        origin = Path(spec.origin).resolve()
        homes[name] = origin.parent if name == "ratchet" else origin.parent.parent
    ours = homes.get("collector")
    for name, home in homes.items():
        fix = (
            f"another `{name}` shadows Ratchet's: run it from another folder, or install Ratchet with `uv tool` or pipx"
        )
        yield Check(f"package {name}", home == ours, str(home), fix)


def _record() -> Iterator[Check]:
    """Compare the installed files with the wheel's RECORD: a second distribution may have overwritten some."""
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        yield Check("installation", None, "run from source, not installed")
        return
    rows = list(csv.reader((distribution.read_text("RECORD") or "").splitlines()))
    if not rows:
        yield Check("installation", None, "run from source, no record of files")
        return
    changed = []
    for name, digest, *_ in rows:
        path = Path(str(distribution.locate_file(name)))
        if digest.startswith("sha256=") and (not path.is_file() or _digest(path) != digest.removeprefix("sha256=")):
            changed.append(name)
    detail = f"{len(rows)} files as installed" if not changed else f"changed: {', '.join(changed[:3])}"
    fix = f"another distribution overwrote files; reinstall {DISTRIBUTION} in an environment of its own"
    yield Check("installation", not changed, detail, fix)


def _digest(path: Path) -> str:
    raw = hashlib.sha256(path.read_bytes()).digest()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _litellm() -> Iterator[Check]:
    try:
        version = importlib.metadata.version("litellm")
    except importlib.metadata.PackageNotFoundError:
        yield Check("litellm", None, "absent: only OpenAI-compatible upstreams can be reached")
        return
    bad = version in BAD_LITELLM or version.startswith("1.107.")
    yield Check("litellm", not bad, version, "a compromised release: uninstall it, rotate the keys of this machine")


def _startup_hooks() -> Iterator[Check]:
    """Python runs `import` lines of *.pth files at every start, which the compromised LiteLLM releases abused."""
    known = ("distutils-precedence.pth", "__editable__", "_virtualenv.pth", "zzz_", "a1_coverage.pth")
    site = Path(importlib.util.find_spec("typer").origin or "").parent.parent  # type: ignore[union-attr]
    strange = []
    for path in sorted(site.glob("*.pth")):
        lines = path.read_text(errors="replace").splitlines()
        if not path.name.startswith(known) and any(line.startswith(("import ", "import\t")) for line in lines):
            strange.append(path.name)
    yield Check("startup hooks", not strange, ", ".join(strange) or "none unknown", "look into these .pth files")


def _data_dir(data_dir: Path) -> Iterator[Check]:
    place = data_dir if data_dir.exists() else data_dir.absolute().parent
    yield Check("data folder", os.access(place, os.W_OK), str(data_dir), f"make {place} writable or give --data-dir")
    free = shutil.disk_usage(place).free / 2**30
    yield Check("disk", free >= 1, f"{free:.1f} GiB free", "free some space: a full disk means uncounted calls")


def _server() -> Iterator[Check]:
    url = os.environ.get("RATCHET_URL", DEFAULT_URL)
    host, _, port = url.split("//", 1)[-1].split("/", 1)[0].partition(":")
    try:
        with socket.create_connection((host, int(port or 80)), timeout=1):
            yield Check("server", True, f"something answers at {url}")
    except (OSError, ValueError):
        yield Check("server", None, f"none at {url} (start one with `ratchet serve`)")


def _engine() -> Iterator[Check]:
    missing = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
    detail = "ready" if not missing else f"absent ({', '.join(missing)}): pip install 'agent-ratchet[demo]'"
    yield Check("built-in engine", True if not missing else None, detail)


def doctor(
    data_dir: Annotated[Path, typer.Option(envvar="RATCHET_DATA_DIR", help="The data folder.")] = Path("data"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this installation; exit 1 when something needs mending."""
    from collector.console import console, emit_json

    found = examine(data_dir)
    broken = any(check.ok is False for check in found)
    if as_json:
        emit_json({"ok": not broken, "checks": [asdict(check) for check in found]})
    else:
        for check in found:
            mark = {True: "[green]ok  [/]", False: "[red]FAIL[/]", None: "[dim]--  [/]"}[check.ok]
            console.print(f"{mark} {check.name}: {check.detail}", highlight=False)
            if check.ok is False:
                console.print(f"       -> {check.fix}", highlight=False)
    raise typer.Exit(1 if broken else 0)
