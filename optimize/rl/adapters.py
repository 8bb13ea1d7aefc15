"""LoRA adapters served by name beside their base model, any mix of them in one step.

Each row's tokens pass through its own adapter only: y = Wx + (alpha / r) B A x on that row's part of the packed step
(Hu et al. 2021, arXiv:2106.09685). The base weights are never changed, so no adapter can touch another row.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from collector.errors import BadInput
from optimize.rl.attention import Segment

# Per linear module (A transposed (in, r), B transposed and scaled (r, out)).
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What PEFT can write and this file does not apply; an adapter that uses one is refused, never half applied.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
}


class Adapters:
    """The loaded adapters of one model. Not thread-safe: used from the thread that computes."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        self._pairs: dict[str, Pairs] = {}
        self._spans: list[tuple[str, slice]] = []
        self._hooked: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Loaded adapters, oldest first."""
        return list(self._pairs)

    def load(self, name: str, directory: Path) -> None:
        """Add the adapter in `directory` (PEFT's format, safetensors only) under a new name.

        Raises BadInput when the name is taken, a file is missing or pickled, or the adapter does not fit the model.
        """
        self.attach(name, self.read(directory))

    def read(self, directory: Path) -> Pairs:
        """The checked weights of the adapter in `directory`, not served yet. For any thread. Raises BadInput."""
        return read_adapter(directory, self._linears)

    def attach(self, name: str, pairs: Pairs) -> None:
        """Serve what `read` gave under a new name. Raises BadInput when the name is taken."""
        if name in self._pairs:
            raise BadInput(f"an adapter `{name}` is loaded already; use a new name", param="adapter")
        for module in pairs.keys() - self._hooked:
            self._linears[module].register_forward_hook(self._hook(module))
            self._hooked.add(module)
        self._pairs[name] = pairs

    def detach(self, name: str) -> None:
        """Forget an adapter that no row uses any more."""
        self._pairs.pop(name, None)

    def route(self, segments: Sequence[Segment]) -> None:
        """Say which tokens of the next step belong to which adapter."""
        self._spans, at = [], 0
        for segment in segments:
            end = at + len(segment.ids)
            if segment.adapter is not None:
                self._spans.append((segment.adapter, slice(at, end)))
            at = end

    def _hook(self, module: str) -> Any:
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            for name, span in self._spans:
                if pair := self._pairs[name].get(module):
                    output[:, span] += (inputs[0][:, span] @ pair[0]) @ pair[1]

        return add


def read_adapter(directory: Path, linears: dict[str, torch.nn.Module]) -> Pairs:
    """Per linear module the pair (A transposed (in, r), B transposed and scaled (r, out)). Raises BadInput."""
    scale, rslora = _read_config(directory)
    if not (directory / WEIGHTS).is_file():
        raise BadInput(f"{directory} has no {WEIGHTS}; only safetensors are loaded", param="adapter")
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(directory / WEIGHTS).items():
        module, _, half = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if module not in linears or half not in ("lora_A", "lora_B"):
            raise BadInput(f"{directory}: `{key}` fits no linear layer of the model", param="adapter")
        if not bool(torch.isfinite(tensor).all()):
            raise BadInput(f"{directory}: `{key}` is not finite", param="adapter")
        halves.setdefault(module, {})[half] = tensor
    return {module: _pair(directory, module, both, linears[module], scale, rslora) for module, both in halves.items()}


def _read_config(directory: Path) -> tuple[float, bool]:
    try:
        config = json.loads((directory / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{directory}: cannot read {CONFIG}: {error}", param="adapter") from None
    if config.get("peft_type") != "LORA":
        raise BadInput(f"{directory}: peft_type {config.get('peft_type')!r} is not LORA", param="adapter")
    for key, harmless in UNSUPPORTED.items():
        if config.get(key) not in harmless:
            raise BadInput(f"{directory}: `{key}`: {config[key]!r} is not supported", param="adapter")
    return float(config["lora_alpha"]), bool(config.get("use_rslora"))


def _pair(
    directory: Path, module: str, both: dict[str, torch.Tensor], linear: Any, alpha: float, rslora: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    down, up = both.get("lora_A"), both.get("lora_B")
    outer, inner = linear.weight.shape
    if down is None or up is None or down.shape[1] != inner or up.shape[0] != outer or down.shape[0] != up.shape[1]:
        raise BadInput(f"{directory}: the LoRA pair of `{module}` does not fit the model", param="adapter")
    rank = down.shape[0]
    scale = alpha / (rank**0.5 if rslora else rank)
    weight = linear.weight
    return (
        down.T.to(weight.device, weight.dtype).contiguous(),
        (up.T * scale).to(weight.device, weight.dtype).contiguous(),
    )
