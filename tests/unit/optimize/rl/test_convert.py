import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from collector.errors import BadInput, RatchetError
from optimize.rl import convert
from optimize.rl.convert import DEMO_MODEL, dequantized, ensure_demo_model, hf_name, is_complete
from optimize.rl.ggufile import GGUFFile

gguf = pytest.importorskip("gguf", reason="needs the extra `demo`")


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A small GGUF file by the gguf package's own writer: one quantised matrix, one norm."""
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    norm = np.ones(64, np.float32) * 1.5
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma3")
    writer.add_context_length(256)
    writer.add_token_list(["a", "é", "c"])
    writer.add_token_scores([0.5, 1.5, -1.0])
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.3.attn_q.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "x.gguf", {"blk.3.attn_q.weight": values, "output_norm.weight": norm}


def test_a_gguf_file_is_read_as_its_own_package_reads_it(written: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, values = written
    file = GGUFFile(path)
    assert file.metadata["gemma3.context_length"] == 256
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "é", "c"]
    assert file.metadata["tokenizer.ggml.scores"] == [0.5, 1.5, -1.0]
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    matrix = dequantized(file, file.tensors["blk.3.attn_q.weight"])
    expected = gguf.dequantize(reference["blk.3.attn_q.weight"].data, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(matrix, expected)
    assert np.abs(matrix - values["blk.3.attn_q.weight"]).max() < 0.05
    np.testing.assert_array_equal(dequantized(file, file.tensors["output_norm.weight"]), np.full(64, 0.5))


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PK" + bytes(100))
    with pytest.raises(BadInput, match="not a GGUF file"):
        GGUFFile(tmp_path / "x")


def test_every_tensor_has_its_name_in_transformers() -> None:
    assert hf_name("token_embd.weight") == "model.embed_tokens.weight"
    assert hf_name("output_norm.weight") == "model.norm.weight"
    assert hf_name("blk.12.post_ffw_norm.weight") == "model.layers.12.post_feedforward_layernorm.weight"
    with pytest.raises(KeyError):
        hf_name("blk.1.ssm_a.weight")


def fake(work: Path, _: Any) -> None:
    output = work / "model"
    output.mkdir()
    (output / "model.safetensors").write_bytes(b"12345")
    (output / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": {"bytes": 5}}}))


def test_a_second_call_converts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_convert", fake)
    target = ensure_demo_model(tmp_path)
    assert target == tmp_path / "models" / DEMO_MODEL
    monkeypatch.setattr(convert, "_convert", lambda *_: pytest.fail("converted twice"))
    assert ensure_demo_model(tmp_path) == target


def test_an_interrupted_conversion_leaves_nothing_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(work: Path, _: Any) -> None:
        (work / "model.gguf").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_demo_model(tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [f".{DEMO_MODEL}.lock"]
    killed = tmp_path / "models" / f".{DEMO_MODEL}-killed"
    killed.mkdir()
    monkeypatch.setattr(convert, "_convert", fake)
    assert is_complete(ensure_demo_model(tmp_path))
    assert not killed.exists()


def test_a_truncated_model_is_converted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_convert", fake)
    target = ensure_demo_model(tmp_path)
    (target / "model.safetensors").write_bytes(b"1")
    assert not is_complete(target)
    assert is_complete(ensure_demo_model(tmp_path))


def test_a_missing_extra_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(RatchetError, match=r"missing: gguf.*pip install 'agent-ratchet\[demo\]'"):
        ensure_demo_model(tmp_path)
