"""Conda environments without conda: their files, and real environments that hold just what they list.

An environment here is a virtual environment with links to the distributions that are installed beside these
tests: those of its file under their names on PyPI, and what they require. Nothing is copied or downloaded.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import venv
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from importlib.util import find_spec
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "envs").glob("*.yaml"))

MOLECULES = find_spec("tblite") is not None
"""Whether the extra ``molecules`` is installed; there are no wheels of tblite for macOS."""

ON_PYPI = {
    "matplotlib-base": "matplotlib",
    "pot": "POT",
    "pytorch": "torch",
    "tblite-python": "tblite",
}
"""Names of packages of conda-forge that have another on PyPI."""


@dataclass(frozen=True)
class Package:
    """One line of an environment file.

    Attributes:
        name: on conda-forge, or on PyPI.
        bounds: its versions.
        by_pip: whether pip installs it.
    """

    name: str
    bounds: SpecifierSet
    by_pip: bool = False

    @property
    def on_pypi(self) -> str:
        """Its name on PyPI, as that is compared."""
        return canonicalize_name(self.name if self.by_pip else ON_PYPI.get(self.name, self.name))


def packages_of(file: Path) -> list[Package]:
    """The packages of an environment file, python among them."""
    found = []
    for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["dependencies"]:
        by_pip = isinstance(entry, dict)
        for line in entry["pip"] if by_pip else [entry]:
            name, _, bounds = line.partition(" ")
            found.append(Package(name, SpecifierSet(bounds), by_pip))
    return found


def required(packages: list[str]) -> dict[str, Distribution]:
    """Installed distributions of some packages, and of all that they require here, by name."""
    found: dict[str, Distribution] = {}
    left = [Requirement(package) for package in packages]
    while left:
        wanted = left.pop()
        name = canonicalize_name(wanted.name)
        extras = {"", *wanted.extras}
        first = name not in found
        if not first and not wanted.extras:
            continue
        found.setdefault(name, distribution(wanted.name))
        for line in found[name].requires or ():
            requirement = Requirement(line)
            marker = requirement.marker
            # Without extras those that need none, once; with extras what they add.
            if any(
                (first or extra) and (marker is None or marker.evaluate({"extra": extra})) for extra in extras
            ):
                left.append(requirement)
    return found


def make_environment(file: Path, prefix: Path) -> None:
    """Make the environment of a file, in place of conda.

    Raises:
        SystemExit: if what is installed here is not what the file allows.
    """
    packages = [package for package in packages_of(file) if package.name != "python"]
    found = required([package.on_pypi for package in packages])
    for package in packages:
        version = found[package.on_pypi].version
        if version not in package.bounds:
            raise SystemExit(f"{file}: {package.name} {package.bounds} does not allow {version}")
    venv.create(prefix, with_pip=False, symlinks=True)
    site = prefix / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for own in found.values():
        for top in {part.parts[0] for part in own.files or ()} - {"..", "__pycache__"}:
            link = site / top
            if not link.exists():
                link.symlink_to(Path(str(own.locate_file(top))).resolve())


def rules() -> dict[str, tuple[str, str]]:
    """Stage of the command line and name of the environment of every rule, by name.

    Rules that are of one file each stand under the name of its domain: ``figures_planar``.
    """
    from flowtilt.pipeline.domain import domain_named, sources  # not there for the stand-in of conda
    from flowtilt.pipeline.rules import rule_name

    found = {}
    for file in sorted((ROOT / "workflow" / "rules").glob("*.smk")):
        for text in re.split(r"^(?=made\()", file.read_text(), flags=re.MULTILINE)[1:]:
            name = re.match(r'made\(\s+"(\w+)",', text)
            stage = re.search(r'lambda w, i, o: \[\s*(?:\*\(\s*)?"([\w-]+)"', text)
            assert name is not None, text
            assert stage is not None, text
            found[name[1]] = stage[1], "core"
    for domain in map(domain_named, sources()):
        found[f"figures_{domain.name}"] = "figures", domain.environment
        found |= {rule_name(domain, one): (one.name, domain.environment) for one in domain.stages}
    return found


# ---------------------------------------------------------------------------- a conda to run

CONDA = '''\
#!{python}
"""Answers what Snakemake asks conda; an environment is made of what is installed beside the tests."""

import json
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
arguments = sys.argv[1:]
with open({calls!r}, "a") as stream:
    stream.write(json.dumps(arguments) + "\\n")
if arguments == ["info", "--json"]:
    print(json.dumps({{"conda_prefix": {prefix!r}, "platform": "linux-64"}}))
elif arguments == ["--version"]:
    print("conda 25.9.1")
elif arguments[:3] == ["config", "--get", "channel_priority"]:
    print(json.dumps({{"get": {{"channel_priority": "strict"}}}}))
elif arguments[:2] == ["env", "create"]:
    options = dict(zip(arguments, arguments[1:]))
    from environments import make_environment

    make_environment(Path(options["--file"]), Path(options["--prefix"]))
elif arguments != ["clean", "-y", "--tarballs"]:
    sys.exit(f"this conda does not know: {{' '.join(arguments)}}")
'''

ACTIVATE = """\
# conda's own script puts an environment in the place of the one that was active: what was put on the PATH
# after that, such as the Python that runs Snakemake, stays ahead of it.
# What conda does not do is to take away a PYTHONPATH, which would hide what an environment lacks.
unset PYTHONPATH
export CONDA_PREFIX="$1"
export PATH="${{PATH%%:*}}:$1/bin:${{PATH#*:}}"
echo "$1" >> {activations}
"""


@dataclass(frozen=True)
class StandInConda:
    """A conda that records what it is asked, and links environments in place of solving them."""

    folder: Path

    @classmethod
    def in_folder(cls, folder: Path) -> StandInConda:
        made = cls(folder)
        made.bin.mkdir(parents=True)
        words = {"prefix": str(folder), "calls": str(made.record), "tests": str(Path(__file__).parent)}
        conda = made.bin / "conda"
        conda.write_text(CONDA.format(python=sys.executable, **words))
        conda.chmod(0o755)
        (made.bin / "activate").write_text(ACTIVATE.format(activations=shlex.quote(str(made.activations))))
        return made

    @property
    def bin(self) -> Path:
        """What goes on the PATH."""
        return self.folder / "bin"

    @property
    def record(self) -> Path:
        """One line of JSON a call."""
        return self.folder / "calls.jsonl"

    def calls(self) -> list[list[str]]:
        """The arguments of every call."""
        return [json.loads(line) for line in self.record.read_text(encoding="utf-8").splitlines()]

    @property
    def activations(self) -> Path:
        """One line an activation: the environment."""
        return self.folder / "activations.txt"
