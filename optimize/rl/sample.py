"""How a row picks its next token: greedy, or by its own random numbers, so that company never changes its answer."""

import random
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """What a request asks of its rows. `logprobs`: how many alternatives to report with each token; None: no report."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Picked:
    """A token, and where asked for its log-probability and the likeliest alternatives as (id, log-probability).

    Log-probabilities are the model's own, before temperature and top_p, as vLLM reports them.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Picker:
    """One row's choices. Choice `index` of a request draws from its own stream of the request's seed."""

    def __init__(self, sampling: Sampling, index: int = 0) -> None:
        self._sampling = sampling
        seed = sampling.seed
        self._random = random.Random(None if seed is None else f"{seed}:{index}")  # noqa: S311 (sampling, no secret)

    def pick(self, logits: torch.Tensor) -> Picked:
        """The next token from logits (vocabulary,)."""
        settings = self._sampling
        if settings.temperature == 0:
            token = int(logits.argmax())
        else:
            token = draw(logits / settings.temperature, settings.top_p, self._random.random())
        if settings.logprobs is None:
            return Picked(token)
        logprobs = torch.log_softmax(logits, dim=-1)
        values, ids = logprobs.topk(settings.logprobs)
        return Picked(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def draw(logits: torch.Tensor, top_p: float, uniform: float) -> int:
    """Inverse-CDF sampling with one uniform number in [0, 1).

    With top_p < 1 only the smallest set of likeliest tokens whose mass reaches top_p (Holtzman et al. 2020,
    arXiv:1904.09751).
    """
    probabilities = torch.softmax(logits.double(), dim=-1)
    order = None
    if top_p < 1:
        probabilities, order = probabilities.sort(descending=True, stable=True)
        kept = int((probabilities.cumsum(0) < top_p).sum()) + 1
        probabilities = probabilities[:kept]
    mass = probabilities.cumsum(0)
    at = int(torch.searchsorted(mass, uniform * float(mass[-1]), right=True))
    at = min(at, len(mass) - 1)
    return at if order is None else int(order[at])
