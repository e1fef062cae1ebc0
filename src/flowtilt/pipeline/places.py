"""Where the workflow's files are: in the user's folder first, and in the workflow's own next.

A run can be started anywhere, of a workflow that lies elsewhere: experiments, models and shipped weights that
the folder of the run does not have are those beside the sources that run. Results are always in the folder
of the run. This module imports nothing but the standard library.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2]
"""Folder of the package that runs."""

OWN = SOURCES.parent
"""The clone that the sources which run are of; some other folder where the package is installed for good."""

NEEDED = (
    *("torch", "numpy", "scipy", "pandas", "matplotlib", "ot", "safetensors", "markdown_it", "tqdm"),
    *("pydantic", "yaml"),
)
"""Modules that jobs of every domain import, and planning does not but for the last two."""

CURE = (
    "add --use-conda, by which Snakemake makes environments for the jobs; or make one environment for all by "
    "`make env` in the workflow's folder, and run its .venv/bin/snakemake"
)
"""What gives jobs the modules that they lack."""


def is_clone(folder: Path = OWN) -> bool:
    """Whether the workflow lies beside the sources that run."""
    return (folder / "workflow" / "Snakefile").is_file()


def located(path: str | Path) -> Path:
    """A file or folder by its path in the project: as it is where that exists, else the workflow's own.

    What is nowhere is left as it is, so that messages name it as it was written.
    """
    path = Path(path)
    if path.is_absolute() or path.exists() or not is_clone():
        return path
    own = OWN / path
    return own if own.exists() else path


def preferred(sibling: Path, standard: str) -> Path:
    """A file that another one names: the one beside it, or else the user's or the workflow's own.

    Args:
        sibling: its path beside the file that names it. Beside a file of the workflow the user's comes first.
        standard: its path in the project.
    """
    own = is_clone() and sibling.resolve().is_relative_to(OWN)
    found = located(standard)
    return found if (own or not sibling.exists()) and found.exists() else sibling


def names_in(*folders: str | Path) -> str:
    """Names of the YAML files of some folders and of the workflow's own of that path, for messages."""
    own = [OWN / folder for folder in folders if is_clone()]
    files = [file for folder in (*folders, *own) for file in Path(folder).glob("*.yaml")]
    return ", ".join(sorted({file.stem for file in files})) or "none"


def lacking() -> list[str]:
    """Modules that jobs need and this Python does not have."""
    return [module for module in NEEDED if find_spec(module) is None]
