"""What a search may report, from posteriors made by hand."""

import numpy as np
import pytest

from optimize.apo.beliefs import Beliefs
from optimize.apo.model import Belief, Evidence, Posterior
from optimize.apo.params import Params
from optimize.apo.parts import cut, make
from optimize.apo.pool import Limits, Pool, Subset

SEED = "Answer the question: {input}"
TEXTS = ("Reply in one word.", "Show all working.", "Name the source.")


def beliefs(means: tuple[float, ...], sds: tuple[float, ...], base: float = 0.5) -> Beliefs:
    """Of three instructions with independent values; the sceptic is as sure as the searcher."""
    skeleton, sentences = cut(SEED)
    pool = Pool(skeleton, sentences, Evidence(4), Limits(token_price=0.0))
    for text in TEXTS:
        pool.add(make("instruction", text))
    mean, root = np.array([0.0, *means]), np.diag([0.0, *sds])
    nothing = Belief(0.1, base, np.zeros(4), np.zeros((4, 1)))
    doubts = (nothing, Belief(0.9, base, mean, root))
    return Beliefs(Posterior(mean, root, 0.1, 0.1, 0.2, doubts), pool, Params())


@pytest.mark.parametrize(
    ("means", "sds", "leader", "reported"),
    [
        ((0.2, 0.1, -0.1), (0.02, 0.02, 0.02), (0, 1), (0, 1)),  # sure of all that leads
        ((0.1, 0.02, 0.02), (0.02, 0.3, 0.3), (0, 1, 2), (0,)),  # of the whole not: what is surest stays
        ((0.1, 0.05, -0.1), (0.5, 0.5, 0.5), (0, 1), ()),  # of nothing: the seed
    ],
)
def test_the_reported_prompt_is_the_surest_part_of_what_leads(
    means: tuple[float, ...], sds: tuple[float, ...], leader: Subset, reported: Subset
) -> None:
    found = beliefs(means, sds)
    assert found.leader == leader
    assert found.reported == reported


def test_additions_that_earned_nothing_are_left_out_of_what_is_reported() -> None:
    found = beliefs((0.2, 0.001, 0.001), (0.02, 0.001, 0.001))
    assert found.leader == (0, 1, 2)
    assert found.plain == found.reported == (0,)


def test_a_gain_worth_having_is_a_share_of_what_the_seed_leaves_to_gain() -> None:
    assert beliefs((0.1,) * 3, (0.1,) * 3, base=0.2).worth == pytest.approx(0.08)
    assert beliefs((0.1,) * 3, (0.1,) * 3, base=0.9).worth == pytest.approx(0.01)


def test_hope_is_lost_where_the_gain_is_surely_too_small() -> None:
    vague, small = beliefs((0.1, 0.0, 0.0), (0.2, 0.2, 0.2)), beliefs((0.01, 0.0, 0.0), (0.002, 0.002, 0.002))
    assert vague.hope(vague.leader) > 0.3
    assert small.hope(small.leader) < 0.01
