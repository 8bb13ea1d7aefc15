import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from collector.adapters import content_hash
from collector.errors import BadInput

WEIGHTS = save({"lora_A": np.ones((2, 3), np.float32), "count": np.array([1], np.int64)}, metadata={"format": "pt"})


def adapter(root: Path, *names: str) -> Path:
    folder = root / "a1"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).write_bytes(WEIGHTS if name.endswith(".safetensors") else name.encode())
    return folder


def manifest(folder: Path, base: str, weights: bytes = WEIGHTS) -> None:
    body = {"base_model": base, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(body))


def test_the_hash_is_of_the_content_and_the_base_model(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    first = content_hash(str(folder), "gemma", tmp_path)
    assert len(first) == 12
    assert content_hash("a1", "gemma", tmp_path) == first
    assert content_hash("a1", "qwen", tmp_path) != first
    (folder / "adapter_config.json").write_text("changed")
    assert content_hash("a1", "gemma", tmp_path) != first


def test_paths_outside_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    root.mkdir()
    outside = adapter(tmp_path / "elsewhere")
    (root / "link").symlink_to(outside)
    for path in (str(outside), "../elsewhere/a1", "link", "/etc", str(root / ".." / "elsewhere" / "a1")):
        with pytest.raises(BadInput) as caught:
            content_hash(path, "m", root)
        assert caught.value.param == "path"


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.pt", "model.pkl", "run.py", "noext"])
def test_files_that_could_run_code_are_refused(tmp_path: Path, name: str) -> None:
    adapter(tmp_path, "adapter_model.safetensors", name)
    with pytest.raises(BadInput, match="not safetensors or JSON"):
        content_hash("a1", "m", tmp_path)


def test_a_link_to_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    (folder / "more.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(BadInput, match="not safetensors"):
        content_hash("a1", "m", tmp_path)


def test_weights_must_be_there(tmp_path: Path) -> None:
    adapter(tmp_path, "adapter_config.json")
    with pytest.raises(BadInput, match="no safetensors"):
        content_hash("a1", "m", tmp_path)
    with pytest.raises(BadInput, match="not a folder"):
        content_hash("missing", "m", tmp_path)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, dtype: type, value: float) -> None:
    folder = adapter(tmp_path)
    weights = np.full((5, 7), np.finfo(dtype).max, dtype)
    save_file({"sound": weights, "lora_B": weights}, folder / "adapter_model.safetensors")
    content_hash("a1", "m", tmp_path)
    weights[3, 3] = value
    save_file({"sound": np.ones(3, dtype), "lora_B": weights}, folder / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="`lora_B` is not finite"):
        content_hash("a1", "m", tmp_path)


def test_bfloat16_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    for bits, sound in ((0x7F7F, True), (0xFF80, False), (0x7FC0, False)):
        body = len(header).to_bytes(8, "little") + header + np.array([0x3F80, bits], "<u2").tobytes()
        (folder / "adapter_model.safetensors").write_bytes(body)
        if sound:
            content_hash("a1", "m", tmp_path)
        else:
            with pytest.raises(BadInput, match="`w` is not finite"):
                content_hash("a1", "m", tmp_path)


@pytest.mark.parametrize("content", [b"", b"weights", b"\x80\x04pickle", WEIGHTS[:40], b"\xff" * 64])
def test_what_only_calls_itself_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (adapter(tmp_path) / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(BadInput, match="is not a safetensors file"):
        content_hash("a1", "m", tmp_path)


def test_a_manifest_is_believed_only_where_it_is_true(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    manifest(folder, "gemma")
    content_hash("a1", "gemma", tmp_path)
    with pytest.raises(BadInput, match="was trained on gemma, not on qwen"):
        content_hash("a1", "qwen", tmp_path)
    manifest(folder, "gemma", b"other")
    with pytest.raises(BadInput, match="not those of manifest"):
        content_hash("a1", "gemma", tmp_path)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(BadInput, match="can't be read"):
        content_hash("a1", "gemma", tmp_path)
