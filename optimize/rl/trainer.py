"""TRL's GRPO loss on logged rows: nothing is generated, advantages are per token, the ratio is to the logged policy.

The least that can be overridden of TRL 1.16, all of it private there, hence the pinned minor version and the tests of
equal losses: the sampler (rows instead of repeated prompts), the making of a batch (padding instead of generating), and
how log-probabilities are computed (`optimize.rl.logprobs`). The loss itself is TRL's own.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from torch.utils.data import Sampler
from trl import GRPOTrainer  # type: ignore[attr-defined]

from collector.errors import RatchetError
from optimize.rl.batch import Tensors, collate
from optimize.rl.logprobs import supported, token_logprobs
from optimize.rl.rows import Row

# A token counts for no more: a few that the model has unlearned must not pass for a collapse, which shows in most.
MOST_OF_A_TOKEN = 10.0


class Collapsed(RatchetError):
    """Training went wrong beyond repair; the adapter must not be used."""

    code = "collapsed"


class LoggedTrainer(GRPOTrainer):
    """GRPOTrainer on `rows`. `ratio`: whether the logged log-probabilities are the ratio's denominator.

    `reference`: log-probabilities (T,) of each row under the base model, for the KL curve and, with beta, the penalty.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[Row],
        args: Any,
        processing_class: Any,
        *,
        ratio: bool = True,
        reference: Sequence[Sequence[float]] | None = None,
        share: bool = True,
        **options: Any,
    ) -> None:
        self.rows, self.ratio, self.reference = list(rows), ratio, reference
        self._share = share and not args.gradient_checkpointing
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None
        self._wrote: torch.Tensor | None = None
        dataset = Dataset.from_dict({"prompt": [""] * len(self.rows), "row": list(range(len(self.rows)))})
        super().__init__(
            model=model,
            reward_funcs=_unused_reward,
            args=args,
            train_dataset=dataset,
            processing_class=processing_class,
            **options,
        )
        self._pad = processing_class.pad_token_id or 0

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt", "row"]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        size = self.args.generation_batch_size
        updates = math.ceil(self.args.max_steps * self.current_accumulation / self.args.steps_per_generation)
        return Shuffled(len(self.rows), updates * size, self.args.seed)

    @property
    def current_accumulation(self) -> int:
        """Batches per update."""
        return int(self.args.gradient_accumulation_steps)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Tensors:
        """The logged rows of a batch, padded; TRL generates here."""
        indices = [one["row"] for one in inputs]
        rows = [self.rows[index] for index in indices]
        reference = None if self.reference is None else [self.reference[index] for index in indices]
        batch = collate(rows, self._pad, ratio=self.ratio, reference=reference)
        device = self.accelerator.device
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        batch["num_items_in_batch"] = self.accelerator.gather(batch["num_items_in_batch"]).sum()
        self._curves(rows)
        return batch

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, **options: Any
    ) -> Any:
        """As TRL's, at the written tokens only; (B, T) each. Other processes' gradients need TRL's own way."""
        if self.accelerator.unwrap_model(model) is not model or not supported(model):
            found = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, **options
            )
            return self._keep(*found)
        wrote = attention_mask[:, -logits_to_keep:]
        wrote = wrote if self._wrote is None else wrote * self._wrote
        with self.accelerator.autocast():
            logprobs, entropies = token_logprobs(model, input_ids, attention_mask, wrote, share=self._share)
        return self._keep(logprobs, entropies, None)

    def _keep(self, logprobs: torch.Tensor, entropies: torch.Tensor, aux: Any) -> Any:
        self._seen = (logprobs.detach(), entropies)
        return logprobs, entropies, aux

    def _compute_loss(self, model: Any, inputs: Tensors) -> torch.Tensor:
        self._wrote = inputs["tool_mask"]
        loss: torch.Tensor = super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]
        if not bool(torch.isfinite(loss)):
            raise Collapsed("the loss is not finite")
        self._divergences(inputs)
        return loss

    def _divergences(self, inputs: Tensors) -> None:
        """From the base and from the policy that acted, on the logged tokens."""
        if self._seen is None:
            return
        metrics = self._metrics["train" if self.model.training else "eval"]
        mask = inputs["tool_mask"]
        for name, key in (("kl_base", "ref_per_token_logps"), ("kl_logged", "old_per_token_logps")):
            if key in inputs:
                gap = inputs[key] - self._seen[0]
                metrics[name].append(divergence(gap, mask))

    def _curves(self, rows: Sequence[Row]) -> None:
        metrics = self._metrics["train"]
        metrics["written_tokens"].append(sum(sum(row.mask) for row in rows) / len(rows))
        rewards = [row.reward for row in rows if row.reward is not None]
        if rewards:
            metrics["reward"].append(sum(rewards) / len(rewards))

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """None: what an adapter is stands in its manifest."""


class Shuffled(Sampler[int]):  # type: ignore[misc]  # torch is not followed
    """Row numbers: one shuffled pass after another, `total` in all, so that rows come equally often (+-1)."""

    def __init__(self, rows: int, total: int, seed: int) -> None:
        self._rows, self._total, self._seed = rows, total, seed

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        left = self._total
        while left > 0:
            order = torch.randperm(self._rows, generator=generator).tolist()
            yield from order[:left]
            left -= len(order)


def _unused_reward(**_: Any) -> list[float]:
    raise RuntimeError("rewards are logged, not computed here")


def divergence(gap: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean KL of the policy from another one, nats a token, by Schulman's k3 estimate (Approximating KL
    Divergence, 2020), whose heavy tail is cut at MOST_OF_A_TOKEN. `gap` (B, T): the other's log-probabilities less the
    policy's."""
    each = (gap.exp() - gap - 1).clamp(max=MOST_OF_A_TOKEN)
    return float((each * mask).sum() / mask.sum().clamp(min=1))
