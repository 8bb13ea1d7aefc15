"""What `make gpu-check` would measure, on a tiny model without a GPU, and what it says where there is none."""

import math
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="training needs the extra `rl`")

import torch

from bench import gpu, result

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def test_every_figure_of_the_check_is_measured() -> None:
    found = gpu.measure(gpu.TINY, "cpu", rows=4, prompt=16, answer=4, steps=2)
    for way in ("plain", "shared beginning", "gradient checkpointing"):
        seconds, speed = found[f"{way}, seconds a step"], found[f"{way}, tokens a second"]
        assert seconds > 0 and speed == pytest.approx(4 * 20 / seconds)
    assert found["parameters"] > 100_000
    assert 0 < found["bfloat16 log-probability gap, mean"] <= found["bfloat16 log-probability gap, most"] < math.inf
    assert set(gpu.MUST) <= set(found)


def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "measure", lambda *_, **__: pytest.fail("there is nothing to measure on"))
    monkeypatch.setattr(sys, "argv", ["gpu"])
    gpu.main()
    assert "SKIPPED" in capsys.readouterr().out and not list(tmp_path.iterdir())
