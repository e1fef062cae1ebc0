"""Words that stand for one of a few things: a wrong one must not pass for another.

This module imports neither torch nor the numerics.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

Tail = Literal["lower", "upper"]
"""A tail of a distribution of rewards: its worst values, or its best."""

_TAILS: dict[str, Tail] = {"lower": "lower", "left": "lower", "upper": "upper", "right": "upper"}


def read_tail(word: Any) -> Tail:
    """The tail that a word names: ``lower`` or ``left``, ``upper`` or ``right``, as the papers call it.

    Raises:
        ValueError: for any other word.
    """
    tail = _TAILS.get(word) if isinstance(word, str) else None
    if tail is None:
        raise ValueError(f"a tail must be lower (or left) or upper (or right), got {word!r}")
    return tail


def check_word(word: Any, known: Any, what: str) -> None:
    """Refuse a word that is not a known one.

    Args:
        word: to be checked.
        known: a ``Literal``, or the words.
        what: the word says, for the message.

    Raises:
        ValueError: naming the known ones.
    """
    words: Iterable[str] = get_args(known) or known
    if not isinstance(word, str) or word not in words:
        raise ValueError(f"{what} must be {' or '.join(words)}, got {word!r}")
