"""Adapter versions on disk: safetensors beside a manifest that says what they are, checked before anything uses them.

A folder holds `adapter_config.json` and `adapter_model.safetensors` (PEFT's format) and `manifest.json`. Nothing is
unpickled, and a folder that says one thing and holds another is refused.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from collector.adapters import content_hash
from collector.engines import CANARY_FILE
from collector.errors import BadInput

MANIFEST, CONFIG, WEIGHTS = "manifest.json", "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Manifest:
    """What an adapter is: of which base model (its folder's name and the sha256 of its files), made by which job.

    `metrics` are finite numbers of the training (last loss, KL to the base, steps and so on), None where not known.
    """

    base_model: str
    base_sha256: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    weights_sha256: str
    method: str
    job_id: str | None = None
    parent: str | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)


def base_sha256(directory: Path) -> str:
    """The sha256 over a base model's configuration and weights: two folders with the same files are the same base."""
    files = sorted([*directory.glob("*.safetensors"), directory / "config.json"])
    if len(files) < 2 or not all(file.is_file() for file in files):
        raise BadInput(f"{directory} holds no model: config.json and *.safetensors are expected", param="model")
    return _digest(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=4)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    """Of files as they are now: size and time are part of the key, so a changed file is read again."""
    whole = hashlib.sha256()
    for name, _, _ in files:
        whole.update(f"\n{os.path.basename(name)}\n".encode())
        whole.update(bytes.fromhex(_file_sha256(Path(name))))
    return whole.hexdigest()


def save(
    model: Any,
    directory: Path,
    *,
    base: Path,
    method: str,
    job_id: str | None = None,
    parent: str | None = None,
    metrics: Mapping[str, float | None] | None = None,
    canaries: Sequence[Mapping[str, Any]] = (),
) -> Manifest:
    """Write a PEFT model's adapter into a new folder, whole or not at all. Raises BadInput where the folder exists.

    `canaries` are fixed answers by which an engine is asked whether it serves what was trained (see `engines`).
    """
    if directory.exists():
        raise BadInput(f"{directory} exists: a version is never overwritten", param="adapter")
    draft = directory.with_name(f".{directory.name}.{os.getpid()}")
    model.save_pretrained(draft, safe_serialization=True, selected_adapters=["default"])
    for file in draft.iterdir():
        if file.name not in (CONFIG, WEIGHTS):  # PEFT adds a model card
            file.unlink()
    config = json.loads((draft / CONFIG).read_text())
    manifest = Manifest(
        base_model=base.resolve().name,
        base_sha256=base_sha256(base),
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        targets=_targets(config),
        weights_sha256=_file_sha256(draft / WEIGHTS),
        method=method,
        job_id=job_id,
        parent=parent,
        metrics={name: _finite(value) for name, value in (metrics or {}).items()},
    )
    (draft / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    if canaries:
        (draft / CANARY_FILE).write_text(json.dumps([dict(one) for one in canaries], ensure_ascii=False) + "\n")
    draft.rename(directory)
    return manifest


def verify(
    directory: Path, *, root: Path | None = None, base: Path | None = None, base_model: str | None = None
) -> Manifest:
    """The manifest of a folder that may be served.

    Raises BadInput where it lies outside `root` (where given), holds anything but safetensors and JSON, has no
    manifest, was changed since, holds a weight that is not finite, or was trained on another base than the one in the
    folder `base`, or than the one of the name `base_model`.
    """
    directory = directory.resolve()
    manifest = read_manifest(directory)
    content_hash(str(directory), manifest.base_model, root or directory.parent)
    if not (directory / WEIGHTS).is_file() or _file_sha256(directory / WEIGHTS) != manifest.weights_sha256:
        raise BadInput(f"{directory}: the weights are not those of the manifest", param="adapter")
    if _shape(directory) != (manifest.rank, manifest.alpha, manifest.targets):
        raise BadInput(f"{directory}: {CONFIG} is not that of the manifest", param="adapter")
    other = base is not None and base_sha256(base) != manifest.base_sha256
    if other or base_model not in (None, manifest.base_model):
        name = base_model or (base or directory).resolve().name
        raise BadInput(f"{directory} was trained on {manifest.base_model}, which is not {name}", param="adapter")
    _expect_finite(directory)
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """The manifest as it stands, unchecked. Raises BadInput where there is none."""
    try:
        found = json.loads((directory / MANIFEST).read_text())
        known = {one.name for one in fields(Manifest)}
        manifest = Manifest(**{name: value for name, value in found.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{directory}: cannot read {MANIFEST}: {error}", param="adapter") from None
    return Manifest(**{**asdict(manifest), "targets": tuple(manifest.targets)})


def _shape(directory: Path) -> tuple[int, float, tuple[str, ...]]:
    try:
        config = json.loads((directory / CONFIG).read_text())
        return int(config["r"]), float(config["lora_alpha"]), _targets(config)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadInput(f"{directory}: cannot read {CONFIG}: {error}", param="adapter") from None


def _targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    targets = config.get("target_modules") or []
    return (targets,) if isinstance(targets, str) else tuple(sorted(targets))


def _expect_finite(directory: Path) -> None:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(directory / WEIGHTS, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a mapping
                if not bool(torch.isfinite(tensors.get_tensor(name)).all()):
                    raise BadInput(f"{directory}: `{name}` is not finite", param="adapter")
    except SafetensorError as error:
        raise BadInput(f"{directory}: {WEIGHTS} is not safetensors: {error}", param="adapter") from None


def _file_sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
