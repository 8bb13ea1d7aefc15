"""Arrays as callers hand them over: checked once, at the door; what is wrong is refused by name."""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from collector.errors import BadInput

Floats = NDArray[np.float64]
Labels = Sequence[Hashable] | NDArray[np.generic]


def vector(values: ArrayLike, name: str, *, missing: bool = False) -> Floats:
    """`values` as a flat float64 array; NaN only where `missing` allows it. Raises BadInput naming `name`."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise BadInput(f"{name} must be numbers", param=name) from None
    expect(array.ndim == 1, name, "must be a flat list of numbers", f"{array.ndim} dimensions")
    good = np.isfinite(array) | (np.isnan(array) if missing else False)
    if not good.all():
        at = int(np.argmin(good))
        raise BadInput(f"{name} must be finite; entry {at} is {array[at]}", param=name)
    return array


def number(value: float, name: str) -> float:
    """A finite float, or BadInput naming `name`."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        raise BadInput(f"{name} must be a number, not {value!r}", param=name) from None
    expect(math.isfinite(result), name, "must be finite", result)
    return result


def fraction(value: float, name: str) -> float:
    """A float between 0 and 1, or BadInput naming `name`."""
    result = number(value, name)
    expect(0 <= result <= 1, name, "must lie between 0 and 1", result)
    return result


def labels(values: Labels, name: str, size: int) -> NDArray[np.intp]:
    """Group labels (numbers or strings) as codes 0.. in the order of first sight; BadInput naming `name`."""
    items = values.tolist() if isinstance(values, np.ndarray) else list(values)
    expect(len(items) == size, name, f"must hold {size} labels", len(items))
    codes: dict[Hashable, int] = {}
    for item in items:
        sound = isinstance(item, str | int | np.integer) or (
            isinstance(item, float | np.floating) and math.isfinite(item)
        )
        expect(sound, name, "must be numbers or strings", repr(item))
        codes.setdefault(item, len(codes))
    return np.array([codes[item] for item in items], dtype=np.intp)


def expect(sound: bool, name: str, rule: str, got: object) -> None:
    """BadInput naming `name` unless `sound`; `rule` says what it must be, `got` what it is."""
    if not sound:
        raise BadInput(f"{name} {rule}, not {got}", param=name)
