"""Adapter folders: what is written can be checked, and what was changed, foreign or broken is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from collector.errors import BadInput
from optimize.rl.adapter import CONFIG, MANIFEST, WEIGHTS, base_sha256, save, verify
from optimize.rl.model import LanguageModel
from tests.unit.optimize.rl.conftest import tiny_gemma, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def made(tiny_directory: Path, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_gemma(), config)
    folder = tmp_path / "adapters" / "one"
    folder.parent.mkdir()
    save(model, folder, base=tiny_directory, method="rft", job_id="job-1", metrics={"kl": 0.5, "loss": float("nan")})
    return folder


def rewrite(folder: Path, name: str, **changes: Any) -> None:
    found = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**found, **changes}))


def test_a_saved_adapter_passes_its_own_checks_and_is_served(made: Path, tmp_path: Path, tiny_directory: Path) -> None:
    manifest = verify(made, root=tmp_path, base=tiny_directory)
    assert (manifest.rank, manifest.targets, manifest.method) == (4, ("down_proj", "q_proj"), "rft")
    assert manifest.metrics == {"kl": 0.5, "loss": None}
    assert manifest.base_sha256 == base_sha256(tiny_directory)
    assert sorted(file.name for file in made.iterdir()) == [CONFIG, WEIGHTS, MANIFEST]
    model = LanguageModel.load(tiny_directory)
    model.adapters.load("one", made)


def test_a_version_is_never_overwritten(made: Path, tiny_directory: Path) -> None:
    with pytest.raises(BadInput, match="never overwritten"):
        save(None, made, base=tiny_directory, method="rft")


def test_an_adapter_outside_the_data_directory_is_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(BadInput, match="only"):
        verify(made, root=tmp_path / "data")


def test_a_pickled_file_beside_the_weights_is_refused(made: Path, tmp_path: Path) -> None:
    (made / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(BadInput, match="not safetensors"):
        verify(made, root=tmp_path)


def test_weights_that_are_no_safetensors_are_refused(made: Path, tmp_path: Path) -> None:
    import hashlib

    (made / WEIGHTS).write_bytes(b"\x80\x04pickled")
    rewrite(made, MANIFEST, weights_sha256=hashlib.sha256(b"\x80\x04pickled").hexdigest())
    with pytest.raises(BadInput, match="safetensors"):
        verify(made, root=tmp_path)


def test_changed_weights_are_refused(made: Path, tmp_path: Path) -> None:
    tensors = load_file(made / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, made / WEIGHTS)
    with pytest.raises(BadInput, match="the weights are not those of"):
        verify(made, root=tmp_path)


def test_a_changed_configuration_is_refused(made: Path, tmp_path: Path) -> None:
    rewrite(made, CONFIG, lora_alpha=800)
    with pytest.raises(BadInput, match="not that of"):
        verify(made, root=tmp_path)


def test_weights_that_are_not_finite_are_refused(made: Path, tmp_path: Path) -> None:
    import hashlib

    tensors = load_file(made / WEIGHTS)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] * float("nan")}, made / WEIGHTS)
    rewrite(made, MANIFEST, weights_sha256=hashlib.sha256((made / WEIGHTS).read_bytes()).hexdigest())
    with pytest.raises(BadInput, match="not finite"):
        verify(made, root=tmp_path)


def test_an_adapter_of_another_base_is_refused(made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_llama().save_pretrained(other)
    with pytest.raises(BadInput, match="was trained on tiny"):
        verify(made, root=tmp_path, base=other)
    with pytest.raises(BadInput, match="which is not llama"):
        verify(made, root=tmp_path, base_model="llama")


@pytest.mark.parametrize("text", ["", "[]", '{"rank": 4}'])
def test_a_folder_without_a_readable_manifest_is_refused(made: Path, tmp_path: Path, text: str) -> None:
    (made / MANIFEST).write_text(text)
    with pytest.raises(BadInput, match=r"manifest\.json"):
        verify(made, root=tmp_path)
