"""Attention over packed rows: the tokens of all rows of a step lie one behind another in a single sequence.

Every other layer of a transformer works on tokens one by one, so nothing is padded, prompts and single tokens mix in
one step, and rows join and leave between steps. Only attention must know the rows: each is computed on its own, against
its own memory, so what a row sees has the same shapes whoever shares the step. Registered with transformers' attention
interface.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from optimize.rl.memory import Memory

NAME = "ratchet_packed"


@dataclass(frozen=True)
class Segment:
    """A row's part of one step: the ids at positions start, start+1, … and whether the last one's logits are wanted."""

    memory: Memory
    ids: Sequence[int]
    start: int = 0
    adapter: str | None = None
    wanted: bool = True


def packed(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: Sequence[Segment] = (),
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for `segments`, whose tokens follow one another: query (1, heads, n, size) -> (1, n, heads, size)."""
    if not segments:
        raise ValueError("its attention does not pass the rows on")
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ValueError("attention with soft caps or sinks is not supported")
    outputs, at = [], 0
    for segment in segments:
        rows = slice(at, at + len(segment.ids))
        at = rows.stop
        keys, values = segment.memory.write(module.layer_idx, segment.start, key[0, :, rows], value[0, :, rows])
        outputs.append(attend(query[0, :, rows], keys, values, scaling, sliding_window))
    return torch.cat(outputs, dim=1).transpose(0, 1).unsqueeze(0), None


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """One row: the last n positions' queries (heads, n, size) on all keys (kv heads, total, size); causal, windowed."""
    heads, count, size = query.shape
    groups, total, _ = keys.shape
    if count == 1:
        # One token: the heads that share keys become its queries, and no mask is needed.
        if window is not None and total > window:
            keys, values = keys[:, -window:], values[:, -window:]
        shared = query.reshape(1, groups, heads // groups, size)
        return scaled_dot_product_attention(shared, keys[None], values[None], scale=scaling).reshape(heads, 1, -1)
    causal = count == total and (window is None or total <= window)
    mask = None if causal else _mask(count, total, window, query.device)
    keys, values = (tensor.repeat_interleave(heads // groups, 0) for tensor in (keys, values))
    return scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=mask, is_causal=causal, scale=scaling
    )[0]


def _mask(count: int, total: int, window: int | None, device: torch.device) -> torch.Tensor:
    behind = torch.arange(total - count, total, device=device)[:, None] - torch.arange(total, device=device)[None, :]
    return (behind >= 0) if window is None else (behind >= 0) & (behind < window)


AttentionInterface.register(NAME, packed)
