from pathlib import Path

import pytest

from collector.adapters import content_hash
from collector.errors import BadInput


def adapter(root: Path, *names: str) -> Path:
    folder = root / "a1"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).write_text(name)
    return folder


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
