"""The classic in-process script, unchanged, with the real local model: it must beat the prompt that it starts from."""

import ast
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the local model needs the extra `demo`")
pytest.importorskip("gguf", reason="the local model needs the extra `demo`")

ROOT = Path(__file__).resolve().parents[2]
TASKS, BUDGET = "64", "80"
LONGEST = 1800

pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(LONGEST + 120),
    pytest.mark.skipif("RATCHET_CLASSIC" not in os.environ, reason="takes minutes: make test-model"),
]


@pytest.fixture
def engine() -> Iterator[str]:
    """The built-in engine as a process: its base URL."""
    data = os.environ.get("RATCHET_DATA_DIR", str(ROOT / "data"))
    command = [sys.executable, "-c", "import ratchet; ratchet.main()", "engine", "--port", "0", "--data-dir", data]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    try:
        yield process.stdout.readline().split()[-1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_classic_script_beats_its_prompt_on_held_out_tasks(engine: str, tmp_path: Path) -> None:
    own = {"OPENAI_BASE_URL": engine, "OPENAI_API_KEY": "none", "TASKS": TASKS, "BUDGET": BUDGET}
    environment = {**os.environ, **own, "RATCHET_DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples/capital_city/classic.py")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LONGEST, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = re.search(r"^promote HeldOutEvidence\((\{.*\})\)$", done.stdout, re.MULTILINE)
    assert printed, done.stdout
    held_out = ast.literal_eval(printed[1])
    print(f"exactly right or nearly so, held out: {held_out}")
    assert held_out["n"] >= 16
    assert held_out["after"] > held_out["before"]
