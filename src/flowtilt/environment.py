"""Numbers in variables of the environment."""

from __future__ import annotations

import math
import os


def number(variable: str, default: float, least: float = 0.0) -> float:
    """A finite number of at least ``least`` from a variable; ``default`` if it is not set.

    Raises:
        ValueError: naming the variable, its value and what is wanted.
    """
    text = os.environ.get(variable)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= least):
        raise ValueError(
            f"environment variable {variable}={text}: must be a finite number, {least:g} or more; "
            f"correct it, or unset it for {default:g}"
        )
    return value


def count(variable: str, default: int = 1) -> int:
    """A whole number of at least 1 from a variable; ``default`` if it is not set.

    Raises:
        ValueError: naming the variable, its value and what is wanted.
    """
    text = os.environ.get(variable)
    if text is None:
        return default
    if not (text.strip().isascii() and text.strip().isdecimal() and int(text) >= 1):
        raise ValueError(
            f"environment variable {variable}={text}: must be a whole number, 1 or more; "
            f"correct it, or unset it for {default}"
        )
    return int(text)
