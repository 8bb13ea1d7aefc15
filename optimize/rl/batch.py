"""Rows as the tensors that TRL's loss reads: prompts padded on the left, completions on the right."""

from collections.abc import Sequence

import torch

from optimize.rl.rows import Row

Tensors = dict[str, torch.Tensor]


def collate(rows: Sequence[Row], pad: int, *, ratio: bool, reference: Sequence[Sequence[float]] | None) -> Tensors:
    """The batch of B rows, P the longest prompt and T the longest completion.

    prompt_ids, prompt_mask (B, P); completion_ids, completion_mask, tool_mask, advantages, and with `ratio`
    old_per_token_logps and sampling_per_token_logps (B, T), 0 on padding and where the model did not write;
    ref_per_token_logps (B, T) of `reference`, where given; num_items_in_batch: how many tokens are learned from.
    """
    width = max(len(row.completion_ids) for row in rows)
    lead = max(len(row.prompt_ids) for row in rows)
    mask = _right([row.mask for row in rows], width, torch.long)
    batch = {
        "prompt_ids": _left([row.prompt_ids for row in rows], lead, pad),
        "prompt_mask": _left([(1,) * len(row.prompt_ids) for row in rows], lead, 0),
        "completion_ids": _right([row.completion_ids for row in rows], width, torch.long, pad),
        "completion_mask": _right([(1,) * len(row.completion_ids) for row in rows], width, torch.long),
        "tool_mask": mask,
        "advantages": _right([row.advantages for row in rows], width, torch.float32),
        "num_items_in_batch": mask.sum(),
    }
    if ratio:
        logprobs = [row.logprobs for row in rows]
        if any(one is None for one in logprobs):
            raise ValueError("a row has no logged log-probabilities: its ratio would silently be 1")
        batch["old_per_token_logps"] = _right([one or () for one in logprobs], width, torch.float32)
        batch["sampling_per_token_logps"] = batch["old_per_token_logps"]
    if reference is not None:
        batch["ref_per_token_logps"] = _right(reference, width, torch.float32)
    return batch


def _left(values: Sequence[Sequence[int]], width: int, pad: int) -> torch.Tensor:
    return torch.tensor([[pad] * (width - len(one)) + list(one) for one in values], dtype=torch.long)


def _right(values: Sequence[Sequence[float]], width: int, dtype: torch.dtype, pad: float = 0) -> torch.Tensor:
    return torch.tensor([list(one) + [pad] * (width - len(one)) for one in values], dtype=dtype)
