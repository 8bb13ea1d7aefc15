import torch
from hypothesis import given
from hypothesis import strategies as st

from optimize.rl.sample import Picker, Sampling, draw

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def picks(sampling: Sampling, index: int = 0, count: int = 30) -> list[int]:
    picker = Picker(sampling, index)
    return [picker.pick(LOGITS).token for _ in range(count)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert picks(Sampling(8, temperature=0)) == [0] * 30


@given(st.floats(0, 1, exclude_max=True))
def test_a_uniform_number_lands_on_the_token_that_holds_its_share(uniform: float) -> None:
    bounds = [0.5, 0.8, 0.95, 1.0]
    if min(abs(uniform - bound) for bound in bounds) > 1e-6:
        assert draw(LOGITS, 1.0, uniform) == next(i for i, bound in enumerate(bounds) if uniform < bound)


@given(st.floats(0, 1, exclude_max=True), st.sampled_from([(0.0, 1), (0.4, 1), (0.6, 2), (0.9, 3), (0.99, 4)]))
def test_top_p_keeps_the_fewest_tokens_that_reach_it(uniform: float, case: tuple[float, int]) -> None:
    top_p, kept = case
    assert draw(LOGITS[[3, 1, 0, 2]], top_p, uniform) in [[2, 1, 3, 0][place] for place in range(kept)]


def test_samples_follow_the_distribution_at_their_temperature() -> None:
    logits = LOGITS / 2
    expected = torch.softmax(logits, 0)
    drawn = [draw(logits, 1.0, (step + 0.5) / 2000) for step in range(2000)]
    for token in range(4):
        assert abs(drawn.count(token) / 2000 - float(expected[token])) < 0.002


def test_a_seed_repeats_and_its_choices_differ() -> None:
    seeded = Sampling(8, seed=7)
    assert picks(seeded) == picks(seeded)
    assert picks(seeded, 0) != picks(seeded, 1)
    assert picks(Sampling(8, seed=8)) != picks(seeded)
    assert picks(Sampling(8)) != picks(Sampling(8))


def test_logprobs_are_the_models_own_and_the_top_ones_come_in_order() -> None:
    picked = Picker(Sampling(8, temperature=0.1, logprobs=2)).pick(LOGITS)
    assert picked.logprob is not None
    assert abs(picked.logprob - float(LOGITS[picked.token])) < 1e-6
    assert [token for token, _ in picked.top] == [0, 1]
    assert Picker(Sampling(8)).pick(LOGITS).logprob is None
