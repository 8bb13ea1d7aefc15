"""What training costs on a GPU: `make gpu-check`. Says clearly that it skipped where there is none.

A randomly initialised model of 0.5 billion parameters (Qwen2.5-0.5B's shape), LoRA rank 8 on every linear layer, in
bfloat16: seconds a step and tokens a second of the logged trainer, with and without a beginning that all rows share,
peak memory, and how far bfloat16 log-probabilities are from float32's on the same weights.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback

from bench.result import Result
from bench.training import rows_of
from optimize.rl.methods import METHODS
from optimize.rl.rows import Row
from optimize.rl.train import TrainSpec, logged_trainer, score
from tests.unit.optimize.rl.test_trainer import byte_tokenizer_with_pad

HALF_BILLION = LlamaConfig(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
TINY = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=2048,
)  # fmt: skip
MUST = {"bfloat16 log-probability gap, mean": ("<=", 0.06)}


def model_of(config: Any, device: str, dtype: torch.dtype) -> Any:
    """A random model with an adapter; the same weights for the same configuration."""
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config).to(dtype=dtype, device=device), lora)


def seconds_of(model: Any, rows: Sequence[Row], work: Path, *, share: bool, checkpointing: bool, steps: int) -> float:
    """Median seconds of a training step: batch, loss, gradient, update."""
    spec = TrainSpec(
        method="grpo", batch_size=len(rows), share=share, gradient_checkpointing=checkpointing, epochs=steps
    )
    trainer = logged_trainer(model, byte_tokenizer_with_pad(), rows, spec, METHODS["grpo"], work)
    trainer.remove_callback(PrinterCallback)
    marks: list[float] = []
    step = trainer.training_step

    def timed(*args: Any, **options: Any) -> Any:
        _settled()
        marks.append(time.perf_counter())
        return step(*args, **options)

    trainer.training_step = timed  # type: ignore[method-assign]
    trainer.train()
    _settled()
    marks.append(time.perf_counter())
    return statistics.median([after - before for before, after in itertools.pairwise(marks)][1:])


def _settled() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(config: Any, device: str, *, rows: int, prompt: int, answer: int, steps: int = 8) -> dict[str, float]:
    """All figures for one model on one device."""
    made = rows_of(rows, prompt, answer, prompt * 3 // 4, config.vocab_size)
    tokens = sum(row.tokens for row in made)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = model_of(config, device, dtype)
    found: dict[str, float] = {"parameters": float(sum(one.numel() for one in model.parameters()))}
    with tempfile.TemporaryDirectory() as work:
        for name, share, checkpointing in (
            ("plain", False, False), ("shared beginning", True, False), ("gradient checkpointing", False, True),
        ):  # fmt: skip
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = seconds_of(model, made, Path(work), share=share, checkpointing=checkpointing, steps=steps)
            found |= {f"{name}, seconds a step": seconds, f"{name}, tokens a second": tokens / seconds}
            if device == "cuda":
                found[f"{name}, peak memory in GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return {**found, **gap(config, device, made[:4])}


def gap(config: Any, device: str, rows: Sequence[Row]) -> dict[str, float]:
    """Differences of bfloat16 log-probabilities to float32's, of the same weights and tokens."""
    scored = [score(model_of(config, device, dtype), rows, 0) for dtype in (torch.float32, torch.bfloat16)]
    gaps = [abs(one - two) for lines in zip(*scored, strict=True) for one, two in zip(*lines, strict=True)]
    return {
        "bfloat16 log-probability gap, mean": sum(gaps) / len(gaps),
        "bfloat16 log-probability gap, most": max(gaps),
    }


def main() -> None:
    """Measure, or say that there is nothing to measure on."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    parser = argparse.ArgumentParser()
    parser.add_argument("--rehearse", action="store_true", help="run a tiny model on the CPU and keep nothing")
    asked = parser.parse_args()
    console = Console()
    if asked.rehearse:
        console.print(json.dumps(measure(TINY, "cpu", rows=4, prompt=32, answer=8, steps=3), indent=2))
        return
    if not torch.cuda.is_available():
        console.print("gpu-check: SKIPPED, this machine has no GPU that torch can use. Nothing was measured.")
        return
    began = time.monotonic()
    result = Result("gpu", MUST)
    result.measures |= measure(HALF_BILLION, "cuda", rows=16, prompt=512, answer=128)
    result.notes["device"] = torch.cuda.get_device_name()
    result.write(time.monotonic() - began)
    result.show(console)


if __name__ == "__main__":
    main()
