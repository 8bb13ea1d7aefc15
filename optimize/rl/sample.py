"""How a row picks its next token: greedy, or by its own random numbers, so that company never changes its answer."""

import math
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
            heated = logits if settings.temperature == 1 else logits / settings.temperature
            token = draw(heated, settings.top_p, self._random.random())
        if settings.logprobs is None:
            return Picked(token)
        total = torch.logsumexp(logits, dim=-1)
        logprob = float(logits[token] - total)
        if settings.logprobs == 0:
            return Picked(token, logprob)
        values, ids = logits.topk(settings.logprobs)
        return Picked(token, logprob, tuple(zip(ids.tolist(), (values - total).tolist(), strict=True)))


def draw(logits: torch.Tensor, top_p: float, uniform: float) -> int:
    """Inverse-CDF sampling with one uniform number in [0, 1).

    With top_p < 1 only the smallest set of likeliest tokens whose mass reaches top_p (Holtzman et al. 2020,
    arXiv:1904.09751).
    """
    if top_p == 1:
        return _drawn(torch.exp(logits - logits.max()), uniform)
    probabilities, order = torch.softmax(logits.double(), dim=-1).sort(descending=True, stable=True)
    kept = int((probabilities.cumsum(0) < top_p).sum()) + 1
    mass = probabilities[:kept].cumsum(0)
    return int(order[_place(mass, uniform * float(mass[-1]))])


def _drawn(weights: torch.Tensor, uniform: float) -> int:
    """The place where the running sum of weights (n,) passes `uniform` of the whole.

    By blocks first: only one block needs a running sum, which over a whole vocabulary costs more than the rest.
    """
    side = math.isqrt(len(weights) - 1) + 1
    blocks = torch.nn.functional.pad(weights, (0, -len(weights) % side)).view(-1, side)
    sums = blocks.sum(dim=1, dtype=torch.float64).cumsum(0)
    target = uniform * float(sums[-1])
    block = _place(sums, target)
    before = float(sums[block - 1]) if block else 0.0
    within = _place(blocks[block].double().cumsum(0), target - before)
    return min(block * side + within, len(weights) - 1)


def _place(mass: torch.Tensor, target: float) -> int:
    """The first place of running sums (n,) that is above the target."""
    return min(int(torch.searchsorted(mass, target, right=True)), len(mass) - 1)
