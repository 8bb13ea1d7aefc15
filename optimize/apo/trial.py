"""A direct comparison of two fixed prompts on the same tasks, for what a model of parts does not see."""

import math
from dataclasses import dataclass

from scipy.special import ndtr

from optimize.apo.model import Array
from optimize.apo.pool import Subset

LEAST_VARIANCE = 0.05  # of a paired difference: few equal differences are no proof of certainty


@dataclass(frozen=True)
class Trial:
    """A direct comparison of a fixed leader and the seed on the same tasks: posterior of the gain, normal."""

    leader: Subset
    mean: float
    sd: float

    @classmethod
    def of(cls, leader: Subset, differences: Array, prior_sd: float) -> "Trial":
        """From paired differences (n,), n >= 2, with the prior N(0, prior_sd^2); their variance is at least
        `LEAST_VARIANCE`."""
        n = len(differences)
        error = max(float(differences.var(ddof=1)), LEAST_VARIANCE) / n
        weight = prior_sd**2 / (prior_sd**2 + error)
        return cls(leader, weight * float(differences.mean()), math.sqrt(weight * error))

    def p_above(self, gain: float) -> float:
        """P(the true gain is above `gain`)."""
        return float(ndtr((self.mean - gain) / self.sd))
