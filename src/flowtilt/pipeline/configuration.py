"""Plain data from YAML files as checked sections, and errors that name the file, the key and the fix."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from flowtilt.files import read_text
from flowtilt.yaml_files import YamlError, parse_yaml

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Model = TypeVar("Model", bound=BaseModel)
Entries = TypeVar("Entries", bound=Iterable[Any])
Named = TypeVar("Named", bound=Iterable[str])

MAX_NAME = 80
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{MAX_NAME - 1}}}")


def check_name(name: str) -> str:
    """A name that a user chooses, of which files are named and commands made. Raises ValueError for any that
    could not be part of a path, of a command, or of a rule's name."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a name must be 1 to {MAX_NAME} letters (a-z, A-Z), digits and the signs . _ - and must not "
            "begin with . or -; choose another"
        )
    return name


def check_case_name(name: str) -> str:
    """The name of an experiment, or of a case of a study: {study}/{label}; see :func:`check_name`."""
    study, _, label = name.partition("/")
    check_name(study)
    if label or "/" in name:
        check_name(label)
    return name


def no_repeats(entries: Entries) -> Entries:
    """A list in which nothing occurs twice. Raises ValueError, naming the first that does."""
    repeated = [entry for entry, count in Counter(map(repr, entries)).items() if count > 1]
    if repeated:
        raise ValueError(f"{repeated[0]} occurs twice; keep one of them")
    return entries


def tell_apart(names: Named) -> Named:
    """Names of which no two differ by upper and lower case alone, which some file systems take for one.
    Raises ValueError, naming the first two that do, or one that occurs twice."""
    seen: dict[str, str] = {}
    for name in no_repeats(names):
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise ValueError(f"{other!r} and {name!r} are one file to some systems; rename one of them")
    return names


Name = Annotated[str, AfterValidator(check_name), Field(json_schema_extra={"pattern": f"^{_NAME.pattern}$"})]
CaseName = Annotated[str, AfterValidator(check_case_name)]
NoRepeats = AfterValidator(no_repeats)
ToldApart = AfterValidator(tell_apart)
"""Of a list of names, or a mapping by name."""

Seeds = Annotated[
    list[Annotated[int, Field(ge=0)]],
    Field(min_length=1),
    BeforeValidator(lambda value: list(range(value)) if type(value) is int else value),
    NoRepeats,
]
"""Seeds of an experiment; a number stands for as many, from 0."""

Row = Annotated[list[float], Field(min_length=2, max_length=2)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key and the fix."""


class Section(BaseModel):
    """A mapping of a configuration: keys that it does not know are refused, and it cannot be changed.

    Values keep their kind: text is not read as a number, and ``true`` is not 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    renamed: ClassVar[Mapping[str, str]] = {}
    """Keys of earlier versions: what each is called now, and what else has changed about it."""

    @model_validator(mode="wrap")
    @classmethod
    def _of_their_kinds(cls, data: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        section = read(data)
        for key in cls.model_fields.keys() & (data.keys() if isinstance(data, Mapping) else ()):
            if (wrong := _taken_for_another(data[key], getattr(section, key))) is not None:
                said = f"must be {_kind(wrong[1])}, and {_kind(wrong[0])} was given; {_SPELLING}"
                detail = InitErrorDetails(type=PydanticCustomError("kind", said), loc=(key,), input=wrong[0])
                raise ValidationError.from_exception_data(cls.__name__, [detail])
        return section


_SPELLING = "numbers, true and false are written without quotes, and text that looks like them within"


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "true or false" if isinstance(value, bool) else "a number"


def _taken_for_another(given: Any, found: Any) -> tuple[Any, Any] | None:
    """The first value whose kind has changed as it was read: as it was given, and as it was read."""
    if isinstance(given, Mapping) and isinstance(found, Mapping):
        pairs = [(value, found.get(key)) for key, value in given.items()]
    elif isinstance(given, list | tuple) and isinstance(found, list | tuple):
        pairs = list(zip(given, found, strict=False))
    elif isinstance(given, str | bool | int | float) and isinstance(found, str | bool | int | float):
        return (given, found) if _kind(given) != _kind(found) else None
    else:
        return None
    return next((wrong for one, other in pairs if (wrong := _taken_for_another(one, other))), None)


def validated(kind: type[Model], data: Any, path: Path, case: str | None = None) -> Model:
    """Some data as a section of a configuration. Raises ConfigError, naming the file, the key and the fix; of
    the first three errors."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        where = f"{path} (case {case})" if case else str(path)
        raise ConfigError("; ".join(explain(where, kind, e) for e in error.errors()[:3])) from None


def explain(where: str, kind: type[BaseModel], error: Any) -> str:
    """One validation error as a sentence with the file, the key and the fix."""
    key = ".".join(str(part) for part in error["loc"] if part != "[key]") or "(whole file)"
    if error["type"] == "extra_forbidden":
        section = _section_at(kind, error["loc"][:-1])
        known, renamed = getattr(section, "model_fields", {}), getattr(section, "renamed", {})
        return f"{where}: key {key}: {unknown_key(error['loc'][-1], known, renamed)}"
    if error["type"] == "missing":
        return f"{where}: key {key}: missing; add it"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict):
        return f"{where}: key {key}: {message}"
    return f"{where}: key {key}: {message} (got {error['input']!r})"


def unknown_key(key: Any, known: Iterable[str], renamed: Mapping[str, str]) -> str:
    """What is wrong with a key that is none of the known ones; see :attr:`Section.renamed`."""
    if key in renamed:
        return f"has been renamed to {renamed[key]}"
    return f"unknown; known keys here: {', '.join(known) or 'none'}"


def changed(section: Model, changes: Mapping[str, Any], where: str) -> Model:
    """A section with some keys changed. Raises ValueError if that is no valid section; the message begins
    with ``where`` and names the key."""
    kind = type(section)
    try:
        return kind.model_validate(merge(section.model_dump(), changes))
    except ValidationError as error:
        raise ValueError(explain(where, kind, error.errors()[0])) from None


def _section_at(kind: type[BaseModel], location: tuple[int | str, ...]) -> Any:
    """The section at ``location``."""
    section: Any = kind
    for part in location:
        fields = getattr(section, "model_fields", {})
        if part not in fields:
            continue  # an index, or a name chosen by the file
        annotation = fields[part].annotation
        inner = [a for a in getattr(annotation, "__args__", ()) if hasattr(a, "model_fields")]
        section = inner[0] if inner else annotation
    return section


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` merged in; mappings merge key by key, all else is replaced. A mapping of
    another ``kind`` replaces the old one whole, since its other keys are parameters of that kind."""
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
    """A YAML mapping from a file; see :mod:`flowtilt.yaml_files` for what is valid. Raises ConfigError,
    naming the file, and the line and the key where there are some."""
    if not path.is_file():
        near = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"{path}: no such file; experiments in {path.parent}: {near}")
    return _mapping(read_text(path, ConfigError), str(path))


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        data = parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{where}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: must hold a mapping of keys, not {type(data).__name__}")
    return data


def workflow_config(files: Sequence[str | Path], settings: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """The workflow's configuration, read as all other files are; Snakemake has read it by other rules.

    Snakemake keeps the last of keys that stand twice. It reads YAML 1.1 from files, and nothing but text from
    within the values of ``--config``.

    Args:
        files: those in use, as in Snakemake's ``workflow.configfiles``: those of the command line first.
        settings: how they were given, Snakemake's ``workflow.config_settings``: ``configfiles``, files of the
            command line, which are merged in after those of the workflow; ``config_args``, ``key=value``
            each, merged in last; and ``replace_workflow_config``, whether they stand instead of the
            workflow's own files. None where this Snakemake does not tell: then ``found`` is taken as it is.

    Raises:
        ConfigError: naming the file, the key and the fix.
    """
    read = [read_yaml(Path(file)) for file in files]
    if settings is None:
        return dict(found)
    given, own = read[: len(settings.configfiles)], read[len(settings.configfiles) :]
    replaced = settings.replace_workflow_config and (given or settings.config_args)
    merged: dict[str, Any] = {}
    for data in given if replaced else [*own, *given]:
        merged = merge(merged, data)
    for entry in settings.config_args or ():
        key, _, text = entry.partition("=")
        try:
            merged = merge(merged, {key: parse_yaml(text)})
        except YamlError as error:
            raise ConfigError(f"--config {key}: {error}") from None
    return merged
