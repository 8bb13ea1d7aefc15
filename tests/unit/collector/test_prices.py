"""What a call cost: from the price map as data, and unknown where it is unknown."""

import subprocess
import sys

import pytest

from collector import prices
from collector.prices import Price, Prices

KNOWN = {("openai", "gpt-x"): Price(1e-6, 4e-6, 1e-7)}


def test_tokens_times_prices_with_cached_ones_cheaper() -> None:
    assert Prices(KNOWN).cost("openai", ("gpt-x",), 1000, 100) == pytest.approx(0.0014)
    assert Prices(KNOWN).cost("openai", ("gpt-x",), 1000, 100, 1000) == pytest.approx(0.0005)


def test_the_answers_model_counts_before_the_name_that_was_asked_for() -> None:
    assert Prices(KNOWN).cost("openai", ("gpt-x", "fast"), 1, 0) == pytest.approx(1e-6)
    assert Prices(KNOWN).cost("openai", ("gpt-x-2026-01-01", "gpt-x"), 1, 0) == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("provider", "model", "tokens"),
    [
        ("127.0.0.1", "gpt-x", 1),
        ("openai", "other", 1),
        (None, "gpt-x", 1),
        ("openai", None, 1),
        ("openai", "gpt-x", None),
    ],
)
def test_what_is_not_known_is_none_and_never_nothing(
    provider: str | None, model: str | None, tokens: int | None
) -> None:
    assert Prices(KNOWN).cost(provider, (model,), tokens, None) is None


def test_own_prices_go_before_the_map() -> None:
    own = Prices(KNOWN)
    own.learn({("openai", "gpt-x"): Price(9, 9, 9), ("openai", "new"): Price(1, 1, 1)})
    assert own.cost("openai", ("gpt-x",), 1, 0) == pytest.approx(1e-6)
    assert own.cost("openai", ("new",), 1, 0) == 1


def test_the_map_is_read_without_importing_the_library() -> None:
    script = (
        "import sys; from collector import prices; known = prices.read();"
        "price = known['openai', 'gpt-4o-mini'];"
        "assert 0 < price.cached < price.input < price.output < 1e-4, price;"
        "assert known['anthropic', 'claude-sonnet-4-5'].output > 0;"
        "assert 'litellm' not in sys.modules; print(len(known))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 500


def test_a_map_that_is_gone_leaves_costs_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prices, "_path", lambda: None)
    assert prices.read() == {}


@pytest.mark.parametrize("entry", [{}, {"input_cost_per_token": "free"}, {"output_cost_per_token": True}])
def test_an_entry_without_a_number_has_no_price(entry: dict[str, object]) -> None:
    assert prices.price_of(entry) is None
