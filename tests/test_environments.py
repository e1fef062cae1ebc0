"""The conda environments: their files, their versions, and what each rule's stage imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from environments import FILES, MOLECULES, ROOT, Package, make_environment, packages_of, required, rules
from flowtilt.pipeline.cli import COMMANDS
from flowtilt.pipeline.domain import domain_named, sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "envs" / "constraints.txt").read_text(), re.M
    )
}
EXTRAS = {
    "core": ["parallel"],
    "molecules": ["parallel", "molecules"],
    "images": ["parallel", "images"],
}
"""Extras of the package that an environment has beside its dependencies."""

DOMAINS = {
    "molecules": {"qm9pack", "rdkit", "tblite"},
    "images": {"diffusers", "open-clip-torch", "peft", "torchvision", "transformers", "vendi-score"},
}
"""Environments of one domain, and the packages that no other environment has."""

UNNAMED = {"metrics/diversity.py": "images"}
"""Source files whose imports are one domain's, and whose paths do not name it."""

SOURCES = ROOT / "src" / "flowtilt"

TOOLS = {"core": {"python"}, "molecules": {"pip", "python"}, "images": {"pip", "python"}}
"""What makes an environment, and is no dependency of the package; pip for what conda-forge lacks."""


def declared(environment: str) -> dict[str, SpecifierSet]:
    """What pyproject.toml asks for in an environment, by name on PyPI."""
    project = PROJECT["project"]
    lines = list(project["dependencies"])
    for extra in EXTRAS[environment]:
        lines += project["optional-dependencies"][extra]
    return {canonicalize_name(Requirement(line).name): Requirement(line).specifier for line in lines}


def bound(bounds: SpecifierSet, *operators: str) -> list[str]:
    """Versions that stand behind one of some operators."""
    return [specifier.version for specifier in bounds if specifier.operator in operators]


every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
INSTALLED = [
    pytest.param(
        file, marks=pytest.mark.skipif(not MOLECULES, reason="the extra 'molecules' is not installed")
    )
    if file.stem == "molecules"
    else file
    for file in FILES
]
every_package = pytest.mark.parametrize(
    ("file", "package"),
    [(file, package) for file in FILES for package in packages_of(file)],
    ids=lambda value: value.stem if isinstance(value, Path) else value.name,
)


# ---------------------------------------------------------------------------------- the files


def test_rules_and_files_name_each_other() -> None:
    assert {environment for _, environment in rules().values()} == {file.stem for file in FILES}


@every_file
def test_channels_are_conda_forge_alone(file: Path) -> None:
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert data.keys() == {"channels", "dependencies"}  # a name or a prefix would be Snakemake's to choose
    assert data["channels"] == ["conda-forge"]


@every_file
def test_no_path_that_a_copy_of_the_file_would_lose(file: Path) -> None:
    for line in (
        line for line in file.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")
    ):
        assert not re.search(r"/|file:|-e |\.txt|\.whl|=\s*\.", line), line


@every_package
def test_versions_are_bounded_on_both_sides(file: Path, package: Package) -> None:
    assert len(bound(package.bounds, ">=")) == 1
    assert len(bound(package.bounds, "<")) == 1
    assert len(package.bounds) == 2


@every_file
def test_packages_are_those_of_the_project_and_what_installs_it(file: Path) -> None:
    names = [package.on_pypi for package in packages_of(file)]
    assert len(names) == len(set(names))
    assert set(names) == {*declared(file.stem), *TOOLS[file.stem]}


@every_package
def test_lower_bounds_are_those_of_the_project(file: Path, package: Package) -> None:
    if package.name == "python":
        wanted = SpecifierSet(PROJECT["project"]["requires-python"])
    elif package.name == "pip":
        return  # any
    else:
        wanted = declared(file.stem)[package.on_pypi]
    assert bound(package.bounds, ">=") == bound(wanted, ">=")


@every_package
def test_pinned_versions_are_allowed(file: Path, package: Package) -> None:
    if package.name == "pip":
        return  # not pinned
    pins = ["3.11", "3.12", "3.13"] if package.name == "python" else [PINS[package.on_pypi]]
    for pin in pins:
        assert pin in package.bounds


@every_file
def test_only_what_conda_forge_lacks_is_left_to_pip(file: Path) -> None:
    assert {package.name for package in packages_of(file) if package.by_pip} <= {"qm9pack", "vendi-score"}


@every_file
def test_what_environments_share_has_the_same_bounds(file: Path) -> None:
    core = {package.name: package for package in packages_of(ROOT / "envs" / "core.yaml")}
    own = {package.name: package for package in packages_of(file)}
    assert {name: own.get(name) for name in core} == core


def test_no_environment_holds_the_package_itself() -> None:
    """They are shared by what their files say: one that held a clone would give its code to others' jobs."""
    assert not list((ROOT / "envs").glob("*.post-deploy.sh"))
    assert "flowtilt" not in {package.name for file in FILES for package in packages_of(file)}
    assert not (ROOT / "envs" / "core.yaml").read_text().count("pip")


# --------------------------------------------------------------- what stages import, for real


@pytest.fixture(scope="module", params=INSTALLED, ids=[file.stem for file in FILES])
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds what its file lists and the package, and nothing else."""
    prefix = tmp_path_factory.mktemp("environments") / request.param.stem
    make_environment(request.param, prefix)
    (site,) = prefix.glob("lib/python*/site-packages")
    (site / "flowtilt.pth").write_text(f"{ROOT / 'src'}\n")
    return prefix


def run(prefix: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [prefix / "bin" / "python", "-I", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def handlers() -> dict[str, str]:
    """Functions that run the command line's own stages, ``module:function`` by stage."""
    return {name: command.action for name, command in COMMANDS.items()}


def modules_of(rule: str) -> set[str]:
    """Modules of the package that a rule's job imports."""
    stage, _ = rules()[rule]
    if stage in handlers():
        action = handlers()[stage]
        found = {action.partition(":")[0], *imported_by(*action.split(":"))}
        if rule.startswith("figures_"):
            report = domain_named(rule.removeprefix("figures_")).report
            found |= {report, *imported_by(report, "draw")}
        return found
    domain = domain_named(rule.partition("_")[0])
    (found,) = (
        {action.partition(":")[0], *imported_by(*action.split(":"))}
        for action in {one.action for one in domain.stages if one.name == stage}
    )
    if "flowtilt.pipeline.stages" in found:
        found.add(domain.workbench.partition(":")[0])
    return found


def imported_by(module: str, function: str) -> Iterator[str]:
    """Modules of the package that a function imports, and those of its module that it calls."""
    tree = ast.parse((ROOT / "src" / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    left, seen = [function], set()
    while left:
        name = left.pop()
        if name in seen or name not in functions:
            continue
        seen.add(name)
        for node in ast.walk(functions[name]):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("flowtilt"):
                yield node.module
                for alias in node.names:
                    if (ROOT / "src" / Path(*node.module.split("."), f"{alias.name}.py")).is_file():
                        yield f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                left.append(node.func.id)


def test_every_stage_of_a_rule_has_its_handler() -> None:
    for rule, (stage, _) in rules().items():
        assert (stage in handlers()) != (stage in OF_DOMAINS), rule
        assert modules_of(rule), rule


OF_DOMAINS = {stage.name for name in sources() for stage in domain_named(name).stages}


def sources_of(environment: str) -> list[Path]:
    """The source files that its jobs may import: a domain's own, and those of all."""
    found = []
    for file in sorted(SOURCES.rglob("*.py")):
        path = file.relative_to(SOURCES).as_posix()
        named = (domain for domain in DOMAINS if domain.removesuffix("s") in path)
        if next(named, UNNAMED.get(path)) in (None, environment):
            found.append(file)
    return found


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """What a source file imports from elsewhere, in functions too.

    Yields:
        The name of a package, and the statement.
    """
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        for name in {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, "flowtilt"}:
            if name != "flowmol":  # an experiment's own choice
                yield name, ast.unparse(node)


PARTS = {"pydantic-core": "pydantic"}
"""Distributions that are halves of others: each version needs one of theirs, and no other."""

distributions_of_modules = cache(packages_distributions)


@pytest.mark.parametrize("file", INSTALLED, ids=[file.stem for file in FILES])
def test_all_that_the_sources_import_is_listed(file: Path) -> None:
    listed = {package.on_pypi for package in packages_of(file)}
    provided = distributions_of_modules()
    for source in sources_of(file.stem):
        for module in {name for name, _ in imports(source)}:
            found = {canonicalize_name(own) for own in provided[module]}
            assert {PARTS.get(own, own) for own in found} & listed, f"{source}: {module}"


@pytest.mark.slow
def test_all_that_the_sources_import_is_there(environment: Path) -> None:
    sources = sources_of(environment.name)
    modules = {".".join(file.relative_to(ROOT / "src").with_suffix("").parts) for file in sources}
    statements = {statement for file in sources for _, statement in imports(file)}
    code = [*sorted(f"import {module}" for module in modules), *sorted(statements)]
    done = run(environment, "\n".join(code))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["pytest", "snakemake", "hypothesis"])
@pytest.mark.slow
def test_an_environment_holds_nothing_else(environment: Path, missing: str) -> None:
    done = run(environment, f"import {missing}")
    assert done.returncode == 1
    assert f"No module named '{missing}'" in done.stderr


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.slow
def test_what_is_of_one_domain_is_in_its_environment_alone(environment: Path, domain: str) -> None:
    code = "from importlib.metadata import distributions; print(*(one.name for one in distributions()))"
    done = run(environment, code)
    assert done.returncode == 0, done.stderr
    held = {canonicalize_name(name) for name in done.stdout.split()}
    assert held & DOMAINS[domain] == (DOMAINS[domain] if environment.name == domain else set())


def test_what_is_installed_here_and_not_allowed_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("channels: [conda-forge]\ndependencies: ['numpy >=1,<2']\n")
    with pytest.raises(SystemExit, match=r"numpy <2,>=1 does not allow 2\."):
        make_environment(file, tmp_path / "environment")


def test_requirements_of_requirements_are_found() -> None:
    found = required(["torch"])
    assert {"torch", "sympy", "mpmath", "jinja2", "markupsafe"} <= found.keys()
    assert "pytest" not in found
