import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from collector.errors import BadInput
from optimize.rl.attention import Segment, attend
from optimize.rl.memory import Memory
from optimize.rl.model import LanguageModel
from tests.unit.optimize.rl.conftest import byte_tokenizer, tiny_gemma, tiny_llama


def ids_of(seed: int, length: int) -> list[int]:
    return torch.randint(2, 258, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0, -1]
    return logits


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 12), st.sampled_from([None, 1, 4, 9]), st.sampled_from([1, 2, 4]))
def test_attention_is_the_textbook_formula(count: int, past: int, window: int | None, groups: int) -> None:
    torch.manual_seed(count * 100 + past)
    query, keys, values = torch.randn(4, count, 8), *torch.randn(2, groups, past + count, 8)
    got = attend(query, keys, values, 0.3, window)
    for head in range(4):
        for step in range(count):
            last = past + step + 1
            first = 0 if window is None else max(0, last - window)
            part = slice(first, last)
            group = head // (4 // groups)
            weights = torch.softmax(keys[group, part] @ query[head, step] * 0.3, dim=0)
            torch.testing.assert_close(got[head, step], weights @ values[group, part], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [tiny_gemma, tiny_llama])
def test_a_mixed_step_gives_each_row_what_transformers_gives_it_alone(make: Any) -> None:
    reference, model = make(), LanguageModel(make(), byte_tokenizer())
    rows = [ids_of(1, 1), ids_of(2, 5), ids_of(3, 30)]
    memories = [Memory() for _ in rows]
    logits = model.forward([Segment(memory, ids) for memory, ids in zip(memories, rows, strict=True)])
    for ids, got in zip(rows, logits, strict=True):
        torch.testing.assert_close(got, expected(reference, ids), atol=1e-4, rtol=1e-4)
    for step in range(12):
        fresh = [ids_of(10 + step + index, 1) for index in range(3)]
        segments = [Segment(memories[i], fresh[i], len(rows[i])) for i in range(3)]
        logits = model.forward(segments)
        rows = [ids + new for ids, new in zip(rows, fresh, strict=True)]
    for ids, got in zip(rows, logits, strict=True):
        torch.testing.assert_close(got, expected(reference, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [tiny_gemma, tiny_llama])
def test_a_prompt_computed_in_pieces_gives_the_same_logits(make: Any) -> None:
    reference, model = make(), LanguageModel(make(), byte_tokenizer())
    ids, memory = ids_of(4, 40), Memory()
    for start, end in ((0, 7), (7, 8), (8, 25)):
        assert model.forward([Segment(memory, ids[start:end], start, wanted=False)]).shape[0] == 0
    logits = model.forward([Segment(memory, ids[25:], 25)])
    torch.testing.assert_close(logits[0], expected(reference, ids), atol=1e-4, rtol=1e-4)


def test_pickled_weights_are_not_loaded(tmp_path: Path, tiny_directory: Path) -> None:
    for file in tiny_directory.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(tiny_gemma().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match="pickled weights are not loaded"):
        LanguageModel.load(tmp_path)


def test_remote_code_is_not_run(tmp_path: Path, tiny_directory: Path) -> None:
    for file in tiny_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(BadInput, match="cannot load"):
        LanguageModel.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_architecture_without_attention_is_refused() -> None:
    config = MambaConfig(vocab_size=258, hidden_size=16, state_size=4, num_hidden_layers=1)
    config.max_position_embeddings = 64
    with pytest.raises(BadInput, match="cannot be served"):
        LanguageModel(MambaForCausalLM(config), byte_tokenizer())


def test_layers_with_a_bias_are_computed_too() -> None:
    def make() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()

    reference, model = make(), LanguageModel(make(), byte_tokenizer())
    ids = ids_of(5, 12)
    got = model.forward([Segment(Memory(), ids)])[0]
    torch.testing.assert_close(got, expected(reference, ids), atol=1e-4, rtol=1e-4)
