"""Files and folders that appear whole or not at all; text is UTF-8, whatever the locale."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to; it takes the name ``path`` if the block succeeds.

    The temporary file lies in the folder of ``path`` (made if it is missing), so that the renaming
    cannot cross file systems, and it has the same extension, since some writers append their own
    to other names. If the block raises, an earlier file at ``path`` stays as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}{target.suffix}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder to fill; it takes the place of ``path`` if the block succeeds.

    If the block raises, what was at ``path`` stays as it was.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text as UTF-8; the file appears whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: str | os.PathLike[str], refusal: type[Exception] = ValueError) -> str:
    """Text of a file in UTF-8; a byte order mark at its start is passed over.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        refusal: naming the file and the line, if it is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise refusal(f"{path}, line {line}: the text is not UTF-8; save the file as UTF-8") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it is not JSON, which has no NaN and no infinity.
    """
    return json.loads(read_text(path), parse_constant=_no_constant)


def _no_constant(token: str) -> float:
    raise ValueError(f"{token} is not JSON; an undefined value is null")


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of an npz file by name; none is unpickled.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not whole.
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise ValueError(f"not a whole npz file ({one_line(error)})") from None


def one_line(error: BaseException) -> str:
    """The kind and the message of an error, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
