"""What a configuration names by ``module:NAME``: classes and entries of the user's own modules."""

from __future__ import annotations

import importlib
import traceback
from types import FrameType
from typing import Any

from flowtilt.files import one_line

_OWN: set[str] = set()
"""Packages of the modules that were named; those of this project are not among them."""


def imported(name: str) -> Any:
    """An attribute of an importable module, named ``module:NAME``.

    Raises:
        ValueError: if there is no such module or attribute, or the module fails as it is imported.
    """
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        absent = (
            isinstance(error, ModuleNotFoundError)
            and error.name
            and f"{module}.".startswith(f"{error.name}.")
        )
        if absent or not module:
            raise ValueError(
                f"cannot load {name!r} ({error}); "
                "the module must be importable, for instance from a folder named in PYTHONPATH"
            ) from None
        raise ValueError(
            f"cannot load {name!r}: the module fails as it is imported: {one_line(error)} "
            f"({_place(error, module)}); mend it there"
        ) from error
    if (package := module.partition(".")[0]) != "flowtilt":
        _OWN.add(package)
    try:
        return getattr(found, attribute)
    except AttributeError:
        raise ValueError(
            f"cannot load {name!r}: module {module} has no attribute {attribute!r}; correct the name"
        ) from None


def message_of(error: Exception, *expected: type[Exception]) -> str:
    """The message of an error, which says so if the user's own code has raised it.

    Args:
        expected: kinds whose messages are good where the code is not the user's.

    Raises:
        Exception: the error itself, if it is of another kind and not from the user's code.
    """
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] in _OWN:
            return (
                f"your own module {module} fails: {one_line(error)} ({_place(error, module)}); mend it there"
            )
    if isinstance(error, expected):
        return str(error)
    raise error


def _place(error: BaseException, module: str) -> str:
    """File and line where a module failed; where it was not reached, those of the failure itself."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = list(traceback.walk_tb(error.__traceback__))
    own = [(frame, line) for frame, line in frames if _in_file_of(frame, module)]
    frame, line = (own or frames)[-1]
    return f"{frame.f_code.co_filename}, line {line}"


def _in_file_of(frame: FrameType, module: str) -> bool:
    known = frame.f_globals
    return known.get("__name__") == module and known.get("__file__") == frame.f_code.co_filename
