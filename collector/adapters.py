"""Adapter folders: what may be registered. Only safetensors and JSON, only inside the data directory."""

import hashlib
import json
from pathlib import Path

from collector.errors import BadInput

_ALLOWED = (".safetensors", ".json")
# dtype -> how to view it, and its exponent bits
_FLOATS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


def served_name(slot: str, version: int, content: str) -> str:
    """The model name under which engines serve a version; `content` is its hash."""
    return f"{slot}@{version}-{content}"


def content_hash(path: str, base_model: str, root: Path) -> str:
    """First 12 hex digits of the sha256 over the base model's name and the folder's files.

    Raises BadInput for a path outside `root` (links resolved), one without safetensors, or with other kinds of file (a
    pickled one could run code when it is read), for weights that are not finite, and for a `manifest.json` that names
    another base model or other weights.
    """
    folder = Path(path)
    folder = (folder if folder.is_absolute() else root / folder).resolve()
    if not folder.is_relative_to(root.resolve()):
        raise BadInput(f"path: adapters are registered from {root} only", param="path")
    if not folder.is_dir():
        raise BadInput(f"path: {folder} is not a folder", param="path")
    files = sorted(file for file in folder.rglob("*") if not file.is_dir())
    for file in files:
        if file.is_symlink() or file.suffix not in _ALLOWED:
            raise BadInput(f"path: {file.name} is not safetensors or JSON", param="path")
    if not any(file.suffix == ".safetensors" for file in files):
        raise BadInput(f"path: {folder} holds no safetensors file", param="path")
    _expect_manifest(folder, base_model)
    for file in files:
        if file.suffix == ".safetensors":
            _expect_finite(file)
    digest = hashlib.sha256(base_model.encode())
    for file in files:
        with file.open("rb") as opened:
            digest.update(f"\n{file.relative_to(folder)}\n".encode())
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:12]


def _expect_manifest(folder: Path, base_model: str) -> None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        base, weights = manifest["base_model"], manifest["weights_sha256"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"path: manifest.json can't be read: {error!r}", param="path") from None
    if base != base_model:
        raise BadInput(f"base_model: the adapter was trained on {base}, not on {base_model}", param="base_model")
    file = folder / "adapter_model.safetensors"
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != weights:
        raise BadInput("path: the weights are not those of manifest.json", param="path")


def _expect_finite(file: Path) -> None:
    """Looks at exponent bits (all set: infinite or no number), so that bfloat16 needs no library.

    The format: 8 bytes little-endian length, a JSON header of that length, the tensors' bytes.
    """
    import numpy as np  # not at the top: the proxy's workers import this module for a name

    data = np.fromfile(file, dtype=np.uint8)
    try:
        start = 8 + int(data[:8].view("<u8")[0])
        header = json.loads(data[8:start].tobytes())
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            begin, end = tensor["data_offsets"]
            if not 0 <= begin <= end <= len(data) - start:
                raise ValueError("a tensor beyond the end")
            kind, mask = _FLOATS.get(tensor["dtype"], (None, 0))
            if kind is not None and bool(((data[start + begin : start + end].view(kind) & mask) == mask).any()):
                raise BadInput(f"path: {file.name}: `{name}` is not finite", param="path")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise BadInput(f"path: {file.name} is not a safetensors file", param="path") from None
