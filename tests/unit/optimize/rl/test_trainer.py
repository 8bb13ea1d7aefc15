"""The loss is what the papers say and what TRL computes, whatever is saved on the way to it."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="training needs the extra `rl`")

from peft import LoraConfig, get_peft_model
from trl import GRPOConfig, GRPOTrainer

from optimize.rl.guard import Limits
from optimize.rl.logprobs import token_logprobs
from optimize.rl.methods import METHODS
from optimize.rl.rows import Row
from optimize.rl.train import TrainSpec, logged_trainer
from optimize.rl.trainer import MOST_OF_A_TOKEN, divergence
from tests.unit.optimize.rl.conftest import VOCABULARY, byte_tokenizer, tiny_gemma, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
FAMILY = ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo"]


def rows_of(count: int, shared: int = 0, seed: int = 0) -> list[Row]:
    """Rows of two steps each, with an observation between, other advantages in each step, and logged log-probs."""
    draw = random.Random(seed)
    beginning = tuple(draw.randrange(2, VOCABULARY) for _ in range(shared))
    rows = []
    for number in range(count):
        prompt = beginning + tuple(draw.randrange(2, VOCABULARY) for _ in range(draw.randint(2, 6)))
        first, seen, second = draw.randint(1, 4), draw.randint(1, 3), draw.randint(1, 4)
        mask = (1,) * first + (0,) * seen + (1,) * second
        gains = (draw.gauss(0, 1),) * first + (0.0,) * seen + (draw.gauss(0, 1),) * second
        ids = tuple(draw.randrange(2, VOCABULARY) for _ in mask)
        logprobs = tuple(-5.0 + draw.gauss(0, 0.3) if one else 0.0 for one in mask)
        rows.append(Row(f"e{number}", (f"s{number}",), "m", prompt, ids, mask, gains, logprobs, 1.0))
    return rows


def adapted(model: Any) -> Any:
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    made = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)
    return made


def alone(model: Any, row: Row) -> torch.Tensor:
    """Log-probabilities (T,) of one row, by the plainest way there is."""
    ids = torch.tensor([row.prompt_ids + row.completion_ids])
    logits = model(input_ids=ids).logits[0].float()
    found = torch.log_softmax(logits, -1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return found[len(row.prompt_ids) - 1 :]


def by_hand(name: str, model: Any, rows: list[Row], longest: int) -> float:
    """The loss of a batch, from the formulas, row by row and token by token."""
    how = METHODS[name]
    sums, sizes = [], []
    for row in rows:
        logp = alone(model, row).tolist()
        old, gains = row.logprobs or (), row.advantages
        wrote = [at for at, one in enumerate(row.mask) if one]
        ratios = {at: math.exp(logp[at] - old[at]) for at in wrote}
        if how.level == "sequence":
            one = math.exp(sum(logp[at] - old[at] for at in wrote) / len(wrote))
            ratios = dict.fromkeys(wrote, one)
        terms = []
        for at in wrote:
            k, gain = ratios[at], gains[at]
            if how.loss == "cispo":
                terms.append(-min(k, how.high) * gain * logp[at])
            elif how.loss == "sapo":
                tau = 1.0 if gain > 0 else 1.05
                terms.append(-4 / tau / (1 + math.exp(-tau * (k - 1))) * gain)
            else:
                terms.append(-min(k * gain, min(max(k, 1 - how.low), 1 + how.high) * gain))
        sums.append(sum(terms))
        sizes.append(len(wrote))
    if how.loss in ("grpo", "sapo"):
        return sum(total / size for total, size in zip(sums, sizes, strict=True)) / len(rows)
    return sum(sums) / (len(rows) * longest if how.loss == "dr_grpo" else sum(sizes))


def trainer_of(model: Any, rows: list[Row], name: str, tmp_path: Path, **options: Any) -> Any:
    spec = TrainSpec(method=name, batch_size=len(rows), **options)
    made = logged_trainer(model, byte_tokenizer_with_pad(), rows, spec, METHODS[name], tmp_path)
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def byte_tokenizer_with_pad() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def loss_of(trainer: Any, rows: list[Row]) -> torch.Tensor:
    batch = trainer._generate_and_score_completions([{"row": index} for index in range(len(rows))])
    return trainer._compute_loss(trainer.model, batch)


@pytest.mark.parametrize("name", FAMILY)
def test_each_loss_is_its_formula_with_advantages_that_vary_within_a_row(name: str, tmp_path: Path) -> None:
    rows = rows_of(4)
    model = adapted(tiny_llama())
    trainer = trainer_of(model, rows, name, tmp_path)
    found = loss_of(trainer, rows).item()
    with torch.no_grad():
        wanted = by_hand(name, model, rows, max(len(row.completion_ids) for row in rows))
    assert found == pytest.approx(wanted, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_the_loss_of_accumulated_batches_is_that_of_the_whole(name: str, tmp_path: Path) -> None:
    rows = rows_of(4)
    model = adapted(tiny_llama())
    whole = loss_of(trainer_of(model, rows, name, tmp_path), rows).item()
    spec = TrainSpec(method=name, batch_size=2, accumulation=2)
    halves = logged_trainer(model, byte_tokenizer_with_pad(), rows, spec, METHODS[name], tmp_path)
    halves.current_gradient_accumulation_steps = 2
    halves.model.train()
    batch = halves._generate_and_score_completions([{"row": index} for index in range(4)])
    total = 0.0
    for part in (slice(0, 2), slice(2, 4)):
        some = {key: value[part] if value.dim() else value for key, value in batch.items()}
        total += halves._compute_loss(halves.model, some).item()
    assert total == pytest.approx(whole, abs=1e-5)


def on_policy(name: str, work: Path) -> tuple[tuple[torch.Tensor, Any], tuple[torch.Tensor, Any]]:
    """Loss and gradient of ours and of TRL's own trainer, on completions that TRL's generated and rewarded."""
    how = METHODS[name]
    tokenizer = byte_tokenizer_with_pad()
    from datasets import Dataset

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text.encode()) % 3) + 0.1 * index for index, text in enumerate(completions)]

    args = GRPOConfig(
        output_dir=str(work), per_device_train_batch_size=4, num_generations=2, max_completion_length=5, beta=0.0,
        loss_type=how.loss, importance_sampling_level=how.level, epsilon=how.low, epsilon_high=how.high, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to=[], seed=5, disable_tqdm=True,
    )  # fmt: skip
    model = adapted(tiny_llama())
    theirs = GRPOTrainer(
        model, reward, args, Dataset.from_dict({"prompt": ["abc", "abcdefgh"]}), processing_class=tokenizer
    )
    theirs.current_gradient_accumulation_steps = 1
    theirs.model.train()
    prompts = [{"prompt": text} for text in ("abc", "abc", "abcdefgh", "abcdefgh")]
    batch = theirs._generate_and_score_completions(prompts)
    batch.pop("old_per_token_logps", None)
    wanted = theirs._compute_loss(theirs.model, batch)
    gradients = torch.autograd.grad(wanted, [one for one in model.parameters() if one.requires_grad])

    rows = []
    for index in range(4):
        prompt = batch["prompt_ids"][index][batch["prompt_mask"][index] > 0].tolist()
        answer = batch["completion_ids"][index][batch["completion_mask"][index] > 0].tolist()
        gains = (float(batch["advantages"][index]),) * len(answer)
        row = Row(f"e{index}", (f"s{index}",), "m", tuple(prompt), tuple(answer), (1,) * len(answer), gains)
        with torch.no_grad():
            logprobs = tuple(alone(model, row).tolist())
        rows.append(Row(row.episode_id, row.spans, "m", row.prompt_ids, row.completion_ids, row.mask, gains, logprobs))
    ours = trainer_of(model, rows, name, work)
    ours.max_completion_length = 5
    found = loss_of(ours, rows)
    mine = torch.autograd.grad(found, [one for one in model.parameters() if one.requires_grad])
    return (found, mine), (wanted, gradients)


@pytest.mark.parametrize("name", FAMILY)
def test_on_policy_loss_and_gradient_are_those_of_trls_own_trainer(name: str, tmp_path: Path) -> None:
    (found, mine), (wanted, gradients) = on_policy(name, tmp_path)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert all(torch.allclose(one, two, atol=1e-5, rtol=1e-4) for one, two in zip(mine, gradients, strict=True))


@pytest.mark.parametrize("made", [tiny_llama, tiny_gemma])
def test_a_shared_beginning_changes_neither_log_probabilities_nor_gradients(made: Any) -> None:
    rows = rows_of(3, shared=12)
    model = adapted(made())
    found = []
    for share in (True, False):
        ids, mask, wrote = padded(rows)
        logprobs, _ = token_logprobs(model, ids, mask, wrote, share=share)
        gradients = torch.autograd.grad((logprobs * wrote).sum(), [p for p in model.parameters() if p.requires_grad])
        found.append((logprobs, gradients))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert all(torch.allclose(one, two, atol=1e-4) for one, two in zip(found[0][1], found[1][1], strict=True))
    for row, line in zip(rows, found[0][0], strict=True):
        with torch.no_grad():
            plain = alone(model, row)
        wrote_here = torch.tensor(row.mask, dtype=torch.bool)
        assert torch.allclose(line[: len(row.mask)][wrote_here], plain[wrote_here], atol=1e-5)


def padded(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from optimize.rl.batch import collate

    batch = collate(rows, 0, ratio=False, reference=None)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return ids, mask, batch["tool_mask"]


def test_equal_rows_are_computed_once_and_weigh_as_often_as_they_are_there() -> None:
    one, two = rows_of(2)
    model = adapted(tiny_llama())
    seen: list[int] = []
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0]))
    found = []
    for share in (True, False):
        ids, mask, wrote = padded([one, two, one, one])
        logprobs, _ = token_logprobs(model, ids, mask, wrote, share=share)
        gradients = torch.autograd.grad((logprobs * wrote).sum(), [p for p in model.parameters() if p.requires_grad])
        found.append((logprobs, gradients))
    assert seen == [2, 4]
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert all(torch.allclose(one, two, atol=1e-4) for one, two in zip(found[0][1], found[1][1], strict=True))


def test_a_shared_beginning_is_computed_once() -> None:
    rows = rows_of(4, shared=40)
    model = adapted(tiny_llama())
    seen: list[int] = []
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0] * given[0].shape[1]))
    for share in (True, False):
        token_logprobs(model, *padded(rows), share=share)
    once, each = sum(seen[:2]), seen[2]
    assert len(seen) == 3 and once < 0.5 * each


def test_pieces_of_the_output_layer_give_the_same_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(3)
    model = adapted(tiny_llama())
    whole, entropy = token_logprobs(model, *padded(rows))
    monkeypatch.setattr("optimize.rl.logprobs.LOGITS", VOCABULARY * 3)
    pieces, same = token_logprobs(model, *padded(rows))
    assert torch.allclose(whole, pieces, atol=1e-6) and torch.allclose(entropy, same, atol=1e-6)


def test_a_row_without_logged_log_probabilities_is_refused_where_a_ratio_is_needed() -> None:
    from dataclasses import replace

    from optimize.rl.batch import collate

    rows = rows_of(2)
    with pytest.raises(ValueError, match="silently be 1"):
        collate([rows[0], replace(rows[1], logprobs=None)], 0, ratio=True, reference=None)


def test_a_few_unlearned_tokens_are_no_collapse_and_many_are() -> None:
    mask, gap = torch.ones(4, 10), torch.zeros(4, 10)
    assert divergence(gap, mask) == 0.0
    gap[0, 0] = 0.1
    assert divergence(gap, mask) == pytest.approx((math.exp(0.1) - 1.1) / 40, rel=1e-3)
    gap[0, :3] = 8.0  # thousands each, by the plain estimate
    assert divergence(gap, mask) == pytest.approx(3 * MOST_OF_A_TOKEN / 40)
    assert divergence(gap, mask) < Limits().most_kl
    gap[:2] = 8.0
    assert divergence(gap, mask) > Limits().most_kl
    gap[:, 5:], mask[:, 5:] = 8.0, 0.0  # not the policy's own tokens
    gap[:, :5] = 0.0
    assert divergence(gap, mask) == 0.0
