"""Training, measured on small random models: parity with formulas and TRL, cost of a step, what merging saves, and
whether poisoned adapters get through. Parts of `python -m bench.rl`."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOTrainer

from collector.errors import BadInput
from optimize.gate import decide
from optimize.rl.adapter import save, verify
from optimize.rl.attention import Segment
from optimize.rl.calls import Call
from optimize.rl.memory import Memory
from optimize.rl.methods import METHODS
from optimize.rl.model import LanguageModel
from optimize.rl.rows import Row, Rules, build
from optimize.rl.train import TrainSpec, logged_trainer
from tests.unit.optimize.rl import test_trainer as parity
from tests.unit.optimize.rl.conftest import byte_tokenizer, tiny_llama

REPEATS = 3


def small(vocabulary: int = 4096) -> Any:
    """A model large enough for a step to be mostly arithmetic: 4 layers of 256."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


def trainer(rows: Sequence[Row], work: Path, *, share: bool = True, method: str = "grpo") -> Any:
    """Ours on the small model, ready for single steps; a batch is all rows."""
    spec = TrainSpec(method=method, batch_size=len(rows), share=share)
    made = logged_trainer(small(), parity.byte_tokenizer_with_pad(), rows, spec, METHODS[method], work)
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def losses() -> float:
    """Greatest difference of a loss to its hand-written formula, over the family and several batches."""
    worst = 0.0
    with tempfile.TemporaryDirectory() as work:
        for seed in range(3):
            rows = parity.rows_of(4, seed=seed)
            model = parity.adapted(tiny_llama())
            for name in parity.FAMILY:
                made = parity.trainer_of(model, rows, name, Path(work))
                longest = max(len(row.completion_ids) for row in rows)
                with torch.no_grad():
                    found, wanted = parity.loss_of(made, rows).item(), parity.by_hand(name, model, rows, longest)
                worst = max(worst, abs(found - wanted))
    return worst


def on_policy() -> float:
    """Greatest difference of a loss to that of TRL's own trainer on the completions that it generated."""
    worst = 0.0
    with tempfile.TemporaryDirectory() as work:
        for name in parity.FAMILY:
            (found, _), (wanted, _) = parity.on_policy(name, Path(work))
            worst = max(worst, abs(found.item() - wanted.item()))
    return worst


def timed(work: Callable[[], object]) -> float:
    """Median seconds of a few runs after one to warm up."""
    work()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def rows_of(count: int, prompt: int, answer: int, shared: int = 0, vocabulary: int = 4096) -> list[Row]:
    """Rows of random ids with as many prompt and answer tokens; the first `shared` of all prompts are the same."""
    draw = np.random.default_rng(0)
    beginning = tuple(int(one) for one in draw.integers(2, vocabulary, shared))
    rows = []
    for number in range(count):
        ids = beginning + tuple(int(one) for one in draw.integers(2, vocabulary, prompt - shared))
        written = tuple(int(one) for one in draw.integers(2, vocabulary, answer))
        gains = (float(draw.normal()),) * answer
        rows.append(Row(f"e{number}", (f"s{number}",), "m", ids, written, (1,) * answer, gains, (-8.0,) * answer))
    return rows


def overhead() -> dict[str, float]:
    """Seconds of a whole step (batch, loss, gradient) over those of TRL's own on the same tensors, without and with a
    beginning that all rows share. TRL gets its batch ready made."""
    found = {}
    with tempfile.TemporaryDirectory() as work:
        for name, shared in (("step", 0), ("step, shared beginning", 192)):
            rows = rows_of(8, 224, 32, shared)
            made = trainer(rows, Path(work))
            batch = made._generate_and_score_completions([{"row": index} for index in range(len(rows))])
            theirs = {key: value for key, value in batch.items() if key != "ref_per_token_logps"}

            def ours(made: Any = made, rows: list[Row] = rows) -> None:
                fresh = made._generate_and_score_completions([{"row": index} for index in range(len(rows))])
                made._compute_loss(made.model, fresh).backward()

            def trl(made: Any = made, theirs: Any = theirs) -> None:
                GRPOTrainer._compute_loss(_Plain(made), made.model, theirs).backward()

            found[name] = timed(ours) / timed(trl)
    return found


class _Plain:
    """The same trainer with TRL's own way to log-probabilities."""

    def __init__(self, made: Any) -> None:
        self.__dict__["_made"] = made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)

    def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
        return GRPOTrainer._get_per_token_logps_and_entropies(self._made, *args, **options)


def merging(turns: int = 8, episodes: int = 2) -> dict[str, float]:
    """Tokens and seconds of a step on merged rows over those of one row a call, for episodes of `turns` calls."""
    draw = np.random.default_rng(0)
    calls = []
    for episode in range(episodes):
        context: tuple[int, ...] = tuple(int(one) for one in draw.integers(2, 4096, 60))
        for turn in range(turns):
            wrote = tuple(int(one) for one in draw.integers(2, 4096, 24))
            saw = tuple(int(one) for one in draw.integers(2, 4096, 24))
            calls.append(Call(f"{episode}-{turn}", f"e{episode}", turn, "m", True, context, wrote, (-8.0,) * 24))
            context += wrote + saw
    gains = {call.span_id: float(draw.normal()) for call in calls}
    merged, single = build(calls, gains, Rules())[0], build(calls, gains, Rules(merge=False))[0]
    seconds = []
    with tempfile.TemporaryDirectory() as work:
        for rows in (merged, single):
            # One row a call comes in batches of the merged rows' size: the same number of rows at once.
            parts = [rows[at : at + episodes] for at in range(0, len(rows), episodes)]
            mades = [trainer(part, Path(work), share=False) for part in parts]
            seconds.append(timed(lambda mades=mades: [_step(made) for made in mades]))  # type: ignore[misc]
    tokens = [sum(row.tokens for row in rows) for rows in (merged, single)]
    return {"tokens": tokens[0] / tokens[1], "seconds": seconds[0] / seconds[1]}


def _step(made: Any) -> None:
    batch = made._generate_and_score_completions([{"row": index} for index in range(len(made.rows))])
    made._compute_loss(made.model, batch).backward()


def poisoned(count: int = 20, tasks: int = 48) -> dict[str, Any]:
    """Adapters that were made to be bad, and how many the checks and the gate let through.

    Half of the base model's answers count as right. The adapters: random weights of growing size, signs turned,
    one direction for everything; some also not finite, cut off, of another base, or with another file beside them.
    """
    outcomes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as home:
        base = Path(home) / "base"
        tiny_llama().save_pretrained(base)
        byte_tokenizer().save_pretrained(base)
        language = LanguageModel.load(base)
        prompts = [[1, 40 + at, 7, 12 + at % 5] for at in range(tasks)]
        right = [_first(language, ids, None) if at % 2 else -1 for at, ids in enumerate(prompts)]
        before = [float(_first(language, ids, None) == want) for ids, want in zip(prompts, right, strict=True)]
        for number in range(count):
            folder = Path(home) / "adapters" / f"bad-{number}"
            folder.parent.mkdir(exist_ok=True)
            _make_bad(number, folder, base)
            outcome = _try(language, folder, base, Path(home), number, prompts, right, before)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


def _try(
    language: LanguageModel, folder: Path, base: Path, root: Path, number: int, prompts: list[list[int]],
    right: list[int], before: list[float],
) -> str:  # fmt: skip
    try:
        verify(folder, root=root / "adapters", base=base)
        language.adapters.load(f"bad-{number}", folder)
    except BadInput:
        return "refused"
    after = [float(_first(language, ids, f"bad-{number}") == want) for ids, want in zip(prompts, right, strict=True)]
    return decide(before, after).decision


def _first(language: LanguageModel, ids: list[int], adapter: str | None) -> int:
    return int(language.forward([Segment(Memory(), ids, 0, adapter)])[0].argmax())


def _make_bad(number: int, folder: Path, base: Path) -> None:
    torch.manual_seed(number)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2 * (1 + number % 10))
                if number % 4 == 1:
                    weight.copy_(weight[:, :1].expand_as(weight))
    if number % 10 == 7:
        with torch.no_grad():
            next(weight for name, weight in model.named_parameters() if "lora_B" in name)[0, 0] = float("nan")
    save(model, folder, base=base, method="grpo")
    weights = folder / "adapter_model.safetensors"
    if number % 10 == 8:
        weights.write_bytes(weights.read_bytes()[:-100])
    if number % 10 == 9:
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
