"""The three floors: domains on the pipeline, the pipeline on the library, and imports only point down."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "flowtilt"
PIPELINE, DOMAINS = "flowtilt.pipeline", "flowtilt.domains"


def name_of(file: Path) -> str:
    parts = ("flowtilt", *file.relative_to(SOURCES).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {name_of(file): file for file in sorted(SOURCES.rglob("*.py"))}


def statements(body: list[ast.stmt], late: bool) -> Iterator[ast.stmt]:
    """The statements of a module that import; without ``late`` those that run as it is imported itself."""
    for statement in body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield statement
            continue
        inside = isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
        checked = isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test)
        if late or not (inside or checked):
            for field in ("body", "orelse", "finalbody", "handlers"):
                for child in getattr(statement, field, []):
                    yield from statements(
                        child.body if isinstance(child, ast.ExceptHandler) else [child], late
                    )


def imported_by(module: str, late: bool) -> set[str]:
    """Modules of flowtilt that a module imports."""
    found = set()
    for statement in statements(ast.parse(MODULES[module].read_text(encoding="utf-8")).body, late):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        else:
            assert statement.level == 0, f"{module}: import by the full name"
            of = statement.module or ""
            names = [f"{of}.{a.name}" if f"{of}.{a.name}" in MODULES else of for a in statement.names]
        found |= {name for name in names if name in MODULES}
    return found - {module}


def below(name: str, floor: str) -> bool:
    return name == floor or name.startswith(f"{floor}.")


def is_too_high(name: str, module: str) -> bool:
    """Whether a module must not import another: one of a floor above, or of a domain beside its own."""
    if below(module, DOMAINS):
        return below(name, DOMAINS) and not below(name, ".".join(module.split(".")[:3]))
    return below(name, DOMAINS) or (below(name, PIPELINE) and not below(module, PIPELINE))


def test_imports_point_down() -> None:
    """Late imports too, and those for types alone."""
    every = [(module, name) for module in MODULES for name in imported_by(module, late=True)]
    assert [f"{module} imports {name}" for module, name in every if is_too_high(name, module)] == []


def test_nothing_is_imported_in_a_circle() -> None:
    """As modules are imported; one imports the packages that it is in as well."""
    graph = {module: imported_by(module, late=False) for module in MODULES}
    for module, needed in graph.items():
        own = {".".join(module.split(".")[:i]) for i in range(1, module.count(".") + 2)}
        packages = {".".join(name.split(".")[:i]) for name in needed for i in range(1, name.count(".") + 1)}
        needed |= packages - own
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


# Words of single domains. Not among them: what the mathematics is done on, as the plane, and `np.clip`.
WORDS = re.compile(
    r"molecul\w*|(?<![a-z])(images?|text.to.image|planar|xtb)(?![a-z])|qm9|rdkit|diffusers|"
    r"(?-i:CLIP)|stable.?diffusion",
    re.IGNORECASE,
)


def outside() -> list[Path]:
    """Files of the library, the pipeline and the workflow; its profiles are configuration."""
    found = [file for folder in ("src", "workflow") for file in (ROOT / folder).rglob("*") if file.is_file()]
    aside = (SOURCES / "domains", ROOT / "workflow" / "profiles")
    kept = (".py", ".smk", ".rst", ".sh", ".yaml", ".json")
    ours = [f for f in found if f.suffix in kept and not any(f.is_relative_to(folder) for folder in aside)]
    return [ROOT / "Snakefile", ROOT / "workflow" / "Snakefile", *sorted(ours)]


def test_no_file_outside_of_the_domains_names_one() -> None:
    said = [
        f"{file.relative_to(ROOT)}:{number}: {line}"
        for file in outside()
        for number, line in enumerate([file.stem, *file.read_text(encoding="utf-8").splitlines()])
        if WORDS.search(line)
    ]
    assert said == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("of Molecules", True),
        ("image_reward", True),
        ("np.clip(x)", False),
        ("CLIP", True),
        ("imaged", False),
    ],
)
def test_words_of_domains_are_told_from_others(text: str, found: bool) -> None:
    assert bool(WORDS.search(text)) is found
