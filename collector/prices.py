"""What a relayed call cost, from LiteLLM's price map read as data: the library itself is never imported for it.

Prices are US dollars per token. A model whose provider or price isn't known has none: its cost stays None, never 0.
"""

import importlib.util
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson

log = logging.getLogger(__name__)
FILE = "model_prices_and_context_window_backup.json"


class Price(NamedTuple):
    """Dollars per token; `cached` is for input tokens that the provider had cached."""

    input: float
    output: float
    cached: float


UNKNOWN = Price(math.nan, math.nan, math.nan)
_REMEMBERED = 1024


class Prices:
    """Prices by provider and model; own ones, of the configuration, go first."""

    def __init__(self, known: Mapping[tuple[str, str], Price] | None = None) -> None:
        self._known = dict(known or {})
        self._priced: dict[tuple[str | None, ...], Price] = {}

    def learn(self, known: Mapping[tuple[str, str], Price]) -> None:
        """Adds what is not known yet."""
        self._known = {**known, **self._known}
        self._priced = {}

    def cost(
        self,
        provider: str | None,
        models: tuple[str | None, ...],
        tokens_in: int | None,
        tokens_out: int | None,
        cached: int | None = None,
    ) -> float | None:
        """Dollars for one call, by the first of `models` that has a price. None where tokens or price are unknown."""
        if provider is None or (tokens_in is None and tokens_out is None):
            return None
        price = self._priced.get((provider, *models))
        if price is None:
            price = self._price(provider, models)
        if price is UNKNOWN:
            return None
        paid, saved = max(0, (tokens_in or 0) - (cached or 0)), cached or 0
        return paid * price.input + saved * price.cached + (tokens_out or 0) * price.output

    def _price(self, provider: str, models: tuple[str | None, ...]) -> Price:
        """The first that is known, else UNKNOWN; remembered, since calls name the same few models."""
        priced, known = self._priced, self._known  # in this order: `learn` may come between, in another thread
        found = (known.get((provider, model)) for model in models if model is not None)
        price = next((one for one in found if one is not None), UNKNOWN)
        if len(priced) < _REMEMBERED:
            priced[provider, *models] = price
        return price


def price_of(entry: Mapping[str, Any]) -> Price | None:
    """The price in an entry of LiteLLM's map, or of a model's own `model_info`; None where there is none."""
    inward, outward = _number(entry.get("input_cost_per_token")), _number(entry.get("output_cost_per_token"))
    if inward is None and outward is None:
        return None
    cached = _number(entry.get("cache_read_input_token_cost"))
    return Price(inward or 0.0, outward or 0.0, (inward or 0.0) if cached is None else cached)


def read() -> dict[tuple[str, str], Price]:
    """LiteLLM's map: (provider, model) -> price. Empty, with a word in the log, where it can't be read."""
    path = _path()
    try:
        entries = orjson.loads(path.read_bytes()) if path is not None else {}
    except (OSError, orjson.JSONDecodeError) as error:
        log.warning("LiteLLM's price map can't be read, costs stay unknown: %s", error)
        return {}
    found: dict[tuple[str, str], Price] = {}
    for name, entry in entries.items():
        price = price_of(entry) if isinstance(entry, dict) else None
        provider = entry.get("litellm_provider") if isinstance(entry, dict) else None
        if price is not None and isinstance(provider, str):
            # The map names some models with their provider ("mistral/mistral-small"), some without ("gpt-5").
            found.setdefault((provider, name.removeprefix(f"{provider}/")), price)
            if provider.startswith("text-completion-"):
                found.setdefault((provider.removeprefix("text-completion-"), name), price)
    return found


def _path() -> Path | None:
    """Where the map lies: the package is looked up, not imported."""
    spec = importlib.util.find_spec("litellm")
    places = spec.submodule_search_locations if spec is not None else None
    return Path(places[0]) / FILE if places else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
