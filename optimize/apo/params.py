"""How a factorial search goes about it, by name: one set of defaults for all problems."""

from dataclasses import dataclass, field

from optimize.apo.model import Priors
from optimize.apo.pool import Limits


@dataclass(frozen=True)
class Params:
    """How to search. `budget` is in rollouts; rewards are meant to lie in about 0 to 1."""

    budget: int = 400
    seed: int = 0
    init: int = 8  # rollouts of the seed before anything else
    block: int | None = None  # rollouts between two fits; None: 4, then 8 from 200 rollouts, then 12 from 600
    reps: int = 4  # tasks that see the same prompt in a row: caches of providers and of the store
    edit_batch: int = 8  # failures shown to an editor at once
    edit_every: int = 6  # rollouts between two calls at least, doubled up to 4 times while nothing new comes
    edit_calls: int = 60
    places: int = 4  # parts at most that are also tried as the last instruction
    place_after: int = 60  # rollouts before the first of them, and 24 between two
    thompson: float = 0.7  # standard deviations of a draw, relative to the posterior's
    success: float = 0.95  # rewards from here on are no failures to learn from
    confident: float = 0.9  # P(gain > 0) from which a prompt other than the seed is reported: the searcher's, whose
    # prior expects gains, or the sceptic's. Whether there is a gain is for the held-out gate to decide, not for this
    likely: float = 0.95  # the searcher's, from which there is hope whatever the sceptic says
    doubt: float = 0.25  # the sceptic's prior odds of no effects, against each scale of effects, for what is reported
    doubt_to_stop: float = 4.0  # the same for whoever wants to stop
    compare: int = 16  # one in so many blocks goes to the seed, and one to the leader, while the gain is unclear
    compare_after: int = 40
    clear: float = 0.98  # P(gain > 0) from which it is clear
    headroom: float = 0.95  # a seed with this mean reward has nothing to gain
    headroom_rollouts: int = 40
    keep: float = 0.005  # reward that an added part must be worth to stay in the result
    worth: float = 0.1  # smallest gain worth searching for: this share of what the seed leaves to gain
    stop_early: bool = True
    hope: float = 0.35  # P(gain > worth), times the square of the share of the budget spent, below which is no hope
    patience: float = 0.1  # of the budget: rollouts without hope that end a run, and
    stop_after: float = 0.5  # before which no run ends for want of hope: who pays for more wants small gains found too
    least: int = 40  # rollouts that these two stand for at least
    converge_after: int = 120  # rollouts before which no run ends by convergence
    trial: float = 0.3  # share of the budget for a last direct comparison of leader and seed, if the model is not sure
    trial_most: int = 180  # pairs in it
    trial_sd: float = 0.15  # of a leader's gain before the comparison, whose mean is 0
    dried: int = 3  # calls of an editor without anything new: before, what it may still find is not accounted for
    stop_loss: float = 0.02  # expected loss of reward that ends a run as converged
    limits: Limits = field(default_factory=Limits)
    priors: Priors = field(default_factory=Priors)
