"""The package that plans and does the jobs: the sources of this clone, which need not be installed."""

import io
import os
import shlex
import sys
import tarfile
import tempfile
from pathlib import Path

from snakemake import __version__ as snakemake_version
from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod


def checked_out(file) -> Path | None:
    """The commit of a module that github(...) or gitlab(...) names, as a folder in Snakemake's cache.

    Snakemake has a copy of the repository there and takes single files out of it. None of an address of single files.
    """
    try:
        repository = file.hosted_repo.repo
    except AttributeError:
        return None
    commit = repository.commit(file.ref).hexsha
    folder = workflow.sourcecache.cache_path / "flowtilt" / commit
    if not folder.exists():
        packed = io.BytesIO()
        repository.archive(
            packed, commit, path=["config", "envs", "pyproject.toml", "resources", "src", "workflow"]
        )
        packed.seek(0)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
            with tarfile.TarFile(fileobj=packed) as archive:
                # Early releases of Python 3.11 have no filters; what is extracted is run anyway.
                safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
                archive.extractall(Path(unpacked) / commit, **safe)
            try:
                os.rename(Path(unpacked) / commit, folder)
            except OSError:  # another run was first
                if not folder.exists():
                    raise
    return folder


BASE = workflow.current_basedir
CLONE = Path(BASE).parents[1] if isinstance(BASE, os.PathLike) else checked_out(BASE)
if CLONE is not None and str(CLONE / "src") not in sys.path:
    sys.path.insert(0, str(CLONE / "src"))

try:
    from flowtilt.pipeline.places import OWN, SOURCES, is_clone, lacking, located
except ModuleNotFoundError as error:
    raise WorkflowError(
        f"{error}: the workflow was fetched file by file, without its sources. Name it by github(...) or gitlab(...), or "
        "by the file workflow/Snakefile of a clone; or install the package flowtilt from a clone beside Snakemake"
    ) from None

if CLONE is None and is_clone():
    CLONE = OWN
if CLONE is not None and (CLONE / "src").is_dir() and SOURCES != (CLONE / "src").resolve():
    raise WorkflowError(
        f"{SOURCES}: the sources of another clone are imported already, by a profile or a module of that one; name "
        f"the profile of {CLONE}, or one clone in all modules"
    )

CONFIG_FILE = str(located("config/config.yaml"))
# Snakemake does not document where it says these; a version that says them elsewhere must not go on by guesses.
try:
    SETTINGS = workflow.config_settings
    DEPLOYMENT = workflow.deployment_settings.deployment_method
    # What a module is given as its configuration stands instead of its own file.
    MODULE, GIVEN = not workflow.modifier.is_main_snakefile(), workflow.modifier.skip_configfile
    REGISTER, STARTED = workflow.onstart, workflow._onstart
except AttributeError:
    raise WorkflowError(
        f"Snakemake {snakemake_version} does not say what it was asked for, as 9.17 to 9.27 do: install one of those"
    ) from None
CONDA = DeploymentMethod.CONDA in DEPLOYMENT
APPTAINER = DeploymentMethod.APPTAINER in DEPLOYMENT
CONTAINER = ""

if CLONE is None and (CONDA or APPTAINER):
    raise WorkflowError(
        f"{SOURCES}: jobs that do not run here cannot have the package that is installed here; install it from a clone, "
        "pip install -e, or name the file workflow/Snakefile of that clone"
    )

if APPTAINER:
    CONTAINER = os.path.abspath(located("envs/flowtilt.sif"))
    if CONDA or not os.path.exists(CONTAINER):
        raise WorkflowError(
            "--software-deployment-method apptainer runs every job in the container envs/flowtilt.sif, "
            + (
                "which has no conda: ask for one of the two"
                if CONDA
                else "which is not there: build it by `apptainer build envs/flowtilt.sif envs/flowtilt.def` in the "
                "workflow's folder, or ask for conda"
            )
        )


def on_path(wildcards, output) -> str:
    """What a job's command begins with: a PATH on which it finds this clone's own command, and its Python.

    Said by every job itself: `shell.prefix` belongs to the workflow that uses this one as a module, and what is put on
    the PATH before an environment of conda is activated can stay ahead of it. No job is run again for it, as for a
    parameter that takes outputs.
    """
    folders = [] if CLONE is None else [shlex.quote(str(CLONE / "workflow" / "bin"))]
    if CONDA:
        folders.append('"$CONDA_PREFIX"/bin')
    elif not APPTAINER:
        folders.append(shlex.quote(str(Path(sys.executable).parent)))
    return f'export PATH={":".join([*folders, "$PATH"])};' if folders else ""


def when_started(begin) -> None:
    """Have a module's part done as a run begins, before what the workflow that uses it does then.

    Snakemake calls the onstart of that workflow alone, whether it is defined before the module is used or after.
    """

    def with_ours(func):
        def both(log):
            begin()
            func(log)

        return both

    workflow._onstart = with_ours(STARTED)
    workflow.onstart = lambda func: REGISTER(
        with_ours(func) if workflow.modifier.is_main_snakefile() else func
    )
