"""Prompts from a file that the user has placed. A workflow reads it: no torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowtilt.files import read_json, read_text
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.places import located

KEYS = ("prompts", "training_prompts")
"""Keys of an experiment that can be files."""

OF_AN_OBJECT = ("prompt", "text")
"""Under which of these an object of a file has its prompt."""


def with_prompts(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The data of an experiment with the prompts of the files that it names. Raises ConfigError, naming the
    files, the key and the fix."""
    named = {key: data[key] for key in KEYS if isinstance(data.get(key), str)}
    return {**data, **{key: read_prompts(file, f"{path}: key {key}") for key, file in named.items()}}


def read_prompts(file: str, where: str) -> list[str]:
    """The prompts of a file, each once, in its order.

    It is a JSON list of prompts, a JSON list of objects that have a prompt under ``prompt`` or ``text``, or
    text with one of either on each line.

    Args:
        file: its path, relative to the workflow's folder.
        where: the configuration's file and key, for messages.

    Raises:
        ConfigError: if it is not there, is no such file, or has no prompts.
    """
    place = located(file)
    fix = "place one there with a JSON list, or a prompt on each line, or write the prompts here as a list"
    if not place.is_file():
        raise ConfigError(f"{where}: {file}: no such file; {fix}")
    try:
        entries = _entries(place)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {file}: cannot be read as prompts ({error}); {fix}") from None
    if not entries:
        raise ConfigError(f"{where}: {file}: has no prompts; {fix}")
    found = [_prompt(entry, number, f"{where}: {file}") for number, entry in enumerate(entries, 1)]
    return list(dict.fromkeys(found))


def _entries(place: Path) -> list[Any]:
    text = read_text(place)
    if place.suffix == ".json" or text.lstrip().startswith("["):
        entries = read_json(place)
        if not isinstance(entries, list):
            raise ValueError(f"it holds a {type(entries).__name__} of JSON, not a list")
        return entries
    lines = [line.strip() for line in text.splitlines()]
    return [json.loads(line) if line.startswith("{") else line for line in lines if line]


def _prompt(entry: Any, number: int, where: str) -> str:
    if isinstance(entry, dict):
        entry = next((entry[key] for key in OF_AN_OBJECT if key in entry), None)
    if not isinstance(entry, str) or not entry.strip():
        raise ConfigError(
            f"{where}: entry {number} is no prompt; give a text that is not empty, or an object with one "
            f"under {' or '.join(OF_AN_OBJECT)}"
        )
    return entry.strip()
