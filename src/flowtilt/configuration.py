"""Plain data from YAML files as checked sections, and errors that name the file, the key and the fix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from flowtilt.files import read_text

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Model = TypeVar("Model", bound=BaseModel)
Seeds = Annotated[
    list[Annotated[int, Field(ge=0)]],
    Field(min_length=1),
    BeforeValidator(lambda value: list(range(value)) if isinstance(value, int) else value),
]
"""Seeds of an experiment; a number stands for as many, from 0."""

Row = Annotated[list[float], Field(min_length=2, max_length=2)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key and the fix."""


class Section(BaseModel):
    """A mapping of a configuration: keys that it does not know are refused, and it cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def validated(kind: type[Model], data: Any, path: Path, case: str | None = None) -> Model:
    """Some data as a section of a configuration.

    Args:
        kind: of the section.
        data: plain, from a file.
        path: of the file, for messages.
        case: of a study, for messages.

    Raises:
        ConfigError: naming the file, the key and the fix; of the first three errors.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        where = f"{path} (case {case})" if case else str(path)
        raise ConfigError("; ".join(explain(where, kind, e) for e in error.errors()[:3])) from None


def explain(where: str, kind: type[BaseModel], error: Any) -> str:
    """One validation error as a sentence with the file, the key and the fix."""
    key = ".".join(str(part) for part in error["loc"]) or "(whole file)"
    if error["type"] == "extra_forbidden":
        return (
            f"{where}: key {key}: unknown; known keys here: {', '.join(_known_keys(kind, error['loc'][:-1]))}"
        )
    if error["type"] == "missing":
        return f"{where}: key {key}: missing; add it"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict):
        return f"{where}: key {key}: {message}"
    return f"{where}: key {key}: {message} (got {error['input']!r})"


def changed(section: Model, changes: Mapping[str, Any], where: str) -> Model:
    """A section with some keys changed.

    Raises:
        ValueError: if that is no valid section; the message begins with ``where`` and names the key.
    """
    kind = type(section)
    try:
        return kind.model_validate(merge(section.model_dump(), changes))
    except ValidationError as error:
        raise ValueError(explain(where, kind, error.errors()[0])) from None


def _known_keys(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the section at ``location``."""
    section: Any = kind
    for part in location:
        fields = getattr(section, "model_fields", {})
        if part not in fields:
            continue  # an index, or a name chosen by the file
        annotation = fields[part].annotation
        inner = [a for a in getattr(annotation, "__args__", ()) if hasattr(a, "model_fields")]
        section = inner[0] if inner else annotation
    return list(getattr(section, "model_fields", {}))


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` merged in; mappings merge key by key, all else is replaced.

    A mapping of another ``kind`` replaces the old one whole, since its other keys are parameters of
    that kind.
    """
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and _same_kind(old, value):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _same_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "kind" not in old or "kind" not in new or old["kind"] == new["kind"]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file, without any code in it being run."""
    if not path.is_file():
        near = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"{path}: no such file; experiments in {path.parent}: {near}")
    try:
        data = yaml.safe_load(read_text(path, ConfigError))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys, not {type(data).__name__}")
    return data
