"""Fixed answers that go with an adapter, so that an engine can be asked whether it serves what was trained."""

from collections.abc import Sequence
from typing import Any

import torch

from optimize.rl.rows import Row

CASES, TOKENS = 2, 8


@torch.no_grad()  # type: ignore[untyped-decorator]
def canaries(model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The model's own greedy answers to a few training prompts: [{"prompt", "text", "logprobs"}].

    Prompts are text, as an engine's `completions` takes it, encoded here as there.
    """
    was_training = model.training
    model.eval()
    prompts = dict.fromkeys(tokenizer.decode(row.prompt_ids, skip_special_tokens=True) for row in rows)
    found = [_greedy(model, tokenizer, prompt) for prompt in list(prompts)[:CASES] if prompt.strip()]
    model.train(was_training)
    return [case for case in found if case["logprobs"]]


def _greedy(model: Any, tokenizer: Any, prompt: str) -> dict[str, Any]:
    ids = list(tokenizer.encode(prompt))
    start = len(tokenizer.decode(ids, skip_special_tokens=True))
    logprobs: list[float] = []
    for _ in range(TOKENS):
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float()
        token = int(logits.argmax())
        if token == tokenizer.eos_token_id:
            break
        logprobs.append(float(torch.log_softmax(logits, -1)[token]))
        ids.append(token)
    return {"prompt": prompt, "text": tokenizer.decode(ids, skip_special_tokens=True)[start:], "logprobs": logprobs}
