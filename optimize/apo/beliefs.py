"""What a posterior over parts says of whole prompts: gains over the seed, and which prompt may be reported."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from scipy.special import ndtr

from optimize.apo.model import Array, Posterior
from optimize.apo.params import Params
from optimize.apo.pool import Pool, Subset

LOSS_DRAWS = 64


class Beliefs:
    """A posterior about the subsets of a pool. The searcher's belief expects proposals to help a little; the sceptic's
    does not (`model.Posterior`)."""

    def __init__(self, posterior: Posterior, pool: Pool, params: Params) -> None:
        self.posterior, self.pool, self.params = posterior, pool, params
        self.leader = pool.best(posterior.mean)

    def gain(self, subset: Subset, above: float = 0.0) -> tuple[float, float, float]:
        """The sceptic's mean, sd and P(> above) of the subset's reward less the seed's."""
        return self.posterior.sceptical(self._contrast(subset), above, doubt=self.params.doubt)

    @cached_property
    def worth(self) -> float:
        """The smallest gain worth searching for, in units of reward: a share of what the seed leaves to gain."""
        return self.params.worth * max(0.0, 1.0 - self.value(self.pool.seed))

    def hope(self, subset: Subset) -> float:
        """P(a gain worth searching for), for whoever wants to stop: at harder odds than `gain`."""
        return self.posterior.sceptical(self._contrast(subset), self.worth, self.params.doubt_to_stop)[2]

    def value(self, subset: Subset) -> float:
        """The sceptic's expected reward of the subset."""
        doubt = self.params.doubt
        return self.posterior.base(doubt) + self.posterior.sceptical(self._weights(subset), doubt=doubt)[0]

    def likely(self, subset: Subset) -> float:
        """P(> 0) of the subset's reward less the seed's: the searcher's, or the sceptic's where he is surer."""
        return max(float(self._likely([subset])[0]), self.gain(subset)[2])

    def loss(self, subset: Subset, rng: np.random.Generator) -> float:
        """What stopping with this subset loses: the mean over draws of the best value less the subset's."""
        mine, loss = self._weights(subset), 0.0
        for _ in range(LOSS_DRAWS):
            values = self.posterior.draw(rng, 1.0)
            loss += max(0.0, float((self._weights(self.pool.best(values)) - mine) @ values))
        return loss / LOSS_DRAWS

    @cached_property
    def reported(self) -> Subset:
        """The prompt to report: the leader where P(gain > 0) is `confident`, else the most of it for which it is.

        Where the whole is uncertain, some of its changes may not be: one at a time, the change without which the rest
        is surest is taken back, until the rest is sure enough, or is the seed.
        """
        subset = self.plain
        while subset != self.pool.seed and self.likely(subset) < self.params.confident:
            smaller = self._smaller(subset)
            subset = smaller[int(np.argmax(self._likely(smaller)))] if smaller else self.pool.seed
        return subset

    def _smaller(self, subset: Subset) -> list[Subset]:
        """The subset with one change to the seed taken back; a rewrite is one that cannot be."""
        kinds = [self.pool.parts[index].kind for index in subset]
        if "rewrite" in kinds:
            return []
        added = [index for index in subset if index not in self.pool.seed]
        dropped = [index for index in self.pool.seed if index not in subset]
        back = [tuple(sorted({*subset, index})) for index in dropped]
        return [*back, *(tuple(other for other in subset if other != index) for index in added)]

    @cached_property
    def plain(self) -> Subset:
        """The leader without the additions that earned nothing: nobody wants to read those in a prompt.

        The search includes what it merely hopes for, because including is how it learns; the result need not. Whether
        there is any gain at all is asked of the whole, so it is not doubted again for each part.
        """
        kept = self.leader
        while True:
            extras = [i for i in kept if i not in self.pool.seed and self.pool.parts[i].kind != "rewrite"]
            worth = {index: self._worth(kept, index) for index in extras}
            least = min(worth, key=lambda index: worth[index], default=None)
            if least is None or worth[least] >= self.params.keep:
                break
            kept = tuple(index for index in kept if index != least)
        return kept if self.pool.render(kept).strip() else self.leader

    def _worth(self, subset: Subset, index: int) -> float:
        """The sceptic's mean of what a part adds to the others of the subset, if any part does anything."""
        without = self._weights(tuple(other for other in subset if other != index))
        return float((self._weights(subset) - without) @ self._earned)

    @cached_property
    def _earned(self) -> Array:
        return self.posterior.expected(doubt=0.0)

    def _likely(self, subsets: Sequence[Subset]) -> Array:
        """The searcher's P(> 0) of each subset's reward less the seed's."""
        weights = np.array([self._contrast(subset) for subset in subsets])
        means, sds = weights @ self.posterior.mean, np.linalg.norm(weights @ self.posterior.root, axis=1)
        return np.where(sds > 0, ndtr(means / np.maximum(sds, 1e-12)), 0.0)

    def _contrast(self, subset: Subset) -> Array:
        return self._weights(subset) - self._weights(self.pool.seed)

    def _weights(self, subset: Subset) -> Array:
        weights = np.zeros(len(self.posterior.mean))
        weights[self.pool.features(subset)] = 1.0
        return weights
