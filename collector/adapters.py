"""Adapter folders: what may be registered. Only safetensors and JSON, only inside the data directory."""

import hashlib
from pathlib import Path

from collector.errors import BadInput

_ALLOWED = (".safetensors", ".json")


def content_hash(path: str, base_model: str, root: Path) -> str:
    """First 12 hex digits of the sha256 over the base model's name and the folder's files.

    Raises BadInput for a path outside `root` (links resolved), one without safetensors, or with other kinds of file:
    a pickled file could run code when it is read.
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
    digest = hashlib.sha256(base_model.encode())
    for file in files:
        with file.open("rb") as opened:
            digest.update(f"\n{file.relative_to(folder)}\n".encode())
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:12]
