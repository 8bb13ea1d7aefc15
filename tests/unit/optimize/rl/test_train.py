"""A training run: what it writes, what it refuses, and that it can be broken off and repeated."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="training needs the extra `rl`")

from safetensors.torch import load_file
from trl import SFTTrainer

from collector.engines import EngineFailed, HttpEngine, Served, try_out
from collector.errors import BadInput
from collector.settings import EngineEntry
from optimize.rl.adapter import MANIFEST, WEIGHTS, verify
from optimize.rl.attention import Segment
from optimize.rl.engine import Engine
from optimize.rl.guard import Guard, Limits
from optimize.rl.memory import Memory
from optimize.rl.methods import METHODS, method
from optimize.rl.model import LanguageModel
from optimize.rl.preference import dpo_records, kto_records, sft_records
from optimize.rl.rows import Report, Row
from optimize.rl.train import TrainSpec, _trainer, check_versions, load_base, score, train, usable, wrap
from tests.unit.optimize.rl.conftest import served, tiny_gemma

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
GOOD, BAD = (40, 41), (50, 51, 52)


def rows() -> list[Row]:
    """Two prompts, each with a good and a bad answer, as the tiny model would have written them."""
    made = []
    for number in range(8):
        answer = GOOD if number % 2 else BAD
        gain = 1.0 if number % 2 else -1.0
        size = len(answer)
        prompt = (10, 11, 12, 13 + number // 2 % 2)
        made.append(Row(f"e{number}", (f"s{number}",), "tiny", prompt, answer, (1,) * size, (gain,) * size))
    with torch.no_grad():
        scored = score(tiny_gemma(), made, 0)
    return [replace(row, logprobs=tuple(line)) for row, line in zip(made, scored, strict=True)]


def spec(name: str, **options: Any) -> TrainSpec:
    return TrainSpec(**{"method": name, "rank": 2, "alpha": 4, "learning_rate": 5e-3, "batch_size": 4, **options})


def total(model: Any, row: Row) -> float:
    return sum(score(model, [row], 0)[0])


def gain_of(base: Path, folder: Path, row: Row) -> float:
    """How much likelier the adapter makes a row's answer."""
    from peft import PeftModel

    model, _ = load_base(base)
    before = total(model, row)
    return total(PeftModel.from_pretrained(model, folder), row) - before


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_makes_the_good_answer_likelier_than_the_bad_one(
    name: str, tiny_directory: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapters" / "a"
    made = train(tiny_directory, rows(), spec(name, epochs=3), out, work=tmp_path / "work", job_id="job-1")
    assert made.directory == out and made.steps > 0 and made.stopped is None
    good, bad = rows()[1], rows()[0]
    assert gain_of(tiny_directory, out, good) > gain_of(tiny_directory, out, bad)
    manifest = verify(out, root=tmp_path, base=tiny_directory)
    assert manifest.method == name and manifest.job_id == "job-1"
    assert all(math.isfinite(one["loss"]) for one in made.curves)


def test_the_curves_tell_divergence_entropy_clipping_and_length(tiny_directory: Path, tmp_path: Path) -> None:
    made = train(tiny_directory, rows(), spec("grpo"), tmp_path / "a", work=tmp_path / "work")
    last = made.curves[-1]
    assert {"loss", "kl_base", "kl_logged", "entropy", "clip_share", "length", "grad_norm"} <= set(last)
    assert made.curves[0]["kl_base"] == pytest.approx(0, abs=1e-6) and last["kl_base"] > 0


def test_the_trained_adapter_is_served_by_the_engine(tiny_directory: Path, tmp_path: Path) -> None:
    train(tiny_directory, rows(), spec("rft", epochs=6), tmp_path / "a", work=tmp_path / "work")
    model = LanguageModel.load(tiny_directory)
    model.adapters.load("a", tmp_path / "a")
    logits = model.forward([Segment(Memory(), rows()[1].prompt_ids, 0, "a")])[0]
    plain = model.forward([Segment(Memory(), rows()[1].prompt_ids, 0, None)])[0]
    assert torch.log_softmax(logits, -1)[GOOD[0]] > torch.log_softmax(plain, -1)[GOOD[0]]


def test_an_engine_is_told_from_another_adapter_by_the_fixed_answers(tiny_directory: Path, tmp_path: Path) -> None:
    """The canary that comes with an adapter passes under it, and fails where the base is served in its name."""
    train(
        tiny_directory, rows(), spec("rft", epochs=12, limits=Limits(most_kl=1e9)), tmp_path / "a", work=tmp_path / "w"
    )
    engine = Engine(LanguageModel.load(tiny_directory), "tiny")
    engine.model.adapters.load("a", tmp_path / "a")
    with served(engine.app()) as url:
        client = HttpEngine(EngineEntry(api_base=f"{url}/v1", base_model="tiny"))
        try_out(client, Served("tiny", "a", tmp_path / "a"))
        with pytest.raises(EngineFailed):
            try_out(client, Served("tiny", "tiny", tmp_path / "a"))
        client.close()


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(tiny_directory: Path, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tiny_directory, rows(), spec("grpo", seed=seed), tmp_path / name, work=tmp_path / f"work-{name}")
        found.append(load_file(tmp_path / name / WEIGHTS))
    same = [torch.equal(found[0][key], found[1][key]) for key in found[0]]
    other = [torch.equal(found[0][key], found[2][key]) for key in found[0]]
    assert all(same) and not all(other)


class Broken(Exception):
    pass


def test_a_run_that_was_broken_off_ends_as_if_it_had_not_been(tiny_directory: Path, tmp_path: Path) -> None:
    asked = spec("grpo", epochs=4, checkpoint_steps=2)

    def break_off(step: int, of: int, found: Any) -> None:
        if step == 5:
            raise Broken

    with pytest.raises(Broken):
        train(tiny_directory, rows(), asked, tmp_path / "a", work=tmp_path / "work", on_step=break_off)
    assert not (tmp_path / "a").exists()
    steps: list[int] = []
    train(
        tiny_directory, rows(), asked, tmp_path / "a", work=tmp_path / "work", on_step=lambda at, *_: steps.append(at)
    )
    assert steps[0] == 5
    train(tiny_directory, rows(), replace(asked, checkpoint_steps=None), tmp_path / "b", work=tmp_path / "other")
    one, two = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "b" / WEIGHTS)
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)


def test_a_second_round_trains_the_first_ones_adapter_on(tiny_directory: Path, tmp_path: Path) -> None:
    train(tiny_directory, rows(), spec("rft"), tmp_path / "one", work=tmp_path / "w1")
    made = train(
        tiny_directory, rows(), spec("rft", epochs=1), tmp_path / "two", work=tmp_path / "w2", parent=tmp_path / "one"
    )
    assert made.curves[0]["kl_base"] > 0
    assert json.loads((tmp_path / "two" / MANIFEST).read_text())["parent"] == "one"


def test_a_run_that_dissolves_is_stopped_and_leaves_no_adapter(tiny_directory: Path, tmp_path: Path) -> None:
    limits = Limits(most_kl=0.01, patience=2)
    asked = spec("grpo", learning_rate=0.5, epochs=20, limits=limits)
    made = train(tiny_directory, rows(), asked, tmp_path / "a", work=tmp_path / "work")
    assert made.directory is None and made.stopped is not None and not (tmp_path / "a").exists()
    assert made.steps < 40


@pytest.mark.parametrize(
    ("figures", "word"),
    [
        ({"kl_base": 9.0}, "divergence"),
        ({"entropy": 9.0}, "entropy"),
        ({"loss": float("nan")}, "finite"),
    ],
)
def test_the_guard_says_what_collapsed(figures: dict[str, float], word: str) -> None:
    class State:
        global_step, max_steps = 1, 10
        should_training_stop = False

    guard = Guard(Limits())
    for _ in range(3):
        guard.on_log(None, State(), State(), {"loss": 1.0, "grad_norm": 1.0, "entropy": 1.0})
    assert guard.stopped is None
    control = State()
    for _ in range(3):
        guard.on_log(None, State(), control, {"loss": 1.0, "grad_norm": 1.0, "entropy": 1.0, **figures})
    assert word in (guard.stopped or "") and control.should_training_stop


def test_rows_of_another_policy_than_they_claim_are_dropped(tiny_directory: Path, tmp_path: Path) -> None:
    train(
        tiny_directory, rows(), spec("rft", epochs=6, limits=Limits(most_kl=1e9)), tmp_path / "a", work=tmp_path / "w"
    )
    model, _ = load_base(tiny_directory)
    model = wrap(model, spec("rft"), None)
    mixed = [replace(row, version="tiny@1") if row.completion_ids == GOOD else row for row in rows()]
    report = Report()
    kept = check_versions(model, mixed, {"tiny": None, "tiny@1": tmp_path / "a"}, 0, report)
    assert kept == mixed[::2] and report.counts["mismatch"] == 4
    assert check_versions(model, mixed, {"tiny": None}, 0, Report()) == mixed
    assert model.active_adapters == ["default"]


def test_nothing_to_learn_from_is_said(tiny_directory: Path) -> None:
    flat = [replace(row, advantages=(0.0,) * len(row.mask)) for row in rows()]
    with pytest.raises(BadInput, match="nothing to imitate"):
        usable(flat, method("rft"))
    with pytest.raises(BadInput, match="every advantage is 0"):
        usable(flat, method("grpo"))
    with pytest.raises(BadInput, match="there is no method"):
        method("ppo")
    with pytest.raises(BadInput, match="better and steps that did worse"):
        kto_records([rows()[0]])
    with pytest.raises(BadInput, match="better and worse answers to one prompt"):
        dpo_records([rows()[1]])


def test_methods_that_imitate_take_each_different_answer_once() -> None:
    often = [replace(row, advantages=(0.25 * (1 + index),) * len(row.mask)) for index, row in enumerate(rows()[1::2])]
    kept = usable(often, method("rft"))
    assert [row.prompt_ids[-1] for row in kept] == [13, 14]
    # Of 0.25, 0.5, 0.75, 1: the first and third are to one prompt, the others to another.
    assert [row.advantages for row in kept] == [(0.5, 0.5), (0.75, 0.75)]


def test_rows_that_no_gradient_comes_from_are_left_out_where_nothing_else_weighs() -> None:
    flat = [replace(row, advantages=(0.0,) * len(row.mask)) for row in rows()[:3]]
    assert usable([*flat, *rows()[3:]], method("grpo")) == rows()[3:]
    assert len(usable([*flat, *rows()[3:]], method("grpo"), beta=0.1)) == 8


def test_the_loss_of_plain_likelihood_is_trls_own(tiny_directory: Path, tmp_path: Path) -> None:
    """Prompts of different lengths, a masked token, a beginning shared by all."""
    first = tuple(range(60, 75))
    made = [
        replace(row, prompt_ids=(*first, *row.prompt_ids[: 1 + index % 3]), mask=(1, 0, 1)[: len(row.mask)])
        for index, row in enumerate(rows())
    ]
    model, tokenizer = load_base(tiny_directory)
    model = wrap(model, spec("sft"), None)
    trainer = _trainer(model, tokenizer, made, spec("sft"), method("sft"), tmp_path, Guard(Limits()))
    batch = trainer.data_collator([dict(one) for one in trainer.train_dataset])
    found, wanted = trainer.compute_loss(model, dict(batch)), SFTTrainer.compute_loss(trainer, model, dict(batch))
    learned = [one for one in model.parameters() if one.requires_grad]
    assert found.item() == pytest.approx(wanted.item(), abs=1e-5)
    pairs = zip(torch.autograd.grad(found, learned), torch.autograd.grad(wanted, learned), strict=True)
    assert all(torch.allclose(one, two, atol=1e-5, rtol=1e-4) for one, two in pairs)


def test_datasets_are_made_of_ids_and_rewards() -> None:
    assert dpo_records(rows()) == [
        {"prompt_ids": [10, 11, 12, last], "chosen_ids": list(GOOD), "rejected_ids": list(BAD)} for last in (13, 14)
    ]
    records = kto_records(rows()[:2])
    assert [one["label"] for one in records] == [False, True]
    assert records[0]["KL_completion_ids"] == list(GOOD)
    masked = replace(rows()[0], mask=(1, 0, 1))
    assert sft_records([masked])[0]["labels"] == [-100] * 4 + [50, -100, 52]
