"""Log-probabilities of the tokens that a model wrote, at no more positions than needed.

Three savings over running every row whole. Rows that are the same (an agent that answers alike, several times) are
computed once. A beginning that all rows of a batch share (instructions and demonstrations)
is computed once, its keys and values serving all rows, with its gradient. And the output layer, on small models most
of the work, is applied to the written tokens alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

# A shared beginning shorter than this is not worth a pass of its own.
SHORTEST = 8
# Logits held at once (numbers, 4 bytes each); beyond it they are computed in pieces and again on the way back.
LOGITS = 1 << 27
# What some architectures do to their logits and this file does not.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def supported(model: Any) -> bool:
    """Whether the model's output is a plain linear layer on its last hidden states."""
    config = model.config.get_text_config()
    return all(getattr(config, name, None) is None for name in SCALES)


def token_logprobs(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    wrote: torch.Tensor,
    *,
    share: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and (without gradient) entropies, both (B, T), 0 where `wrote` (B, T) is 0.

    `input_ids` and `attention_mask` (B, P + T): prompts padded on the left, completions on the right. `model` is a
    causal language model, as PEFT wraps it or not.
    """
    if share and len(input_ids) > 1:
        firsts, places = _distinct(torch.cat([input_ids, attention_mask, wrote], dim=1))
        if len(firsts) < len(input_ids):
            found = _token_logprobs(model, input_ids[firsts], attention_mask[firsts], wrote[firsts], share)
            return found[0][places], found[1][places]
    return _token_logprobs(model, input_ids, attention_mask, wrote, share)


def _distinct(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows (B, N): where each different one stands first (K,), and which of these K each row equals (B,)."""
    unique, places = torch.unique(rows, dim=0, return_inverse=True)
    order = torch.arange(len(rows), device=rows.device)
    firsts = order.new_full((len(unique),), len(rows)).scatter_reduce(0, places, order, "amin")
    return firsts, places


def _token_logprobs(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, wrote: torch.Tensor, share: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    width = wrote.shape[1]
    lead = input_ids.shape[1] - width
    starts = (attention_mask.cumsum(1) == 0).sum(1)
    sizes = attention_mask.sum(1)
    common = _common(input_ids, starts, lead) if share else 0
    hidden = _hidden(model, input_ids, starts + common, sizes - common, starts, common)
    rows, tokens = wrote.nonzero(as_tuple=True)
    labels = input_ids[rows, lead + tokens]
    # The hidden state of a position tells the next one's token.
    places = lead + tokens - starts[rows] - common - 1
    logprobs, entropies = _head(model, hidden[rows, places], labels)
    shape = wrote.shape
    empty = torch.zeros(shape, dtype=torch.float32, device=wrote.device)
    return empty.index_put((rows, tokens), logprobs), empty.index_put((rows, tokens), entropies)


def _common(input_ids: torch.Tensor, starts: torch.Tensor, lead: int) -> int:
    """How many first ids all rows share, short of a prompt's last one: it tells the first token."""
    if len(input_ids) < 2:
        return 0
    most = int((lead - starts).min()) - 1
    if most < SHORTEST:
        return 0
    columns = starts[:, None] + torch.arange(most, device=starts.device)
    firsts = input_ids.gather(1, columns)
    same = (firsts == firsts[0]).all(0)
    count = int(same.long().cumprod(0).sum())
    return count if count >= SHORTEST else 0


def _hidden(
    model: Any,
    input_ids: torch.Tensor,
    begins: torch.Tensor,
    sizes: torch.Tensor,
    starts: torch.Tensor,
    common: int,
) -> torch.Tensor:
    """Last hidden states (B, S, H) from each row's `begins` on, packed to the left; S the longest rest."""
    backbone = _causal(model).base_model
    count = int(sizes.max())
    steps = torch.arange(count, device=input_ids.device)
    columns = (begins[:, None] + steps).clamp(max=input_ids.shape[1] - 1)
    rest = input_ids.gather(1, columns)
    mask = (steps < sizes[:, None]).long()
    options: dict[str, Any] = {"use_cache": False}
    if common:
        cache = _prefix(backbone, input_ids[:1, int(starts[0]) : int(starts[0]) + common], len(input_ids))
        mask = torch.cat([mask.new_ones(len(input_ids), common), mask], dim=1)
        options = {"use_cache": True, "past_key_values": cache}
    positions = (common + steps).expand(len(input_ids), -1)
    output = backbone(input_ids=rest, attention_mask=mask, position_ids=positions, **options)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


def _prefix(backbone: Any, ids: torch.Tensor, rows: int) -> Any:
    """Keys and values of a beginning, computed once and seen by every row."""
    from transformers import DynamicCache

    cache = DynamicCache()
    backbone(input_ids=ids, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys = layer.keys.expand(rows, -1, -1, -1)
        layer.values = layer.values.expand(rows, -1, -1, -1)
    return cache


def _causal(model: Any) -> Any:
    """The causal language model inside PEFT's wrapper; its adapter layers stay in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head(model: Any, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    causal = _causal(model)
    head = causal.get_output_embeddings()
    cap = getattr(causal.config.get_text_config(), "final_logit_softcapping", None)
    size = max(1, LOGITS // head.weight.shape[0])

    def piece(some: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head(some).float()
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        total = torch.logsumexp(logits, dim=-1)
        logprobs = logits.gather(1, wanted[:, None])[:, 0] - total
        with torch.no_grad():
            expected = (torch.softmax(logits, dim=-1) * logits).sum(-1)
        return logprobs, total.detach() - expected

    if len(hidden) <= size:
        return piece(hidden, labels)
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]] = [
        checkpoint(piece, some, wanted, use_reentrant=False)
        for some, wanted in zip(hidden.split(size), labels.split(size), strict=True)
    ]
    return torch.cat([one for one, _ in pairs]), torch.cat([one for _, one in pairs])
