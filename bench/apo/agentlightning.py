"""Runs `agentlightning_peer` in its own environment: 0.3.0 needs packages that nothing else here does."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venvs" / "bench-agentlightning" / "bin" / "python"


def python() -> Path | None:
    """Its interpreter; None where it is not installed."""
    return PYTHON if PYTHON.exists() else None


def runs(world: str, seeds: Sequence[int], budgets: Sequence[int]) -> list[dict[str, Any]]:
    """One search a seed, read off its curve at each budget."""
    command = [str(PYTHON), "-m", "bench.apo.agentlightning_peer", world, *map(str, seeds)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(found) != len(seeds):
        raise RuntimeError(f"agentlightning on {world}: {done.stderr[-2000:]}")
    lines = []
    for one in found:
        for budget in budgets:
            reached = [score for rollouts, score in one["curve"] if rollouts <= budget]
            score = one["score"] if budget >= one["rollouts"] else reached[-1]
            spent = min(budget, one["rollouts"])
            lines.append(
                {
                    "engine": "agentlightning",
                    "world": world,
                    "seed": one["seed"],
                    "budget": budget,
                    "score": score,
                    "rollouts": spent,
                }
            )
    return lines
