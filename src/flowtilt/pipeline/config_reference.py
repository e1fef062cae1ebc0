"""``config/README.md``: every key of every configuration file, written from the schemas.

A key's sentence is the string literal under its field in the section's class. Types, ranges and defaults come
from the same places. The literals are read from the sources here, and not by pydantic as it makes the
classes: that would add a tenth of a second to every job.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from flowtilt.files import read_text, write_text
from flowtilt.functionals.keys import DIVERGENCE_KEYS, UTILITY_KEYS, FunctionalKeys
from flowtilt.pipeline.config import WorkflowConfig
from flowtilt.pipeline.configuration import ConfigError, Section
from flowtilt.pipeline.domain import Chapter, known_domains
from flowtilt.pipeline.experiment import Study
from flowtilt.pipeline.theory.config import MirrorDescentConfig, ThresholdStudyConfig, TiltStudyConfig

Schema = Mapping[str, Any]

BEGINS, ENDS = (
    f"<!-- What `flowtilt config-reference` writes {word} here. -->\n" for word in ("begins", "ends")
)
"""Lines of the file; what is before the first and after the second is written by hand."""


_LOADED = {"starts_from": "its name"}
"""Defaults that a file is given as it is loaded, before it is checked."""


@functools.cache
def chapters() -> tuple[Chapter, ...]:
    """Of the kinds of files: the workflow's, those of every domain, studies, and the theory's."""
    return (_WORKFLOW, *(chapter for domain in known_domains() for chapter in domain.chapters), *_OTHERS)


_WORKFLOW = Chapter(
    "The workflow: `config.yaml`",
    "What Snakemake reads: `config.yaml`, and the scales that override it.",
    WorkflowConfig,
    "of the workflow",
)

_OTHERS = (
    Chapter(
        "Studies",
        "An `experiments/{name}.yaml` with a `study`: cases, each an experiment derived from another file.",
        Study,
        "of a study",
    ),
    Chapter(
        "Theory: mirror ascent",
        "A `theory/{name}.yaml` with `kind: mirror_descent`: exact mirror ascent on a grid against its "
        "bounds. `docs/theory-tables.md` says what is checked.",
        MirrorDescentConfig,
        "of mirror ascent",
    ),
    Chapter(
        "Theory: thresholds",
        "A `theory/{name}.yaml` with `kind: threshold`: thresholds of tail means against their exact values.",
        ThresholdStudyConfig,
        "of thresholds",
    ),
    Chapter(
        "Theory: tilts",
        "A `theory/{name}.yaml` with `kind: tilts`: the control solvers on tilts in closed form.",
        TiltStudyConfig,
        "of tilts",
    ),
)


def write_reference(output: Path) -> None:
    """Write the reference into a Markdown file, between the lines that say where it goes, if there are some.
    Raises ConfigError if a key has no description; the message names it."""
    by_hand = read_text(output) if output.is_file() else "# Configuration\n\n"
    before, after = by_hand.partition(BEGINS)[0], by_hand.partition(ENDS)[2]
    write_text(output, f"{before}{BEGINS}\n{reference()}\n{ENDS}{after}")


def reference() -> str:
    """All chapters."""
    parts = []
    headings = _headings()
    for chapter in chapters():
        described = _described(chapter.kind)
        parts += [f"## {chapter.title}\n", f"{chapter.text}\n", _keys(described, headings)]
        for found in (section for section in _all_sections() if section.chapters[0].kind is chapter.kind):
            parts += [f"### {headings[found.kind]}\n", f"{_prose(found.kind)}\n"]
            parts.append(_keys(_described(found.kind), headings))
        if chapter.functionals:
            parts += [_functionals("Utilities", UTILITY_KEYS), _functionals("Divergences", DIVERGENCE_KEYS)]
    return "\n".join(parts)


# ----------------------------------------------------------------------------------- chapters


def _functionals(title: str, functionals: Mapping[str, FunctionalKeys]) -> str:
    """The table of utilities or of divergences, a line a functional and one for each parameter."""
    lines = [f"### {title}\n", "| `kind` | parameter | type and range | default | meaning |"]
    lines.append("|---|---|---|---|---|")
    for name, functional in functionals.items():
        lines.append(f"| `{name}` | | | | {functional.text} |")
        for key, own in functional.keys.items():
            default = "*required*" if own.default is None else f"`{json.dumps(own.default)}`"
            lines.append(f"| | `{key}` | {own.type} | {default} | {own.text} |")
    kind = title.removesuffix("s").replace("ie", "y").lower()
    lines.append(
        f"\nA {kind} `{{kind: sum, parts: [...]}}` is a weighted sum: each part has a `name` of this table, "
        "its parameters, and a `weight` (1 if not given).\n"
    )
    return "\n".join(lines)


class Found(NamedTuple):
    """A section, the key that leads to it, and the chapters whose files have it."""

    kind: type[Section]
    path: str
    chapters: list[Chapter]

    @property
    def of(self) -> str:
        """How it is told apart from sections of the same name."""
        own = next((domain for domain in known_domains() if self.chapters[0] in domain.chapters), None)
        if own and len(own.chapters) > 1 and all(chapter in self.chapters for chapter in own.chapters):
            return own.words
        return self.chapters[0].of


@functools.cache
def _all_sections() -> tuple[Found, ...]:
    """Every section below the files' own keys, in the order of the document, each once."""
    found: dict[type[Section], Found] = {}

    def walk(kind: type[Section], path: str, chapter: Chapter) -> None:
        for key, own in _described(kind)["properties"].items():
            for name in re.findall(r'"\$ref": "(\w+)"', json.dumps(own)):
                inner, at = _kinds()[name], f"{path}{key}"
                found.setdefault(inner, Found(inner, at, [])).chapters.append(chapter)
                walk(inner, f"{at}.", chapter)

    for chapter in chapters():
        walk(chapter.kind, "", chapter)
    return tuple(found.values())


def _headings() -> dict[type[Section], str]:
    """Heading of each section: its key, and where several have the same, what its experiment is on. Sections
    that a key of one experiment can be are told apart by what their key ``utility`` must be."""
    paths = [found.path for found in _all_sections()]
    within = [(found.path, found.of) for found in _all_sections()]
    headings = {}
    for found in _all_sections():
        heading = f"`{found.path}`" + (f" {found.of}" if paths.count(found.path) > 1 else "")
        if within.count((found.path, found.of)) > 1:
            (value,) = get_args(found.kind.model_fields["utility"].annotation)
            heading += f", `{value}`"
        headings[found.kind] = heading
    return headings


# ------------------------------------------------------------------------- what sections say


@functools.cache
def _kinds() -> dict[str, type[Section]]:
    """Every class of sections by its name."""

    def below(kind: type[Section]) -> Iterator[type[Section]]:
        for inner in kind.__subclasses__():
            yield inner
            yield from below(inner)

    return {kind.__name__: kind for kind in below(Section)}


def _described(kind: type[Section]) -> Schema:
    """The JSON schema of a section, with the descriptions of its keys.

    Raises:
        ConfigError: for a key without.
    """
    schema = kind.model_json_schema(ref_template="{model}")
    texts = field_texts(kind)
    for key, own in schema["properties"].items():
        if not texts.get(key):
            where = Path(inspect.getfile(kind)).name
            raise ConfigError(
                f"{where}: key {key} of {kind.__name__} has no description; write a string literal under it"
            )
        own["description"] = texts[key]
    return schema


def field_texts(kind: type[Section]) -> dict[str, str]:
    """The string literals under the fields of a section, those of its bases among them, as Markdown."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, Section):
            texts |= _literals(base.__module__).get(base.__name__, {})
    return texts


@functools.cache
def _literals(module: str) -> dict[str, dict[str, str]]:
    """The string literals under annotated names, by class, of the source of an imported module."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if not isinstance(node, ast.ClassDef):
            continue
        texts = found[node.name] = {}
        for field, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                texts[field.target.id] = _markdown(text.value.value)
    return found


def _prose(kind: type[Section]) -> str:
    """The docstring of a section as Markdown, its own or the nearest base's."""
    return "\n\n".join(_markdown(part) for part in (inspect.getdoc(kind) or "").split("\n\n"))


def _markdown(text: str) -> str:
    """A paragraph of a docstring: names in code, one line."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return " ".join(re.sub(r"``([^`]+)``", r"`\1`", text).split())


# ------------------------------------------------------------------------------------- tables


def _keys(schema: Schema, headings: Mapping[type[Section], str]) -> str:
    """The table of a section's keys."""
    required = schema.get("required", ())
    rows = [_row(key, key in required, own, headings) for key, own in schema["properties"].items()]
    lines = ["| key | type and range | default | meaning |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _row(key: str, required: bool, own: Schema, headings: Mapping[type[Section], str]) -> tuple[str, ...]:
    text = _markdown(own["description"])
    text = text[0].upper() + text[1:].rstrip(".") + "."
    default = _LOADED.get(key) or _default(own, required)
    return f"`{key}`", _words(own, headings), default, text


def _default(own: Schema, required: bool) -> str:
    if required:
        return "*required*"
    mapping = own.get("type") == "object" or "additionalProperties" in own
    default = own.get("default", {} if mapping else [] if "items" in own else None)
    if default is None:
        return "*none*"
    if default in ({}, []):
        return "empty"
    if isinstance(default, Mapping):
        return "its own"
    return f"`{json.dumps(default)}`"


def _words(own: Schema, headings: Mapping[type[Section], str], plural: bool = False) -> str:
    """Type and range of a JSON schema in words."""
    s = "s" if plural else ""
    if "anyOf" in own or "oneOf" in own:
        options = [option for option in own.get("anyOf", own.get("oneOf")) if option != {"type": "null"}]
        return " or ".join(_words(option, headings, plural) for option in options)
    if own.get("$ref"):
        heading = headings[_kinds()[own["$ref"]]]
        return f"[{heading}](#{anchor(heading)})"
    if "enum" in own or "const" in own:
        values = [f"`{value}`" for value in own.get("enum", [own.get("const")])]
        return " or ".join(filter(None, [", ".join(values[:-1]), values[-1]]))
    if own["type"] == "array":
        return _array(own, headings, plural)
    if own["type"] == "object":
        inner = own.get("additionalProperties") or next(iter(own.get("patternProperties", {}).values()), None)
        return f"by name: {_words(inner, headings)}" if isinstance(inner, Mapping) else f"mapping{s}"
    if own["type"] == "string":
        return f"text{s} matching `{own['pattern']}`" if "pattern" in own else f"text{s}"
    if own["type"] == "boolean":
        return "`true` or `false`"
    return f"{'whole number' if own['type'] == 'integer' else 'number'}{s}{_range(own)}"


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _array(own: Schema, headings: Mapping[type[Section], str], plural: bool) -> str:
    if "prefixItems" in own:
        return ", ".join(_words(item, headings) for item in own["prefixItems"])
    inner = _words(own["items"], headings, plural=True)
    if own.get("minItems", 0) == own.get("maxItems"):
        return f"pairs of {inner}" if plural else f"{own['minItems']} {inner}"
    return f"list of {inner}"


def _range(own: Schema) -> str:
    """Bounds of a number: `` > 0``, `` in (0, 1]`` or nothing."""
    low, high = (
        own.get("minimum", own.get("exclusiveMinimum")),
        own.get("maximum", own.get("exclusiveMaximum")),
    )
    if low is not None and high is not None:
        return f" in {'[' if 'minimum' in own else '('}{low:g}, {high:g}{']' if 'maximum' in own else ')'}"
    if low is not None:
        return f" {'≥' if 'minimum' in own else '>'} {low:g}"
    return f" {'≤' if 'maximum' in own else '<'} {high:g}" if high is not None else ""
