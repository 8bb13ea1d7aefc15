"""Compile `locks/*.txt`: one hashed, universal lock per use, without torch and what only its CUDA builds need.

torch is installed on its own first (see the Makefile), so that a user picks the build: CPU or one of the CUDA ones.
Needs `uv` on the path; used for locking only.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {"core": [], "demo": ["demo"], "dev": ["dev"]}
TORCH_ONLY = re.compile(r"^(torch|triton|nvidia-|cuda-|setuptools)[a-z0-9-]*==")


def compile_lock(name: str, extras: list[str], constraint: Path | None) -> str:
    """The text of one lock: pinned names with hashes, in pip's requirement format."""
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--no-header"]
    command += ["--no-annotate", "--generate-hashes", "pyproject.toml"]
    for extra in extras:
        command += ["--extra", extra]
    if constraint is not None:
        command += ["--constraint", str(constraint)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"locks/{name}.txt: {done.stderr}")
    return done.stdout


def without_torch(text: str) -> str:
    """Drop the entries (a name line and its hash lines) that the chosen torch build brings itself."""
    entries = re.split(r"(?m)^(?=[a-zA-Z0-9])", text)
    return "".join(entry for entry in entries if not TORCH_ONLY.match(entry))


def main() -> None:
    """Write every lock; the small ones are held to the versions of the largest."""
    folder = ROOT / "locks"
    folder.mkdir(exist_ok=True)
    full = compile_lock("dev", LOCKS["dev"], None)
    (folder / "dev.txt").write_text(without_torch(full))
    for name in ("demo", "core"):
        text = compile_lock(name, LOCKS[name], folder / "dev.txt")
        (folder / f"{name}.txt").write_text(without_torch(text))


if __name__ == "__main__":
    main()
