"""YAML as this package reads and writes it: one meaning for everything that stands in a file.

Words and numbers are those of YAML 1.2's core schema, whichever way they are spelt: ``8e-1`` is a number,
``yes``, ``on``, ``1:30`` and a date are text. What would mean two things is refused: a key that stands twice,
and ``010``, which is 8 in YAML 1.1 and 10 in YAML 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from typing import Any

import yaml

_RESOLVERS: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)
"""Tag, pattern and first characters of plain scalars that are not text: YAML 1.2, 10.3.2; and ``<<``."""


class YamlError(ValueError):
    """Text that is not valid YAML, or says two things; the message names the line, and the key if it can."""


class Loader(yaml.SafeLoader):
    """Reads YAML 1.2's core schema, without any code in it being run."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._path: list[str] = []

    @contextmanager
    def _inside(self, index: Any) -> Iterator[None]:
        """Remember where a node stands: ``index`` is its key's node, or its place in a list."""
        step = index.value if isinstance(index, yaml.ScalarNode) else index
        self._path.append("" if step is None else str(step))
        try:
            yield
        finally:
            self._path.pop()

    def _where(self, *more: str) -> str:
        key = ".".join(filter(None, [*self._path, *more]))
        return f"key {key}: " if key else ""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        with self._inside(index):
            return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not when it is constructed: by then the mappings that << names are merged in.
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused when it is constructed
            line = key.start_mark.line + 1
            if key.value in lines:
                raise YamlError(
                    f"{self._where(key.value)}stands in line {lines[key.value]} and again in line "
                    f"{line}; keep one of them"
                )
            lines[key.value] = line
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if node.tag.endswith(":int") and (old := re.fullmatch(r"([-+]?)0+([0-9]+)", node.value)):
            raise YamlError(
                f"{self._where()}{node.value} in line {node.start_mark.line + 1} is a decimal number to "
                f"some and an octal one to others; write {old[1]}{old[2]}, or '{node.value}' if it is text"
            )
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(str(self.construct_scalar(node)), 0)


Loader.yaml_implicit_resolvers = {}  # without those of YAML 1.1
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


class Dumper(yaml.SafeDumper):
    """Puts text in quotes wherever a reader of YAML 1.1 or 1.2 would take it for something else."""


for tag, pattern, first in _RESOLVERS:
    characters = ["" if character == "\0" else character for character in first]
    for kind in (Loader, Dumper):
        kind.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})\\Z"), characters)


def parse_yaml(text: str) -> Any:
    """Plain data from YAML text.

    Raises:
        YamlError: if it is not valid, or says two things.
    """
    return deepcopy(_parsed(text))


@lru_cache(maxsize=128)
def _parsed(text: str) -> Any:
    """The same, once for each text: a plan reads its files again for each case that derives from them."""
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise YamlError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except YamlError:
        raise
    except ValueError as error:  # a number of more digits than Python reads, a date that is tagged as one
        raise YamlError(f"not valid YAML: {error}") from None


def dump_yaml(data: Any) -> str:
    """Plain data as YAML text, which both versions of YAML read alike; the keys keep their order."""
    return str(yaml.dump(data, Dumper=Dumper, sort_keys=False))
