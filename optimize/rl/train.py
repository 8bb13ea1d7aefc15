"""From rows to an adapter: one training run with TRL and PEFT, on a CPU in float32 or on a GPU in bfloat16."""

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
from transformers import logging as hf_logging
from transformers.trainer_utils import get_last_checkpoint

from collector.errors import BadInput
from optimize.rl import adapter
from optimize.rl.batch import collate
from optimize.rl.canary import canaries
from optimize.rl.guard import Guard, Limits, OnStep
from optimize.rl.logprobs import token_logprobs
from optimize.rl.methods import Method, method
from optimize.rl.rows import Report, Row, matching
from optimize.rl.trainer import Collapsed, LoggedTrainer

# Positions (rows times the longest) that a forward pass without gradients takes at once.
SCORED_AT_ONCE = 2048


@dataclass(frozen=True)
class TrainSpec:
    """How to train. `learning_rate` None: the method's own; `epochs` passes over the rows; `beta` weighs a penalty on
    the KL to the base model. `batch_size` rows a step, `accumulation` such batches an update. `checkpoint_steps` None:
    no checkpoints. `share`: compute a beginning that all rows of a batch share once (not with checkpointing).
    """

    method: str = "rft"
    rank: int = 8
    alpha: int = 16
    learning_rate: float | None = None
    epochs: float = 3.0
    batch_size: int = 8
    accumulation: int = 1
    beta: float = 0.0
    seed: int = 0
    gradient_checkpointing: bool = False
    checkpoint_steps: int | None = None
    share: bool = True
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Trained:
    """An adapter on disk, `directory` None where the run collapsed (`stopped` says how)."""

    directory: Path | None
    steps: int
    rows: int
    seconds: float
    curves: list[dict[str, float]]
    stopped: str | None = None


def load_base(directory: Path) -> tuple[Any, Any]:
    """`(model, tokenizer)` of a folder of safetensors: float32 on a CPU, bfloat16 on a GPU. No remote code."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    options = {"local_files_only": True, "trust_remote_code": False}
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
        model = AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot load {directory}: {error}", param="model") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def wrap(model: Any, spec: TrainSpec, parent: Path | None) -> Any:
    """The model with a fresh adapter, or with the parent's to train on."""
    set_seed(spec.seed)
    if parent is not None:
        return PeftModel.from_pretrained(model, parent, is_trainable=True)
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


@torch.no_grad()  # type: ignore[untyped-decorator]
def score(model: Any, rows: Sequence[Row], pad: int) -> list[list[float]]:
    """Log-probabilities (T,) of each row's completion under the model as it is, 0 where the model did not write."""
    was_training = model.training
    model.eval()
    scored: list[list[float]] = [[] for _ in rows]
    for some in _passes(rows):
        batch = collate([rows[index] for index in some], pad, ratio=False, reference=None)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        found, _ = token_logprobs(model, ids, mask, batch["tool_mask"])
        for index, line in zip(some, found.tolist(), strict=True):
            scored[index] = line[: len(rows[index].mask)]
    model.train(was_training)
    return scored


def _passes(rows: Sequence[Row]) -> list[list[int]]:
    """Row numbers, a list for each pass: of like length, and equal rows side by side (they are computed once)."""
    passes: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda index: (rows[index].tokens, _content(rows[index]))):
        if passes and (len(passes[-1]) + 1) * rows[index].tokens <= SCORED_AT_ONCE:
            passes[-1].append(index)
        else:
            passes.append([index])
    return passes


def _content(row: Row) -> tuple[tuple[int, ...], ...]:
    """What the model reads and writes in a row."""
    return row.prompt_ids, row.completion_ids, row.mask


def check_versions(
    model: Any, rows: Sequence[Row], versions: Mapping[str, Path | None], pad: int, report: Report
) -> list[Row]:
    """The rows that their claimed version would have written. `versions`: its adapter's folder, None for the base.

    Rows of versions that are not in it stay unchecked.
    """
    kept: list[Row] = []
    for version in dict.fromkeys(row.version for row in rows):
        mine = [row for row in rows if row.version == version]
        if version not in versions:
            kept.extend(mine)
            continue
        with _acting(model, versions[version]):
            kept.extend(matching(mine, score(model, mine, pad), report))
    order = {row.spans: index for index, row in enumerate(rows)}
    report.rows = len(kept)
    return sorted(kept, key=lambda row: order[row.spans])


@contextlib.contextmanager
def _acting(model: Any, folder: Path | None) -> Any:
    """The model as one version."""
    if folder is None:
        with model.disable_adapter():
            yield
        return
    model.load_adapter(str(folder), adapter_name="acting", is_trainable=False)
    model.set_adapter("acting")
    try:
        yield
    finally:
        model.set_adapter("default")
        model.delete_adapter("acting")


def train(
    base: Path,
    rows: Sequence[Row],
    spec: TrainSpec,
    out: Path,
    *,
    work: Path,
    parent: Path | None = None,
    versions: Mapping[str, Path | None] | None = None,
    report: Report | None = None,
    job_id: str | None = None,
    on_step: OnStep | None = None,
) -> Trained:
    """Train an adapter of the model in `base` on `rows` and write it to `out`.

    With `parent` its adapter is trained on. `versions` are checked against the rows' log-probabilities before (see
    `check_versions`). `work` holds checkpoints; a run that finds some goes on from the latest. Raises BadInput where
    nothing is left to learn from.
    """
    began = time.monotonic()
    how = method(spec.method)
    model, tokenizer = load_base(base)
    model = wrap(model, spec, parent)
    pad = int(tokenizer.pad_token_id or 0)
    report = report or Report()
    if versions is not None:
        rows = check_versions(model, rows, versions, pad, report)
    rows = usable(rows, how, spec.beta)
    guard = Guard(spec.limits, on_step)
    trainer = _trainer(model, tokenizer, rows, spec, how, work, guard)
    trainer.remove_callback(PrinterCallback)  # it writes to stdout, which belongs to --json
    trainer.add_callback(guard)
    last = get_last_checkpoint(str(work)) if spec.checkpoint_steps and work.is_dir() else None
    try:
        trainer.train(resume_from_checkpoint=last)
    except Collapsed as error:
        guard.stopped = error.message
    steps = int(trainer.state.global_step)
    if guard.stopped is None and not _finite(model):
        guard.stopped = "a weight is not finite"
    if guard.stopped is not None:
        return Trained(None, steps, len(rows), time.monotonic() - began, guard.curves, guard.stopped)
    metrics: dict[str, float | None] = {**(guard.curves[-1] if guard.curves else {}), "rows": float(len(rows))}
    out.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    named = None if parent is None else parent.name
    adapter.save(
        model,
        out,
        base=base,
        method=spec.method,
        job_id=job_id,
        parent=named,
        metrics=metrics,
        canaries=canaries(model, tokenizer, rows),
    )
    return Trained(out, steps, len(rows), time.monotonic() - began, guard.curves)


def usable(rows: Sequence[Row], how: Method, beta: float = 0.0) -> list[Row]:
    """What the method learns from. Raises BadInput where that is nothing.

    Methods that imitate take each different answer once, as rejection sampling does (Yuan et al. 2023): what the model
    says most anyway would count most else. The others leave out rows whose advantages are all 0 (every answer to
    the task earned the same): without a penalty (`beta`) no gradient comes from them.
    """
    if how.positive:
        best = max((value for row in rows for value in row.advantages), default=0.0)
        if best <= 0:
            raise BadInput("no step did better than expected: there is nothing to imitate", param="method")
        rows = _different([_kept(row, best) for row in rows if any(value > 0 for value in row.advantages)])
    elif how.trainer == "logged":
        if not any(value for row in rows for value in row.advantages):
            raise BadInput("every advantage is 0: all answers to a task earned the same", param="credit")
        rows = [row for row in rows if beta or any(row.advantages)]
    if not rows:
        raise BadInput("no row is left to learn from", param="rows")
    return list(rows)


def _different(rows: Sequence[Row]) -> list[Row]:
    """One of each set of equal rows, with the mean of their advantages."""
    groups: dict[tuple[tuple[int, ...], ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_content(row), []).append(row)
    return [
        replace(same[0], advantages=tuple(map(float, np.mean([row.advantages for row in same], axis=0))))
        for same in groups.values()
    ]


def _kept(row: Row, best: float) -> Row:
    """Steps with a positive advantage count by it, the best 1; the others are masked."""
    good = tuple(int(value > 0) for value in row.advantages)
    logprobs = None
    if row.logprobs is not None:
        logprobs = tuple(value if one else 0.0 for value, one in zip(row.logprobs, good, strict=True))
    return replace(row, mask=good, advantages=tuple(max(one, 0.0) / best for one in row.advantages), logprobs=logprobs)


def _trainer(
    model: Any, tokenizer: Any, rows: Sequence[Row], spec: TrainSpec, how: Method, work: Path, guard: Guard
) -> Any:
    if how.trainer == "logged":
        return logged_trainer(model, tokenizer, rows, spec, how, work)
    from optimize.rl import preference

    if how.trainer == "sft":
        from trl import SFTConfig  # type: ignore[attr-defined]

        records = preference.sft_records(rows)
        args = SFTConfig(**_arguments(spec, how, work, len(records)), max_length=None)
        return preference.ReadySFT(model, args, train_dataset=preference.dataset(records), processing_class=tokenizer)
    from trl import DPOConfig, KTOConfig  # type: ignore[attr-defined]

    kto = how.trainer == "kto"
    records = preference.kto_records(rows) if kto else preference.dpo_records(rows)
    config = KTOConfig if kto else DPOConfig
    kind = preference.ReadyKTO if kto else preference.ReadyDPO
    beta: dict[str, Any] = {"beta": spec.beta} if spec.beta else {}
    args = config(**_arguments(spec, how, work, len(records)), max_length=None, **beta)
    return kind(model, args=args, train_dataset=preference.dataset(records), processing_class=tokenizer)


def logged_trainer(
    model: Any, tokenizer: Any, rows: Sequence[Row], spec: TrainSpec, how: Method, work: Path
) -> LoggedTrainer:
    """TRL's GRPO loss on the rows. The ratio is to the logged policy where every row has one."""
    from trl import GRPOConfig  # type: ignore[attr-defined]

    size = spec.batch_size * spec.accumulation
    args = GRPOConfig(
        **_arguments(spec, how, work, len(rows)),
        loss_type=how.loss,
        importance_sampling_level=how.level,
        epsilon=how.low,
        epsilon_high=how.high,
        beta=spec.beta,
        temperature=1.0,
        num_generations=max(size, 2),
        generation_batch_size=max(size, 2),
        max_completion_length=max(len(row.completion_ids) for row in rows),
    )
    with _base(model):
        reference = score(model, rows, int(tokenizer.pad_token_id or 0))
    ratio = all(row.logprobs is not None for row in rows)
    return LoggedTrainer(model, rows, args, tokenizer, ratio=ratio, reference=reference, share=spec.share)


def _base(model: Any) -> Any:
    return model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()


def _arguments(spec: TrainSpec, how: Method, work: Path, count: int) -> dict[str, Any]:
    """What all of TRL's trainers take."""
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(work),
        "per_device_train_batch_size": spec.batch_size,
        "gradient_accumulation_steps": spec.accumulation,
        "max_steps": max(1, math.ceil(count * spec.epochs / (spec.batch_size * spec.accumulation))),
        "learning_rate": how.learning_rate if spec.learning_rate is None else spec.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 1,
        "max_grad_norm": 1.0,
        "seed": spec.seed,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": spec.gradient_checkpointing,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "steps" if spec.checkpoint_steps else "no",
        "save_steps": spec.checkpoint_steps or 500,
        "save_total_limit": 2,
        "remove_unused_columns": False,
    }


def _finite(model: Any) -> bool:
    return all(bool(torch.isfinite(one).all()) for one in model.parameters() if one.requires_grad)
