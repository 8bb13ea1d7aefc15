"""A causal language model on this machine: loaded from safetensors, computing packed steps."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from collector.errors import BadInput
from optimize.rl.adapters import Adapters
from optimize.rl.attention import NAME, Segment
from optimize.rl.memory import Memory

# Up to this many tokens, weight @ x beats x @ weight.T on CPUs (2 to 4 times at 2 to 8 tokens with AMD + MKL).
THIN = 16


class LanguageModel:
    """The model, its tokenizer and its adapters. `forward` is for one thread; the tokenizer may be used by any."""

    def __init__(self, model: Any, tokenizer: Any, *, context: int | None = None) -> None:
        model.set_attn_implementation(NAME)
        self._model = model.eval()
        self.tokenizer = tokenizer
        own = int(model.config.max_position_embeddings)
        self.context = min(context or own, own)
        self.eos_ids = _eos_ids(model)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.adapters = Adapters(model)
        _use_thin_products(model)
        self._check()

    @classmethod
    def load(cls, directory: Path, *, context: int | None = None) -> "LanguageModel":
        """Load fp32 weights from a directory of safetensors; no remote code, nothing pickled.

        Raises BadInput when there is no such model or its architecture cannot be served.
        """
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if not any(directory.glob("*.safetensors")):
            raise BadInput(f"{directory} holds no *.safetensors; pickled weights are not loaded", param="model")
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, **options)
            model = AutoModelForCausalLM.from_pretrained(
                directory, use_safetensors=True, dtype=torch.float32, attn_implementation=NAME, **options
            )
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot load {directory}: {error}", param="model") from None
        return cls(model, tokenizer, context=context)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def forward(self, segments: Sequence[Segment]) -> torch.Tensor:
        """Compute the segments' positions into their memories; logits (wanted, vocabulary) of their last ids."""
        ids = [token for segment in segments for token in segment.ids]
        positions = [segment.start + index for segment in segments for index in range(len(segment.ids))]
        ends, at = [], 0
        for segment in segments:
            at += len(segment.ids)
            if segment.wanted:
                ends.append(at - 1)
        self.adapters.route(segments)
        device = self._model.device
        output = self._model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            logits_to_keep=torch.tensor(ends or [at - 1], device=device),
            use_cache=False,
            segments=segments,
        )
        logits: torch.Tensor = output.logits[0, : len(ends)].float()
        return logits

    def _check(self) -> None:
        """One tiny step: an architecture whose attention goes another way would leave its memory unwritten."""
        memory = Memory()
        try:
            self.forward([Segment(memory, [0, 0])])
        except (TypeError, ValueError, KeyError) as error:
            raise BadInput(f"this architecture cannot be served here: {error}", param="model") from None
        if memory.layers != self._model.config.get_text_config().num_hidden_layers:
            raise BadInput("this architecture cannot be served here: not every layer is attention", param="model")


def use_threads(count: int = 0) -> None:
    """Compute with `count` CPU threads; 0: with every core that this process may use."""
    torch.set_num_threads(count or len(os.sched_getaffinity(0)))


def _eos_ids(model: Any) -> frozenset[int]:
    """The ids that end an answer, from the generation settings and the configuration."""
    found: set[int] = set()
    for config in (model.generation_config, model.config):
        eos = getattr(config, "eos_token_id", None)
        found |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return frozenset(found)


def _use_thin_products(model: torch.nn.Module) -> None:
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.bias is None and module.weight.device.type == "cpu":
            module.forward = _thin(module)


def _thin(module: torch.nn.Linear) -> Any:
    weight = module.weight

    def forward(x: torch.Tensor) -> torch.Tensor:
        count = x.shape[1]
        if count > THIN:
            return torch.nn.functional.linear(x, weight)
        # A matrix times two equal columns takes half the time of a matrix times one, and rounds as it does in company.
        columns = x[0].repeat(2, 1).T if count == 1 else x[0].T
        return (weight @ columns)[:, :count].T.unsqueeze(0)

    return forward
