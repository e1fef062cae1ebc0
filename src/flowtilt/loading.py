"""What a configuration names by ``module:NAME``: classes and entries of the user's own modules."""

from __future__ import annotations

import importlib
from typing import Any


def imported(name: str) -> Any:
    """An attribute of an importable module, named ``module:NAME``.

    Raises:
        ValueError: if there is no such module or attribute, or the module fails as it is imported.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"cannot load {name!r} ({error}); "
            "the module must be importable, for instance from a folder named in PYTHONPATH"
        ) from None
