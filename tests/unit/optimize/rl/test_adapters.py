import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from collector.errors import BadInput
from optimize.rl.attention import Segment
from optimize.rl.memory import Memory
from optimize.rl.model import LanguageModel
from tests.unit.optimize.rl.conftest import byte_tokenizer, tiny_gemma

# PEFT asks the model by a name that transformers 6 will drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

IDS = [5, 77, 130, 9, 42, 201]


def made(directory: Path, seed: int = 1, **options: Any) -> Any:
    """A saved adapter with random weights, and PEFT's own model of it."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    base = tiny_gemma()
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, 0, 0.1)
    model.save_pretrained(directory)
    return model.eval()


def alone(model: LanguageModel, adapter: str | None) -> torch.Tensor:
    return model.forward([Segment(Memory(), IDS, adapter=adapter)])[0]


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_computes_what_peft_computes(tmp_path: Path, rslora: bool) -> None:
    reference = made(tmp_path, use_rslora=rslora)
    model = LanguageModel(tiny_gemma(), byte_tokenizer())
    model.adapters.load("mine", tmp_path)
    with torch.inference_mode():
        expected = reference(torch.tensor([IDS])).logits[0, -1]
    torch.testing.assert_close(alone(model, "mine"), expected, atol=1e-4, rtol=1e-4)
    assert (alone(model, "mine") - alone(model, None)).abs().max() > 0.1


def test_two_adapters_and_the_base_share_a_step_and_change_nothing_for_each_other(tmp_path: Path) -> None:
    model = LanguageModel(tiny_gemma(), byte_tokenizer())
    base = alone(model, None)
    for index, name in enumerate(("one", "two")):
        made(tmp_path / name, seed=index)
        model.adapters.load(name, tmp_path / name)
    names = [None, "one", "two", None, "one"]
    mixed = model.forward([Segment(Memory(), IDS, adapter=name) for name in names])
    for name, got in zip(names, mixed, strict=True):
        torch.testing.assert_close(got, alone(model, name), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone(model, None), base, atol=0, rtol=0)


def test_a_name_is_loaded_once(tmp_path: Path) -> None:
    made(tmp_path)
    model = LanguageModel(tiny_gemma(), byte_tokenizer())
    model.adapters.load("mine", tmp_path)
    with pytest.raises(BadInput, match="use a new name"):
        model.adapters.load("mine", tmp_path)


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(directory: Path, change: Any) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: change_config(d, use_dora=True), "`use_dora`: True is not supported"),
        (lambda d: change_config(d, modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda d: change_config(d, peft_type="IA3"), "not LORA"),
        (lambda d: (d / "adapter_config.json").unlink(), "cannot read adapter_config.json"),
        (lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"), "only safetensors"),
        (lambda d: change_weights(d, lambda t: t[min(t)].fill_(float("nan"))), "not finite"),
        (lambda d: change_weights(d, lambda t: t.pop(min(t))), "does not fit"),
        (
            lambda d: change_weights(d, lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(1)})),
            "fits no",
        ),
        (lambda d: change_weights(d, lambda t: t.update({min(t): torch.ones(4, 3)})), "does not fit"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_whole(tmp_path: Path, damage: Any, message: str) -> None:
    made(tmp_path)
    damage(tmp_path)
    model = LanguageModel(tiny_gemma(), byte_tokenizer())
    before = alone(model, None)
    with pytest.raises(BadInput, match=message):
        model.adapters.load("mine", tmp_path)
    assert model.adapters.names == []
    torch.testing.assert_close(alone(model, None), before, atol=0, rtol=0)
