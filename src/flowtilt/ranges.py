"""Ranges of settings, and errors that name the key, the range and what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Range:
    """Numbers that a setting may have.

    Attributes:
        words: which they are; they follow ``must be``.
        holds: whether a finite number is one of them.
        whole: whether they are whole numbers.
    """

    words: str
    holds: Callable[[Any], bool]
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        kind = Integral if self.whole else Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        return math.isfinite(value) and self.holds(value)


def at_least(least: int) -> Range:
    """Whole numbers from ``least`` on."""
    return Range(f"a whole number of at least {least}", lambda value: value >= least, whole=True)


def between(low: float, high: float) -> Range:
    """Numbers of the open interval."""
    return Range(f"a number in ({low:g}, {high:g})", lambda value: low < value < high)


def below(high: float) -> Range:
    """Numbers from 0 to below ``high``."""
    return Range(f"a number in [0, {high:g})", lambda value: 0 <= value < high)


COUNT = at_least(1)
FINITE = Range("a finite number", lambda value: True)
POSITIVE = Range("positive and finite", lambda value: value > 0)
NOT_NEGATIVE = Range("finite and not negative", lambda value: value >= 0)
MASS = Range("a number in (0, 1]", lambda value: 0 < value <= 1)
SHARE = Range("a number from 0 to 1", lambda value: 0 <= value <= 1)
PERCENTILE = Range("a number above 0 and up to 100", lambda value: 0 < value <= 100)


def check(settings: Any, owner: str = "", **ranges: Range) -> None:
    """Hold attributes to their ranges; one that is None, where its class has that for a default, may be so.

    Args:
        settings: whose attributes.
        owner: what they belong to, in front of the key.
        ranges: by the name of the attribute.

    Raises:
        ValueError: naming the first key that is out of its range, the range and what came.
    """
    for key, allowed in ranges.items():
        value = getattr(settings, key)
        optional = value is None and getattr(type(settings), key, ...) is None
        if not optional and value not in allowed:
            raise ValueError(f"{owner}{key} must be {allowed.words}, got {value!r}")


def check_value(name: str, value: object, allowed: Range) -> None:
    """Hold one number to its range; see :func:`check`."""
    if value not in allowed:
        raise ValueError(f"{name} must be {allowed.words}, got {value!r}")
